"""Benchmarks: figures of this machine, each beside a probe of the same run. Nothing here is ever a test."""
