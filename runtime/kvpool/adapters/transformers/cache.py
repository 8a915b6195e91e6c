"""The face of the adapter: a model that is registered with a pool, and sessions for its prompts."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvpool.adapters.transformers.block_copy import GPU_TYPES
from kvpool.adapters.transformers.geometry import DYNAMIC_CACHES, inspect_model, require_evaluation
from kvpool.adapters.transformers.host_memory import HostMemory
from kvpool.adapters.transformers.identity import model_identity
from kvpool.adapters.transformers.layers import ROOM_TOKENS
from kvpool.adapters.transformers.rows import read_prompt
from kvpool.adapters.transformers.session import SHARED_DEADLINE_S, BlockModel, Session
from kvpool.config import RuntimeConfig
from kvpool.errors import InputError, UnsupportedModelError
from kvpool.pool.results import ModelSpec


class ModelRegistry(Protocol):
    """What the adapter needs of a `kvpool.pool.Pool`."""

    @property
    def config(self) -> RuntimeConfig:
        """The pool's configuration."""
        ...

    def register(self, spec: ModelSpec) -> BlockModel:
        """Make the model known; the same identity gives the same model."""
        ...


class TransformersCache:
    """A pool in front of a `transformers` model.

    Makes sure that the model's cache is one that blocks can hold (`UnsupportedModelError` says why not), and registers
    the model under an identity made from its weights' content and its configuration. `weights` is an id that you vouch
    for instead of hashing; `revision` and `name` default to what the model says of itself. After changing weights in
    place, make a new one with another `generation`. Where the model's cache lies on a device of one of `gpu_types`,
    blocks stay there, in the pool's gpu tier. A prompt waits `shared_deadline_s` at most for what tiers that are shared
    with other processes hold of it; 0: they are not asked. Safe from any thread, as far as the model is.
    """

    def __init__(
        self,
        pool: ModelRegistry,
        model: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        weights: str | None = None,
        generation: bytes = b"",
        prefill_tokens_per_second: float | None = None,
        digest_file: Path | None = None,
        gpu_types: Collection[str] = GPU_TYPES,
        shared_deadline_s: float = SHARED_DEADLINE_S,
    ) -> None:
        self.model = model
        self._gpu_types = gpu_types
        self._shared_deadline_s = shared_deadline_s
        self._memory = HostMemory()
        self.geometry = inspect_model(model)
        identity = model_identity(
            model,
            self.geometry.layout(pool.config.block_tokens),
            name=name,
            revision=revision,
            weights=weights,
            generation=generation,
            digest_file=digest_file,
        )
        self.blocks = pool.register(ModelSpec(identity=identity, prefill_tokens_per_second=prefill_tokens_per_second))

    def session(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        tenant: str | Sequence[str] = "default",
        room_tokens: int = ROOM_TOKENS,
    ) -> Session:
        """Load what the pool holds of a prompt, and return the session to generate and store with.

        `input_ids` and `attention_mask` are tensors [batch, tokens], as a tokenizer returns them; rows of a batch are
        padded on the left and matched one by one, and may belong to different tenants (`tenant`: one name, or one per
        row). `room_tokens` is how many tokens the cache can grow by before it is copied to a larger place.
        """
        require_evaluation(self.model)
        self._refuse_other_caches()
        prompt = read_prompt(self.model, input_ids, attention_mask)
        tenants = [tenant] * len(prompt.rows) if isinstance(tenant, str) else list(tenant)
        if len(tenants) != len(prompt.rows):
            raise InputError(f"tenant has {len(tenants)} names for {len(prompt.rows)} rows; pass one, or one per row")
        return Session(
            self.model,
            self.blocks,
            self.geometry,
            prompt,
            tenants,
            room_tokens,
            self._memory,
            self._gpu_types,
            self._shared_deadline_s,
        )

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        tenant: str | Sequence[str] = "default",
        **options: Any,
    ) -> Any:
        """`model.generate` with a pool: load, generate, store. Takes its options and returns what it returns."""
        room_tokens = options.get("max_new_tokens") or ROOM_TOKENS
        with self.session(input_ids, attention_mask, tenant=tenant, room_tokens=room_tokens) as session:
            return session.generate(**options)

    def _refuse_other_caches(self) -> None:
        implementation = getattr(self.model.generation_config, "cache_implementation", None)
        if implementation not in DYNAMIC_CACHES:
            raise UnsupportedModelError(
                f"generation_config.cache_implementation is {implementation!r}; blocks are kept from dynamic caches "
                "only (static, quantized and offloaded ones hold something else): set it to None"
            )
