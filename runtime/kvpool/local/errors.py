"""What goes wrong with servers on this machine."""

from kvpool.errors import KvpoolError


class LocalServerError(KvpoolError):
    """A server on this machine is missing, did not start or did not stop; the message says what to do."""
