"""One prompt on its way through a model: what the pool held of it is in the cache, and what is new can be stored."""

import copy
import logging
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

import torch
from transformers.generation.configuration_utils import GenerationMode

from kvpool.adapters.transformers.block_copy import GPU_TYPES, cache_sink, cache_source
from kvpool.adapters.transformers.geometry import Geometry, generate_argument, require_evaluation
from kvpool.adapters.transformers.host_memory import HostMemory
from kvpool.adapters.transformers.layers import KVBuffer, pooled_cache, slabs_of
from kvpool.adapters.transformers.rows import Prompt, Row, loadable_columns
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.tokens import Tokens, token_bytes
from kvpool.blocks.transfer import BlockSink, BlockSource
from kvpool.errors import InputError, PoolClosedError
from kvpool.pool.results import LeaseState, Refusal, StoreResult
from kvpool.tiers.tier import TierName

SHARED_DEADLINE_S = 0.5
"""How long a prompt waits for what shared tiers hold of it: no longer than they are quicker than computing it."""
_log = logging.getLogger(__name__)
_FORBIDDEN = {
    "past_key_values": "the session brings the cache",
    "cache": "the session brings the cache",
    "cache_implementation": "the session brings the cache",
    "use_cache": "without a cache there is nothing to keep",
    "inputs": "the session has the prompt",
    "input_ids": "the session has the prompt",
    "attention_mask": "the session has the prompt's mask",
    "position_ids": "keys and values are kept at the positions that the mask gives",
    "custom_generate": "a loop of its own may not go on from a cache",
}


class BlockLease(Protocol):
    """What a session needs of a `kvpool.pool.Lease`."""

    @property
    def blocks(self) -> int:
        """Whole blocks that were matched."""
        ...

    @property
    def tokens(self) -> int:
        """The same in tokens."""
        ...

    @property
    def served(self) -> dict[TierName, int]:
        """Blocks that were loaded, by tier."""
        ...

    def ask(self, deadline_s: float) -> LeaseState:
        """Begin to extend it by what shared tiers hold."""
        ...

    def wait(self, deadline_s: float) -> LeaseState:
        """Extend it by what shared tiers hold, and wait for that."""
        ...

    def load(self, sink: BlockSink) -> int:
        """Hand the blocks over; the tokens that arrived."""
        ...

    def __enter__(self) -> "BlockLease": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class BlockModel(Protocol):
    """What a session needs of a registered `kvpool.pool.Model`."""

    @property
    def layout(self) -> KVLayout:
        """How its blocks lie."""
        ...

    def match(self, tokens: Tokens, *, tenant: str = ...) -> BlockLease:
        """Lease the longest prefix that is held."""
        ...

    def store(self, tokens: Tokens, source: BlockSource, *, tenant: str = ...) -> StoreResult:
        """Store the whole blocks of `tokens` that are not held yet."""
        ...

    def observe_prefill(self, tokens: int, seconds: float) -> None:
        """Take note of a measured prefill."""
        ...


