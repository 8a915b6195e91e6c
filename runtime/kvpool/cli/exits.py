"""How the command ends: exit codes, and the one line that says what went wrong. The only place that prints errors."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from kvpool.errors import ConfigError, DirectoryInUseError, InputError, KvpoolError


class ExitCode(IntEnum):
    """What a script can tell an outcome by."""

    OK = 0
    FAILED = 1
    """What was asked for could not be done."""
    USAGE = 2
    """The command line, a configuration or an input file is not right."""
    IN_USE = 3
    """Another process holds the pool's directory."""
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


def code_of(error: KvpoolError) -> ExitCode:
    """The exit code for what the library raised."""
    if isinstance(error, DirectoryInUseError):
        return ExitCode.IN_USE
    return ExitCode.USAGE if isinstance(error, ConfigError | InputError) else ExitCode.FAILED


def ended(command: Callable[[], int]) -> int:
    """Run the command; its exit code, after any error of the library was printed in a line."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = command()
        sys.stdout.flush()
    except KvpoolError as error:
        complain(str(error))
        return code_of(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that flushing at exit finds no error
        return ExitCode.PIPE_CLOSED
    return code


def complain(message: str) -> None:
    """Print a line for each that is wrong; `ConfigError` names several faults at once."""
    for line in message.splitlines():
        print(f"kvpool: {line}", file=sys.stderr)


def _terminate(signum: int, frame: object) -> NoReturn:
    """SIGTERM ends a command as Ctrl-C does: what it has open is closed, temporary files are removed."""
    raise SystemExit(ExitCode.TERMINATED)
