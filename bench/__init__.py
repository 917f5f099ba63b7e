"""Benchmarks: ``python -m bench`` measures, ``python -m bench.report`` writes tables and plots."""
