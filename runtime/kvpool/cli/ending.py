"""How a command that runs until it is told to end waits for that: signals may come at any instant of a wait.

`threading.Event` is not for this: a handler that sets one while the thread that it has interrupted is on the way into
`wait` waits for a lock which this very thread holds. And a handler in Python runs only once a system call has returned,
so one that a signal precedes by a hair would wait in full: the pipe below is written to by the signal itself.
"""

import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType


class Ending:
    """Whether it is time to end. Made by `told_by`; for the main thread, which signals interrupt."""

    def __init__(self, woken: int) -> None:
        self._woken = woken
        self._told = False

    def wait(self, timeout_s: float) -> bool:
        """Wait until it is time, for so long at most; whether it is."""
        until_s = time.monotonic() + timeout_s
        while not self._told:
            ready, _, _ = select.select([self._woken], [], [], max(0.0, until_s - time.monotonic()))
            if not ready:
                break
            if not self._told:
                os.read(self._woken, 4096)  # by another signal than ours
        return self._told

    def tell(self, signum: int, frame: FrameType | None) -> None:
        """It is time: the handler of the signals."""
        self._told = True


@contextmanager
def told_by(signals: Sequence[signal.Signals]) -> Iterator[Ending]:
    """Within it, these signals say that it is time to end, and do nothing else."""
    woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    ending = Ending(woken)
    waking_before = signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
    before = {signum: signal.signal(signum, ending.tell) for signum in signals}
    try:
        yield ending
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(waking_before)
        os.close(woken)
        os.close(waking)
