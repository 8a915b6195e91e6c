"""Servers for `managed` tiers on this machine: real ones, started and stopped with the pool."""
