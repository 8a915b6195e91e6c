"""The clip limits of each model: learnt from its first encoded blocks, kept in the pool's directory, used from then on.

A file is replaced whole, so whatever interrupts a calibration leaves the limits that were there. They are learnt anew,
and used meanwhile as they are, where the configuration asks for another percentile, or for more blocks.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from kvpool.blocks.identity import Fingerprint
from kvpool.blocks.layout import KVLayout
from kvpool.blocks.record import Buffer
from kvpool.codecs import Calibrator, ClipLimits, DamagedLimitsError
from kvpool.errors import IncompatibleDataError, InputError
from kvpool.pool.durable_file import replace_file

DIRECTORY_NAME = "calibration"
NO_CLIPPING = 100.0
"""The percentile that leaves every value as it is."""
_log = logging.getLogger(__name__)


class _Entry:
    """One model's: the limits in force, and the calibration that is under way, if any."""

    def __init__(self, limits: ClipLimits | None, calibrator: Calibrator | None) -> None:
        self.limits = limits
        self.calibrator = calibrator

    def observe(self, payload: Buffer) -> ClipLimits | None:
        """Learn from a block; the new limits, in force from now on, where it was the last one needed."""
        if self.calibrator is None:
            return None
        self.calibrator.observe(payload)
        if not self.calibrator.done:
            return None
        self.limits, self.calibrator = self.calibrator.limits(), None
        return self.limits


class Calibrations:
    """Of all models of a pool. Safe from any thread. Not to be made where `percentile` is `NO_CLIPPING`."""

    def __init__(self, directory: Path, *, samples: int, percentile: float) -> None:
        self._directory = directory / DIRECTORY_NAME
        self._samples = samples
        self._percentile = percentile
        self._entries: dict[Fingerprint, _Entry] = {}
        self._lock = threading.Lock()

    def limits(self, fingerprint: Fingerprint, layout: KVLayout, payload: Buffer) -> ClipLimits | None:
        """Learn from a block that is about to be encoded, if need be; the limits to encode it with, if there are any.

        `payload` is as in `Calibrator.observe`.
        """
        with self._lock:
            entry = self._entries.get(fingerprint)
            if entry is None:
                entry = self._entries[fingerprint] = self._opened(fingerprint, layout)
            learnt = entry.observe(payload)
            limits = entry.limits
        if learnt is not None:  # outside of the lock: a disk that hangs holds up nobody else's encoding
            self._save(fingerprint, learnt)
        return limits

    def forget(self, fingerprint: Fingerprint) -> None:
        """The model was unregistered."""
        with self._lock:
            self._entries.pop(fingerprint, None)
            try:
                self._path(fingerprint).unlink(missing_ok=True)
            except OSError as error:
                _log.warning("clip limits of a model that was unregistered stay: %s", error)

    def _opened(self, fingerprint: Fingerprint, layout: KVLayout) -> _Entry:
        known = self._load(fingerprint, layout)
        calibrator = Calibrator(layout, self._samples, self._percentile)
        if known is not None and known.percentile == self._percentile and known.blocks >= calibrator.samples:
            return _Entry(known, None)
        return _Entry(known, calibrator)

    def _load(self, fingerprint: Fingerprint, layout: KVLayout) -> ClipLimits | None:
        path = self._path(fingerprint)
        try:
            limits = ClipLimits.from_bytes(path.read_bytes())
            limits.check(layout)
        except FileNotFoundError:
            return None
        except (OSError, DamagedLimitsError, IncompatibleDataError, InputError) as error:
            _log.warning("%s: %s; learnt anew", path, error)
            return None
        return limits

    def _save(self, fingerprint: Fingerprint, limits: ClipLimits) -> None:
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            replace_file(self._path(fingerprint), limits.to_bytes())
        except OSError as error:
            _log.warning("clip limits cannot be kept (%s): they are learnt anew after the next start", error)

    def _path(self, fingerprint: Fingerprint) -> Path:
        return self._directory / f"{fingerprint.hex()}.limits"
