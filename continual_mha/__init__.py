"""Continual multi-head attention: one query over a stream's last tokens, one token at a time."""

from . import backends
from .attention import SingleOutputMultiheadAttention
from .backends import use_backend
from .modes import call_mode
from .ring import RingState

__version__ = "0.1.0"

__all__ = [
    "RingState",
    "SingleOutputMultiheadAttention",
    "__version__",
    "backends",
    "call_mode",
    "use_backend",
]
