"""What keeps a tier that fails from holding anybody up, and says what is out.

Pure: clocks and randomness are parameters, and nothing here does I/O.
"""

from kvpool.resilience.breaker import BreakerLimits, BreakerState, CircuitBreaker
from kvpool.resilience.bulkhead import Bulkhead
from kvpool.resilience.degradation import Change, Degradation, Degradations, mode
from kvpool.resilience.retry import FullJitter

__all__ = [
    "BreakerLimits",
    "BreakerState",
    "Bulkhead",
    "Change",
    "CircuitBreaker",
    "Degradation",
    "Degradations",
    "FullJitter",
    "mode",
]
