"""Continual multi-head attention: one query over a stream's last tokens, one token at a time."""

from . import backends
from .attention import SingleOutputMultiheadAttention
from .backends import use_backend
from .explain import explain
from .graphs import GraphedStep
from .modes import active_streams, call_mode
from .ring import InputState, RingState

__version__ = "0.1.0"

__all__ = [
    "GraphedStep",
    "InputState",
    "RingState",
    "SingleOutputMultiheadAttention",
    "__version__",
    "active_streams",
    "backends",
    "call_mode",
    "explain",
    "use_backend",
]
