"""How counters are shown."""

from __future__ import annotations

import pytest

from kvpool.cli.output import figure, instant, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1_023, "1023 B"),
        (1_024, "1 KiB"),
        (1_500_000, "1.431 MiB"),
        (160 << 20, "160 MiB"),
        (1 << 40, "1 TiB"),
    ],
)
def test_sizes_are_read_in_binary_units(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (0.081234, "0.08123"), (12.3456, "12.35"), (152_345.6, "152,300")]
)
def test_figures_have_four_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_instants_are_utc() -> None:
    assert instant(0) == "1970-01-01T00:00:00Z"
