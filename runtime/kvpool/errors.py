"""The exceptions that kvpool raises to its users.

KvpoolError
├── ConfigError          the configuration cannot be used; names the field
├── InputError           tokens, keys or buffers that no block can hold
├── UnsupportedModelError     a model whose cache cannot be kept correctly
├── DirectoryInUseError       another process holds the pool's directory
├── IncompatibleDataError     a directory written by a newer program
├── LocalServerError          a server on this machine is missing, did not start or did not stop (`kvpool.local`)
├── SharedTierOutError        a question that only a shared tier can answer, and it is out
└── PoolClosedError           the pool, or the lease, was closed before

A fault of a tier is none of these: it is a miss, a counter and a log line.
"""


class KvpoolError(Exception):
    """Anything that kvpool raises on purpose."""


class ConfigError(KvpoolError):
    """The configuration cannot be used; the message names the field and what would be right."""


class InputError(KvpoolError, ValueError):
    """Tokens, extra keys or buffers that no block can hold."""


class UnsupportedModelError(KvpoolError):
    """The model's cache holds something that blocks of keys and values cannot say."""


class DirectoryInUseError(KvpoolError):
    """Another process holds the pool's directory; the message names it."""


class IncompatibleDataError(KvpoolError):
    """The directory was written by a newer program; the message says which version it needs."""


class SharedTierOutError(KvpoolError):
    """A question that only the catalog or Qdrant can answer, and it does not answer now."""


class PoolClosedError(KvpoolError):
    """The pool or the lease was closed before this call."""
