"""Tier 5: sealed records in segment files on a local disk. `tier.SsdTier` is its face; the rest is its own."""
