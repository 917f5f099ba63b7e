"""Which formulation the state of new streams gets when the user leaves it open."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

from . import backends, devices

_DEVICE = "cuda"
# Of the backends there Triton alone has a kernel for steps over inputs. Asked once, without loading
# it, for torch.compile can trace neither.
_HAS_TRITON = find_spec("triton") is not None
# From this size of a key-value ring on, reading the ring decides the time of a step on a GPU, and
# reading half of it is worth the arithmetic. Predicted from bytes and flops, not measured yet.
_CUDA_RING_BYTES = 64 << 20
# What the Triton kernel covers, and heads, by bytes of a number; where a program has little shared
# memory, 1024 features. In half precision up to so many heads at most two programs of that kernel
# read a stream, where four would ask more of the second-level cache than keys and values ask of the
# memory; and more heads want more arithmetic for a byte than there is. Without the matrix unit, in
# fp32, there is a quarter of it.
_CUDA_MAX_EMBED_DIM = {2: 2048, 4: 1024}
_CUDA_LITTLE_EMBED_DIM = 1024
_CUDA_MAX_HEADS = {2: 32, 4: 8}


def choose(batch_size: int, embed_dim: int, num_heads: int, sequence_len: int, like: Tensor) -> str:
    """``kv`` or ``input`` for self-attention streams of the dtype and device of ``like``."""
    size = like.element_size()
    if like.device.type != _DEVICE or size not in _CUDA_MAX_HEADS:
        return "kv"
    if not _HAS_TRITON or backends.forced() not in (None, "triton"):
        return "kv"
    if devices.why_unfit(like.device):
        return "kv"
    kv_bytes = 2 * batch_size * sequence_len * embed_dim * size
    widest = _CUDA_MAX_EMBED_DIM[size]
    if devices.has_little_memory(like.device):
        widest = _CUDA_LITTLE_EMBED_DIM
    fits = embed_dim <= widest and num_heads <= _CUDA_MAX_HEADS[size]
    return "input" if fits and kv_bytes >= _CUDA_RING_BYTES else "kv"
