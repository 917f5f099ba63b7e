"""Benchmarks: ``python -m bench`` measures, ``python -m bench.report`` writes tables and plots."""

from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
