"""The state of a continual attention: circular caches, positions, and the host's clock.

A *ring* is the circular cache of one stream: the token at position ``p`` lives in slot
``p % sequence_len`` and stays there until the token ``sequence_len`` steps later overwrites it.
Softmax over one query does not depend on the order of the slots, so nothing is ever shifted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RingState(NamedTuple):
    """State of ``N`` streams; what ``get_state`` returns and ``set_state`` takes.

    Attributes:
        k: projected keys, ``(N, H, L, D)``, slot ``p % L`` holds the token at position ``p``.
        v: projected values, ``(N, H, L, D)``, laid out as ``k``.
        q: projected queries that wait for their output, ``(N, R, E)``, with ``R = delay + 1``,
            or ``R = 0`` when there is no delay; slot ``p % R``.
        position: tokens that each stream has seen since its reset, ``(N,)``, int64, on the device.
        clock: ``(steps, 0)``, a CPU tensor of no bytes. Its first size counts the steps that all
            streams have taken together, up to ``L``. The host reads it without waiting for the
            device, and ``torch.compile`` treats a size as dynamic where it would specialise on
            an integer and recompile in every step.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    position: Tensor
    clock: Tensor


class RingShape(NamedTuple):
    """The sizes that fix a state's layout: everything but batch, dtype and device."""

    num_heads: int
    head_dim: int
    sequence_len: int
    delay: int

    def sizes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Shape of every part of a state of ``batch_size`` streams, the clock aside."""
        kv = (batch_size, self.num_heads, self.sequence_len, self.head_dim)
        queries = self.delay + 1 if self.delay else 0
        q = (batch_size, queries, self.num_heads * self.head_dim)
        return {"k": kv, "v": kv, "q": q, "position": (batch_size,)}


def new_clock(steps: int) -> Tensor:
    """A clock that reads ``steps``."""
    return torch.empty((steps, 0), device="cpu")


def new_state(
    shape: RingShape, batch_size: int, dtype: torch.dtype, device: torch.device
) -> RingState:
    """The state of ``batch_size`` streams that have seen nothing; rings are zero."""
    sizes = shape.sizes(batch_size)
    parts = {name: torch.zeros(sizes[name], dtype=dtype, device=device) for name in ("k", "v", "q")}
    position = torch.zeros(sizes["position"], dtype=torch.int64, device=device)
    return RingState(**parts, position=position, clock=new_clock(0))


def clone_state(state: RingState) -> RingState:
    """A copy that later steps in place do not change. Differentiable."""
    return RingState(
        state.k.clone(), state.v.clone(), state.q.clone(), state.position.clone(), state.clock
    )


def detach_state(state: RingState) -> RingState:
    """The same tensors, cut from the graph that made them."""
    return RingState(*(part.detach() for part in state))


def check_state(
    state: object, shape: RingShape, dtype: torch.dtype, device: torch.device
) -> RingState:
    """``state`` as a ``RingState``, if it fits ``shape``, ``dtype`` and ``device``.

    Raises:
        TypeError: it is not five tensors, or a dtype differs.
        ValueError: a shape or device differs, or clock and positions contradict each other.
    """
    if not isinstance(state, (tuple, list)) or len(state) != len(RingState._fields):
        what = f"a {type(state).__name__}" + (
            f" of {len(state)}" if isinstance(state, (tuple, list)) else ""
        )
        raise TypeError(
            f"a state is a RingState of {len(RingState._fields)} tensors, but got {what}"
        )
    for name, part in zip(RingState._fields, state, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"state.{name} must be a tensor, but got {type(part).__name__}")
    ring = RingState(*state)
    if ring.position.dim() != 1:
        raise ValueError(
            f"state.position must have shape (N,), but got {tuple(ring.position.shape)}"
        )
    _check_parts(ring, shape, dtype, device)
    _check_clock(ring, shape.sequence_len)
    return ring


def _check_parts(
    ring: RingState, shape: RingShape, dtype: torch.dtype, device: torch.device
) -> None:
    for name, size in shape.sizes(ring.position.shape[0]).items():
        part = getattr(ring, name)
        if tuple(part.shape) != size:
            raise ValueError(f"state.{name} must have shape {size}, but got {tuple(part.shape)}")
        expected = torch.int64 if name == "position" else dtype
        if part.dtype != expected:
            raise TypeError(f"state.{name} must be {expected}, but got {part.dtype}")
        if part.device != device:
            raise ValueError(f"state.{name} must be on {device}, but is on {part.device}")


def _check_clock(ring: RingState, sequence_len: int) -> None:
    clock = ring.clock
    if clock.dim() != 2 or clock.shape[1] != 0 or clock.shape[0] > sequence_len:
        expected = f"(steps, 0) with steps <= {sequence_len}"
        raise ValueError(f"state.clock must have shape {expected}, but got {tuple(clock.shape)}")
    if ring.position.numel() and int(ring.position.min()) < 0:
        raise ValueError(
            f"state.position must not be negative, but its least is {int(ring.position.min())}"
        )
    steps = clock.shape[0]
    if steps < sequence_len and ring.position.numel() and bool((ring.position != steps).any()):
        raise ValueError(
            f"state.clock says that every stream has seen {steps} tokens, but state.position "
            f"ranges from {int(ring.position.min())} to {int(ring.position.max())}"
        )
