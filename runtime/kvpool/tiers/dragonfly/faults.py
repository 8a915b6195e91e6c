"""What can go wrong between us and a server. All of it becomes `TierUnavailableError`, or a miss, in the tier.

FaultError
    BusyError         all connections were in use for the whole budget
    StalledError      nothing moved for the whole budget
    LostError         the other side closed, or the network did
    SurpriseError     bytes that no server of this protocol sends
    RefusedError      there is nobody, or we are not let in
"""


class FaultError(Exception):
    """A server cannot be used now. Its text names the server, and never holds a password."""


class BusyError(FaultError):
    """All connections were in use for the whole budget: the server itself may be well."""


class StalledError(FaultError):
    """Nothing moved for the whole budget."""


class LostError(FaultError):
    """The connection ended."""


class SurpriseError(FaultError):
    """The other side does not speak the protocol, or not this part of it."""


class RefusedError(FaultError):
    """The server is not there, or does not let us in."""
