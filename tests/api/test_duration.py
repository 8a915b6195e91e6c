"""Durations as Go reads and prints them. The golden pairs were made by Go 1.26's time package."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvpool.api.duration import Duration

CANONICAL = {
    "0": "0s", "0s": "0s", "-0s": "0s", "1ns": "1ns", "999ns": "999ns", "1us": "1µs", "1µs": "1µs", "1\u03bcs": "1µs",
    "1500ns": "1.5µs", "1ms": "1ms", "1.5ms": "1.5ms", "50ms": "50ms", "100ms": "100ms", "999ms": "999ms", "1s": "1s",
    "1.5s": "1.5s", "1.05s": "1.05s", ".5s": "500ms", "5.s": "5s", "+5s": "5s", "59s": "59s", "60s": "1m0s",
    "61s": "1m1s", "90s": "1m30s", "1m": "1m0s", "10m": "10m0s", "60m": "1h0m0s", "90m": "1h30m0s", "2h": "2h0m0s",
    "1h30m": "1h30m0s", "1.5h": "1h30m0s", "24h": "24h0m0s", "168h": "168h0m0s", "1h1s": "1h0m1s", "1h0m5s": "1h0m5s",
    "1h1h": "2h0m0s", "1s1h": "1h0m1s", "1m1ms": "1m0.001s", "1m0.000000001s": "1m0.000000001s", "-1h": "-1h0m0s",
    "-1.5s": "-1.5s", "2540400h10m10s": "2540400h10m10s",
}  # fmt: skip
NOT_DURATIONS = [
    "", "h", "5", "1.5", "2 h", "2h ", "2h\n", "1d", "1w", "2H", "-", "1h-5m", ".s", "1e3s", "5sec", "\u0665s", "00",
]  # fmt: skip
SHORT = {"2h": "2h", "1h30m": "1h30m", "1h0m5s": "1h0m5s", "90s": "1m30s", "10m": "10m", "0s": "0s", "100s": "1m40s",
         "10s": "10s", "20m": "20m", "10h10m": "10h10m", "50ms": "50ms"}  # fmt: skip

durations = st.builds(Duration, st.integers(-(1 << 63) + 1, (1 << 63) - 1))


@pytest.mark.parametrize(("written", "canonical"), CANONICAL.items())
def test_the_canonical_form_is_that_of_go(written: str, canonical: str) -> None:
    assert str(Duration.parse(written)) == canonical


@pytest.mark.parametrize("text", NOT_DURATIONS)
def test_what_go_does_not_read_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="1h30m"):
        Duration.parse(text)


@pytest.mark.parametrize("text", ["0.5ns", "1.00000000001s", "2562048h", "9223372036854775808ns"])
def test_what_does_not_fit_whole_nanoseconds_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"1ns|2\^63-1"):
        Duration.parse(text)


@pytest.mark.parametrize(("written", "short"), SHORT.items())
def test_the_short_form_leaves_out_zeros_at_the_end(written: str, short: str) -> None:
    assert Duration.parse(written).short == short


@given(durations)
@example(Duration(-(1 << 63) + 1))
@example(Duration((1 << 63) - 1))
def test_both_forms_read_back_as_the_same_duration(duration: Duration) -> None:
    assert Duration.parse(str(duration)) == duration
    assert Duration.parse(duration.short) == duration


@given(st.integers(0, 10**12))
def test_seconds_give_back_the_same_duration_up_to_days(microseconds: int) -> None:
    duration = Duration(microseconds * 1000)
    assert Duration.of_seconds(duration.seconds) == duration
