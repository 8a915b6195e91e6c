"""How payloads cross between an engine's memory and a pool: two small protocols that adapters implement.

One copy each way, no intermediate: the pool lends the adapter a view of the tier's own memory while the call runs.
"""

from typing import Protocol

from kvpool.blocks.record import Buffer


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
