"""Ctrl-C may come anywhere; the index's lock must not stay taken, for closing needs it."""

from __future__ import annotations

import signal

from tests.prefix.small import make_index, make_tree, stored, tokens


class InterruptionError(Exception):
    """Raised by the signal's handler, as KeyboardInterrupt is."""


def _interrupt(signum: int, frame: object) -> None:
    raise InterruptionError


def test_an_interrupt_in_a_match_leaves_the_lock_free() -> None:
    index = make_index()
    tree = make_tree(index)
    stored(index, tree, "abcd")
    prompt = tokens("abcd")

    def match_for_ever() -> None:
        while True:
            index.unpin(index.match(tree, prompt, asked=4))

    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        for attempt in range(300):
            interrupted = False
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0002 + attempt * 1e-6)
                match_for_ever()
            except InterruptionError:  # nothing stands between the timer and here, where a slow machine would raise it
                interrupted = True
            assert interrupted
            assert not index.lock.locked()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
