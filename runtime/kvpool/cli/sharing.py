"""How shared prefixes are shown: as rows of a table, and as objects."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from kvpool.blocks.identity import Fingerprint
from kvpool.cli.output import size, table
from kvpool.prefix.index import LEVEL_NAMES
from kvpool.prefix.sharing import SharedPrefix

_COLUMNS = ("shared prefix", "model", "tenant", "tokens", "requests", "continuations", "in ram", "in ssd")
_SHOWN_DIGITS = 12


def shared_table(prefixes: Sequence[SharedPrefix], names: Mapping[Fingerprint, str]) -> Table:
    """The most used first. `names` are the models' names, by fingerprint; keys and tenants are digests, cut short."""
    rows = []
    for prefix in prefixes:
        taken = dict(zip(LEVEL_NAMES, prefix.bytes, strict=True))
        rows.append((
            prefix.key.hex()[:_SHOWN_DIGITS],
            _name(prefix, names),
            prefix.tree.tenant.hex()[:_SHOWN_DIGITS],
            f"{prefix.tokens:,}",
            f"{prefix.hits:,}",
            f"{prefix.children:,}",
            size(taken["ram"]),
            size(taken["ssd"]),
        ))  # fmt: skip
    return table(_COLUMNS, rows, right=_COLUMNS[3:])


def as_object(prefix: SharedPrefix, names: Mapping[Fingerprint, str]) -> dict[str, object]:
    """The object that `--json` prints. `key` is that of the prefix's last block, as `kvpool explain` prints it."""
    return {
        "key": prefix.key.hex(),
        "model": _name(prefix, names),
        "fingerprint": prefix.tree.fingerprint.hex(),
        "tenant": prefix.tree.tenant.hex(),
        "blocks": prefix.depth,
        "tokens": prefix.tokens,
        "requests": prefix.hits,
        "continuations": prefix.children,
        "bytes": dict(zip(LEVEL_NAMES, prefix.bytes, strict=True)),
        "idle_uses": prefix.idle_uses,
    }


def _name(prefix: SharedPrefix, names: Mapping[Fingerprint, str]) -> str:
    return names.get(prefix.tree.fingerprint) or prefix.tree.fingerprint.hex()[:_SHOWN_DIGITS]
