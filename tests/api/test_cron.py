"""Cron schedules as Kubernetes takes them. Both lists were judged by robfig/cron v3.0.1, the parser of its CronJobs."""

import pytest

from kvpool.api.cron import checked_schedule

GOOD = [
    "0 3 * * *", "*/15 * * * *", "0 0 1 1 *", "0 0 1 JAN mon", "5,10 1-5 * * *", "0 0-23/2 ? * ?", "0 0 * * sun-sat",
    "@daily", "@midnight", "@every 1h30m", "59 23 31 12 6", "0 0 29 2 *", "1/5 * * * *", "  0  3  * * * ",
    "0 0 30 2 mon", "0 0 1-31 * *", "0 0 * jan-mar/2 *", "*/100 * * * *",
]  # fmt: skip
BAD = [
    "", "0 3 * *", "0 3 * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * 0 *",
    "* * * * 7", "*/0 * * * *", "5-1 * * * *", "a * * * *", "* * * foo *", "1- * * * *", "-5 * * * *", "@never",
    "@DAILY", "@every", "@every x", "TZ=UTC 0 3 * *", "\u0665 * * * *",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_a_schedule_that_kubernetes_takes_is_kept_as_it_is(text: str) -> None:
    assert checked_schedule(text) == text


@pytest.mark.parametrize("text", BAD)
def test_a_schedule_that_kubernetes_refuses_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must|has the"):
        checked_schedule(text)


@pytest.mark.parametrize("text", ["0 0 30 2 *", "0 0 31 4,6,9,11 *"])
def test_a_day_that_no_such_month_has_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="never happens"):
        checked_schedule(text)


def test_a_day_that_one_of_the_months_has_is_fine() -> None:
    assert checked_schedule("0 0 31 2,3 *")


@pytest.mark.parametrize(("text", "part"), [("61 * * * *", "minute '61'"), ("0 0 * * 7", "day of the week '7'")])
def test_the_message_names_the_field_that_is_wrong(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        checked_schedule(text)
