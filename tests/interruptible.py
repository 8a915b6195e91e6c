"""Lets what a test starts be interrupted wherever the tests run."""

import signal


def interruptible() -> None:
    """For `Popen`'s `preexec_fn`: what a shell starts in the background ignores SIGINT, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
