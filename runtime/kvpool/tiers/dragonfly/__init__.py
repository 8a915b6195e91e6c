"""Tier 3: records in a server of the Redis protocol that all processes share."""
