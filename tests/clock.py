"""Time that passes when a test says so."""

from dataclasses import dataclass


@dataclass
class Clock:
    """Reads as `now_s`, in seconds."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s
