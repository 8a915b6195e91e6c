"""How payloads cross between an engine's memory and a pool: two small protocols that adapters implement.

One copy each way, no intermediate: the pool lends the adapter a view of the tier's own memory while the call runs.
An engine whose memory is on a device implements the two that derive from them as well: then a block in the gpu tier
never comes to the host.
"""

from typing import Any, Protocol, TypeAlias, runtime_checkable

from kvpool.blocks.record import Buffer

DevicePayload: TypeAlias = Any
"""A one-dimensional torch uint8 tensor of `layout.payload_bytes` bytes on the gpu tier's device, aligned to 64."""


class BlockSource(Protocol):
    """Where `Model.store` takes new blocks from."""

    def read_block(self, index: int, into: Buffer) -> None:
        """Write the payload of block `index`, counted from the prompt's start, into `into`.

        `into` is a writable one-dimensional numpy uint8 array of `layout.payload_bytes` bytes, in canonical order (see
        `kvpool.blocks.layout`). It must not be kept. May be called from the storing thread only.
        """
        ...


class BlockSink(Protocol):
    """Where `Lease.load` puts blocks."""

    def write_block(self, index: int, payload: Buffer) -> None:
        """Take the payload of block `index`, counted from the prompt's start.

        `payload` is a read-only numpy uint8 array, as in `BlockSource.read_block`; verified if it came from outside
        this process. It must not be kept. Blocks come in order. Whatever this raises ends the load and reaches its
        caller.
        """
        ...


@runtime_checkable
class DeviceBlockSource(BlockSource, Protocol):
    """A source whose blocks are on the device."""

    def read_block_on_device(self, index: int, into: DevicePayload) -> None:
        """As `read_block`, into device memory. The copy may be queued only, on the calling thread's current stream."""
        ...


@runtime_checkable
class DeviceBlockSink(BlockSink, Protocol):
    """A sink whose blocks are to be on the device."""

    def write_block_from_device(self, index: int, payload: DevicePayload) -> None:
        """As `write_block`, from device memory, which is to be read only.

        The copy may be queued only, on the calling thread's current stream; `payload` must not be kept. A load calls
        this for blocks in the gpu tier, and `write_block` for all others, in order.
        """
        ...
