"""The package `continual-inference`; a test that uses it where it is not installed is skipped."""

from __future__ import annotations

from typing import Any

import pytest


class _Missing:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks while it collects, and would skip the whole file
            raise AttributeError(name)
        pytest.skip("needs continual-inference")


continual: Any
try:
    import continual
except ImportError:
    continual = _Missing()

__all__ = ["continual"]
