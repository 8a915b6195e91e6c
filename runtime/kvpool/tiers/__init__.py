"""Places where blocks lie. Tiers never import each other."""
