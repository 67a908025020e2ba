"""Benchmarks: the published loop as the yardstick, and everything measured against it."""
