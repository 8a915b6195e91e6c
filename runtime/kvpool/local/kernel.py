"""Calls to the Linux kernel that Python has no names for. Each raises `OSError`, as those in `os` do."""

import ctypes
import os

_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER, _SET_KEEP_CAPABILITIES, _AMBIENT = 1, 36, 8, 47
_AMBIENT_RAISE = 2
_NEW_USER_NAMESPACE = 0x10000000
_SIGNAL_PROCESS, _OPEN_PROCESS = 424, 434
"""The same on all machines; Python has them only where it was built with the headers of a new kernel."""
_CAPABILITY_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE = 1
"""To read, write and search files and directories whatever their mode says."""

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send this process a signal when the thread that made it ends. Survives `exec`, not `fork`."""
    _checked(_libc.prctl(_SET_PARENT_DEATH_SIGNAL, _long(signal_number), _long(0), _long(0), _long(0)))


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parents end."""
    _checked(_libc.prctl(_SET_CHILD_SUBREAPER, _long(1), _long(0), _long(0), _long(0)))


def enter_user_namespace() -> None:
    """Leave the user namespace of the machine for a new one, in which this process has no user yet."""
    _checked(_libc.unshare(_NEW_USER_NAMESPACE))


def keep_capabilities_of_root() -> None:
    """Keep what is permitted over the change from root to another user, for `keep_only` to choose from."""
    _checked(_libc.prctl(_SET_KEEP_CAPABILITIES, _long(1), _long(0), _long(0), _long(0)))


def keep_only(capability: int) -> None:
    """Give up all capabilities but one, and hand that one on to the program that is executed next."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = (1 << capability) & 0xFFFFFFFF, capability // 32 and 1 << (capability - 32)
    # effective, permitted and inheritable: the low 32 of each, then the high 32 of each
    _checked(_libc.capset(header, (ctypes.c_uint32 * 6)(low, low, low, high, high, high)))
    _checked(_libc.prctl(_AMBIENT, _long(_AMBIENT_RAISE), _long(capability), _long(0), _long(0)))


def open_process(pid: int) -> int:
    """A descriptor of a process, that means it also when it has ended; readable from then on. Closed by `exec`."""
    return _checked(_libc.syscall(_long(_OPEN_PROCESS), _long(pid), _long(0)))


def signal_process(process: int, number: int) -> None:
    """Send a signal to the process of a descriptor, never to another that has its number by now."""
    _checked(_libc.syscall(_long(_SIGNAL_PROCESS), _long(process), _long(number), _long(0), _long(0)))


def _long(value: int) -> ctypes.c_ulong:
    return ctypes.c_ulong(value)  # these take longs; a plain int would be passed as 32 bits


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
