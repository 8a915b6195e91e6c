"""How a shared tier is reached: what is asked for one when the pool opens, and again while there is none."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvpool.blocks.identity import Fingerprint
from kvpool.config import RuntimeConfig
from kvpool.pool.remote.share import Limit
from kvpool.tiers.tier import KeyedTier, TierName, Usage

if TYPE_CHECKING:
    from kvpool.local import LocalServer


class Connector(Protocol):
    """Connects one tier; starts its server where that is ours to run. Used by one thread at a time."""

    name: TierName

    def start(self) -> None:
        """Start the server, if it is ours to run and does not. Raises `TierUnavailableError`."""
        ...

    def connect(self) -> KeyedTier:
        """A tier that has answered. Raises `TierUnavailableError`: to be tried again later."""
        ...

    def is_wanted(self, fingerprint: Fingerprint) -> bool:
        """Whether blocks of a model go there at all."""
        ...

    def set_limits(self, limits: Mapping[Fingerprint, Limit]) -> None:
        """Replace what models may have in the tier. For models that are not named there is no limit."""
        ...

    def shares(self) -> Mapping[str, Usage]:
        """What the models that have a limit hold, by name, and the limit; asks nobody."""
        ...

    def tend(self) -> None:
        """Do what is to be done from time to time. Raises `TierUnavailableError`."""
        ...

    def reconfigure(self, config: RuntimeConfig) -> None:
        """Take over what of another configuration can change while the pool is open."""
        ...

    def close(self) -> None:
        """The pool is closed: stop what was started."""
        ...


@runtime_checkable
class RunsServer(Protocol):
    """A connector whose server may be ours to run."""

    @property
    def server(self) -> "LocalServer | None":
        """That server; None before its first start, and where it runs elsewhere."""
        ...
