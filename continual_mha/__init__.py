"""Continual multi-head attention: one query over a stream's last tokens, one token at a time."""

from . import backends
from .attention import SingleOutputMultiheadAttention
from .backends import use_backend
from .explain import explain
from .graphs import GraphedStep
from .modes import active_streams, call_mode
from .pool import PoolFull, QueueFull, Statistics, StreamPool, UnknownStream
from .ring import InputState, QuantizedInputState, QuantizedRingState, RingState
from .storage import (
    export_state,
    export_stream,
    import_state,
    import_stream,
    load_stream,
    load_streams,
    save_stream,
    save_streams,
    states_from_bytes,
    states_to_bytes,
    stream_from_bytes,
    stream_to_bytes,
)

__version__ = "0.1.0"

__all__ = [
    "GraphedStep",
    "InputState",
    "PoolFull",
    "QuantizedInputState",
    "QuantizedRingState",
    "QueueFull",
    "RingState",
    "SingleOutputMultiheadAttention",
    "Statistics",
    "StreamPool",
    "UnknownStream",
    "__version__",
    "active_streams",
    "backends",
    "call_mode",
    "explain",
    "export_state",
    "export_stream",
    "import_state",
    "import_stream",
    "load_stream",
    "load_streams",
    "save_stream",
    "save_streams",
    "states_from_bytes",
    "states_to_bytes",
    "stream_from_bytes",
    "stream_to_bytes",
    "use_backend",
]