class Session:
    """A prompt (or a padded batch of them) with its cache. Used by one thread; holds no lease once it is made.

    `inputs` are the arguments for `model.generate`: the prompt, its mask and the cache. `loaded_columns` says how much
    of the prompt is in the cache already, padding included; `loaded_tokens` the same per row, without padding; `served`
    from which tiers its blocks came. Leaving the `with` block frees the cache.
    """

    def __init__(
        self,
        model: Any,
        blocks: BlockModel,
        geometry: Geometry,
        prompt: Prompt,
        tenants: Sequence[str],
        room_tokens: int,
        memory: HostMemory,
        gpu_types: Collection[str] = GPU_TYPES,
        shared_deadline_s: float = SHARED_DEADLINE_S,
    ) -> None:
        self._shared_deadline_s = shared_deadline_s
        self._model = model
        self._blocks = blocks
        self._geometry = geometry
        self._prompt = prompt
        self._tenants = tenants
        self._gpu_types = gpu_types
        self._served: Counter[TierName] = Counter()
        buffer = KVBuffer(geometry, len(prompt.rows), prompt.width + room_tokens, memory)
        self.loaded_columns = self._load(buffer)
        awaited = prompt.width - self.loaded_columns if self.loaded_columns else None
        self._cache: Any = pooled_cache(buffer, len(geometry.devices), self.loaded_columns, awaited)

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""
        self._cache = None

    @property
    def past_key_values(self) -> Any:
        """The `DynamicCache`: as loaded, and what the model has added since."""
        if self._cache is None:
            raise PoolClosedError("the session was closed: open another one")
        return self._cache

    @property
    def served(self) -> dict[TierName, int]:
        """How many blocks were loaded, by the tier they came from."""
        return dict(self._served)

    @property
    def inputs(self) -> dict[str, Any]:
        """Arguments for `model.generate(**session.inputs, ...)`."""
        prompt = self._prompt
        return {
            "input_ids": prompt.input_ids,
            "attention_mask": prompt.attention_mask,
            generate_argument(): self.past_key_values,
        }

    @property
    def loaded_tokens(self) -> tuple[int, ...]:
        """Tokens of each row that were loaded."""
        return tuple(max(0, self.loaded_columns - row.padding) for row in self._prompt.rows)

    def generate(self, **options: Any) -> Any:
        """Run `model.generate` with these options, store what is new, and return what `generate` returned.

        The prefill is timed and reported to the pool. Streamers work as usual; everything is stored when the last token
        is there. Raises `InputError` for options whose keys and values could not be kept.
        """
        _check_options(self._model.generation_config, options)
        require_evaluation(self._model)
        timer = _PrefillTimer(options.pop("streamer", None))
        output = self._model.generate(**self.inputs, streamer=timer, **options)
        self._report(timer)
        try:
            self.store(output)
        except PoolClosedError:
            _log.warning("the pool was closed while %s generated; nothing of it was stored", type(self._model).__name__)
        return output

    def store(self, output: Any = None) -> StoreResult:
        """Store the whole blocks of the prompt, and of what was generated, that the pool does not hold yet.

        `output` is what `model.generate` returned, or the token ids [batch, tokens], prompt first; None: the prompt
        alone. The last token that was generated has no keys and values yet, and is left for the next turn. May be
        called again when the same cache has grown. Raises `InputError` where `output` or the cache are another's.
        """
        slabs, length = slabs_of(self.past_key_values, self._geometry, len(self._prompt.rows))
        sequences = self._sequences(output, length)
        results = [
            self._blocks.store(
                tokens,
                cache_source(self._blocks.layout, slabs, number, row.padding, gpu_types=self._gpu_types),
                tenant=self._tenants[number],
            )
            for number, row in enumerate(self._prompt.rows)
            if row.tokens and (tokens := self._row_tokens(row, sequences[number, :length]))
        ]
        return _sum(results)

    def _load(self, buffer: KVBuffer) -> int:
        """Fill the buffer as far as all rows can be filled; the number of columns that are."""
        layout, rows = self._blocks.layout, self._prompt.rows
        with ExitStack() as leases:
            held = [leases.enter_context(self._match(number, row.tokens)) for number, row in enumerate(rows)]
            self._wait_for_shared_tiers(held)
            wanted = loadable_columns(self._prompt, [lease.tokens for lease in held])
            arrived = []
            for number, (row, lease) in enumerate(zip(rows, held, strict=True)):
                blocks = -(-max(0, wanted - row.padding) // layout.block_tokens)
                if blocks < lease.blocks:  # more than the row with least allows: do not read what cannot be used
                    lease = leases.enter_context(self._match(number, row.tokens[: blocks * layout.token_bytes]))
                sink = cache_sink(layout, buffer.slabs, number, row.padding, wanted, gpu_types=self._gpu_types)
                arrived.append(lease.load(sink) if blocks else 0)
                self._served.update(lease.served)
        columns = loadable_columns(self._prompt, arrived)
        for number, row in enumerate(rows):
            buffer.clear(number, min(row.padding, columns))
        return columns

    def _wait_for_shared_tiers(self, leases: Sequence[BlockLease]) -> None:
        """Have all rows' leases extended at once by what shared tiers hold."""
        if not self._shared_deadline_s:
            return
        until_s = time.monotonic() + self._shared_deadline_s
        if len(leases) > 1:
            for lease in leases:
                lease.ask(self._shared_deadline_s)
        for lease in leases:
            lease.wait(max(0.0, until_s - time.monotonic()))

    def _match(self, number: int, tokens: bytes) -> BlockLease:
        return self._blocks.match(tokens, tenant=self._tenants[number])

    def _sequences(self, output: Any, length: int) -> torch.Tensor:
        """The token ids whose first `length` columns the cache holds."""
        prompt = self._prompt.input_ids
        sequences = prompt if output is None else getattr(output, "sequences", output)
        if not isinstance(sequences, torch.Tensor) or sequences.ndim != 2:
            raise InputError("store takes what model.generate returned, or token ids as a tensor [batch, tokens]")
        if sequences.shape[0] != prompt.shape[0] or not torch.equal(
            sequences[:, : prompt.shape[1]].to(prompt.device), prompt
        ):
            raise InputError("what was generated does not begin with the session's prompt; was it another's?")
        if output is not None and length > sequences.shape[1]:
            raise InputError(
                f"the cache holds {length} tokens, and what was generated has {sequences.shape[1]}: "
                "the session's cache was used for another prompt too"
            )
        return sequences

    def _row_tokens(self, row: Row, sequence: torch.Tensor) -> bytes:
        """The row's tokens that have keys and values, without what pads a row that ended before the others."""
        ids = sequence[row.padding :]
        pad = _pad_token(self._model.generation_config)
        if len(self._prompt.rows) > 1 and pad is not None:
            generated = ids[self._prompt.width - row.padding :]
            kept = torch.nonzero(generated != pad)
            trailing = len(generated) - (int(kept[-1]) + 1 if len(kept) else 0)
            ids = ids[: len(ids) - trailing]
        return token_bytes(ids.cpu().numpy())

    def _report(self, timer: "_PrefillTimer") -> None:
        """Tell the pool how fast the prefill was; that of less than a block says more of its fixed cost."""
        computed = sum(
            len(row.tokens) // 4 - loaded for row, loaded in zip(self._prompt.rows, self.loaded_tokens, strict=True)
        )
        if timer.seconds and computed >= self._blocks.layout.block_tokens:
            self._blocks.observe_prefill(computed, timer.seconds)


class _PrefillTimer:
    """A streamer that measures from the prompt to the first token, and passes all on to another, if there is one."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._began: float | None = None
        self.seconds: float | None = None

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = now
        elif self.seconds is None:
            self.seconds = now - self._began
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


def _check_options(defaults: Any, options: dict[str, Any]) -> None:
    for name, reason in _FORBIDDEN.items():
        if options.get(name) is not None:
            raise InputError(f"generate({name}=...) cannot be used here: {reason}")
    _check_mode(defaults, options)
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            raise InputError(
                f"generate({name}=...): keys and values would depend on a tensor that token ids do not say"
            )


def _check_mode(defaults: Any, options: dict[str, Any]) -> None:
    config = copy.deepcopy(options.get("generation_config") or defaults)
    config.update(**options)
    if (config.num_return_sequences or 1) > 1:
        raise InputError("num_return_sequences above 1 cannot be cached: one row of the cache belongs to one prompt")
    mode = config.get_generation_mode(options.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(f"generation by {mode.value} does not go on from a cache: only greedy search and sampling do")


def _pad_token(config: Any) -> int | None:
    """The token that `generate` appends to rows that have ended."""
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    ends = config.eos_token_id
    return int(ends[0]) if isinstance(ends, list) else ends


def _sum(results: Sequence[StoreResult]) -> StoreResult:
    refused: Counter[Refusal] = Counter()
    for result in results:
        refused.update(result.refused)
    return StoreResult(
        sum(result.stored for result in results), sum(result.already_there for result in results), dict(refused)
    )
