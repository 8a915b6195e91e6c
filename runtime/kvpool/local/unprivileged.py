"""How PostgreSQL, which refuses to run as root, runs in a pool of root: as a user who is root only for files.

First choice, a user namespace of its own, in which root outside is an ordinary user (`nobody`, say) inside: the server
sees that it is not root, has no capabilities, and for files it is still root outside, so that the pool's directory
stays 0700 and the data root's. Where namespaces are forbidden (most containers), it becomes that ordinary user for
real, keeps the one capability to reach files in directories that are closed to others, and the data are given to that
user; the pool's directory above them keeps all others out.

The namespace also serves a user who has no name on this machine (a container's `runAsUser`), whom initdb would refuse.
"""

import os
import pwd
from contextlib import suppress
from pathlib import Path

from kvpool.local import kernel

_PREFERRED = ("nobody", "postgres", "daemon")
"""Users that are there almost everywhere. In a namespace the name means nothing but "not root"."""


def needs_another_user() -> bool:
    """Whether this process is root, or somebody without a name."""
    return os.geteuid() == 0 or _entry(os.geteuid()) is None


def become_unprivileged(data: Path) -> None:
    """Stop being root for good, with `data` and all below it as one's own. For a process that executes a program next.

    Raises `OSError` where the machine allows neither way.
    """
    somebody = _somebody()
    if _may_live_in_a_namespace(somebody):
        _give(data, os.geteuid(), os.getegid())  # it may have been run the other way before
        _live_in_a_namespace(somebody)
        return
    try:
        _give(data, somebody.pw_uid, somebody.pw_gid)
        _become(somebody)
    except OSError as error:
        raise PermissionError(
            f"it refuses to be user {os.geteuid()}, who has no right here to be another ({error}): "
            f"run the pool as an ordinary user that this machine knows by name"
        ) from error


def _may_live_in_a_namespace(somebody: pwd.struct_passwd) -> bool:
    """Tried by a child, for there is no way back from half of it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _live_in_a_namespace(somebody)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def _live_in_a_namespace(somebody: pwd.struct_passwd) -> None:
    user, group = os.geteuid(), os.getegid()
    kernel.enter_user_namespace()
    Path("/proc/self/setgroups").write_text("deny")  # the kernel's condition for mapping a group
    Path("/proc/self/uid_map").write_text(f"{somebody.pw_uid} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{somebody.pw_gid} {group} 1")


def _become(somebody: pwd.struct_passwd) -> None:
    kernel.keep_capabilities_of_root()
    os.setgroups([])
    os.setresgid(somebody.pw_gid, somebody.pw_gid, somebody.pw_gid)
    os.setresuid(somebody.pw_uid, somebody.pw_uid, somebody.pw_uid)
    kernel.keep_only(kernel.CAP_DAC_OVERRIDE)


def _give(data: Path, user: int, group: int) -> None:
    """Make `data` the user's; itself last, so that a walk that was cut short is begun again the next time."""
    if data.stat().st_uid == user:
        return
    for directory, _, files in os.walk(data, topdown=False):
        for name in files:
            os.chown(Path(directory) / name, user, group, follow_symlinks=False)
        os.chown(directory, user, group, follow_symlinks=False)


def _somebody() -> pwd.struct_passwd:
    """A user of this machine who is not root."""
    for name in _PREFERRED:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    for entry in pwd.getpwall():
        if entry.pw_uid != 0:
            return entry
    raise PermissionError("this machine has no user but root: run the pool as another user")


def _entry(user: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(user)
    except KeyError:
        return None
