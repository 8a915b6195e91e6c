"""Engines that can use a pool: each adapter moves blocks between its engine's memory and the pool, and nothing else."""
