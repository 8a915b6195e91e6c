"""What a running pool runs with after a reload."""

from kvpool.config import RamConfig, RuntimeConfig, SsdConfig, changes, with_live_changes


def test_fixed_fields_stay_and_live_ones_are_taken() -> None:
    old = RuntimeConfig(name="a", ram=RamConfig(capacity_bytes=1 << 20), ssd=SsdConfig(capacity_bytes=1 << 30))
    new = RuntimeConfig(
        name="a",
        block_tokens=32,
        ram=RamConfig(capacity_bytes=1 << 21, huge_pages=True),
        ssd=SsdConfig(capacity_bytes=1 << 31),
    )
    merged = with_live_changes(old, new)
    assert merged.block_tokens == 64
    assert merged.ram == RamConfig(capacity_bytes=1 << 21)
    assert merged.ssd == SsdConfig(capacity_bytes=1 << 31)
    assert {change.path for change in changes(merged, new)} == {
        change.path for change in changes(old, new) if not change.live
    }


def test_a_tier_that_was_added_or_removed_waits_for_a_restart() -> None:
    without = RuntimeConfig(name="a")
    with_ssd = RuntimeConfig(name="a", ssd=SsdConfig(capacity_bytes=1 << 30))
    assert with_live_changes(without, with_ssd).ssd is None
    assert with_live_changes(with_ssd, without).ssd == with_ssd.ssd
