"""The state of a continual attention: circular caches, positions, and the host's clock.

A *ring* is the circular cache of one stream: the token at position ``p`` lives in slot
``p % sequence_len`` and stays there until the token ``sequence_len`` steps later overwrites it.
Softmax over one query does not depend on the order of the slots, so nothing is ever shifted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from .pages import zeros
from .quantized import STORED_AS
from .tracing import has_numbers, how_stored, is_opaque, is_plain, is_transformed

# A state set from outside may not be older than this: kernels find slots by positions and trust
# them not to pass 2**63 - 1, for which it leaves years of steps to every stream.
_OLDEST = (1 << 63) - (1 << 48)


class RingState(NamedTuple):
    """State of ``N`` streams in the formulation ``kv``: projected keys and values are kept.

    Attributes:
        k: projected keys, ``(N, H, L, D)``, slot ``p % L`` holds the token at position ``p``.
        v: projected values, ``(N, H, L, D)``, laid out as ``k``.
        q: projected queries that wait for their output, ``(N, R, E)``, with ``R = delay + 1``,
            or ``R = 0`` when there is no delay; slot ``p % R``.
        position: tokens that each stream has seen since its reset, ``(N,)``, int64, on the device.
        clock: ``(steps, 0)``, a CPU tensor of no bytes. Its first size counts the steps that all
            streams have taken together, up to ``L``; it is ``L`` as soon as they may differ. The
            host reads it without waiting for the device, and ``torch.compile`` treats a size as
            dynamic where it would specialise on an integer and recompile in every step.
    """

    k: Tensor
    v: Tensor
    q: Tensor
    position: Tensor
    clock: Tensor


class InputState(NamedTuple):
    """State of ``N`` streams in the formulation ``input``: the tokens themselves are kept.

    Attributes:
        x: tokens, ``(N, L, E)``, slot ``p % L`` holds the token at position ``p``.
        position: as in ``RingState``.
        clock: as in ``RingState``.
    """

    x: Tensor
    position: Tensor
    clock: Tensor


class QuantizedRingState(NamedTuple):
    """``RingState`` with keys and values of 8 bits, for ``cache_dtype``.

    Attributes:
        k: quantised keys, ``(N, H, L, D)``: int8, or uint8 for the bits of float8_e4m3fn.
        v: quantised values, laid out as ``k``.
        k_scale: what to multiply the keys by, ``(N, H, L, 1)``, fp32.
        v_scale: the same for the values.
        q: as in ``RingState``, not quantised.
        position: as in ``RingState``.
        clock: as in ``RingState``.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    q: Tensor
    position: Tensor
    clock: Tensor


class QuantizedInputState(NamedTuple):
    """``InputState`` with tokens of 8 bits, for ``cache_dtype``.

    Attributes:
        x: quantised tokens, ``(N, L, E)``: int8, or uint8 for the bits of float8_e4m3fn.
        x_scale: what to multiply them by, ``(N, L, 1)``, fp32.
        position: as in ``RingState``.
        clock: as in ``RingState``.
    """

    x: Tensor
    x_scale: Tensor
    position: Tensor
    clock: Tensor


State = RingState | InputState | QuantizedRingState | QuantizedInputState
INPUT_STATES = (InputState, QuantizedInputState)
# so that torch.load reads saved states as it is called by default, with weights_only=True
torch.serialization.add_safe_globals(list(get_args(State)))


class Layout(NamedTuple):
    """What fixes the shape of a state: everything but batch, dtype and device."""

    formulation: str  # "kv" or "input"
    num_heads: int
    head_dim: int
    sequence_len: int
    delay: int
    cache_dtype: torch.dtype | None = None

    def state_type(self) -> Any:
        """The class of the states laid out so.

        No property, for torch.compile of torch 2.10 could not call what that gives.
        """
        if self.cache_dtype is not None:
            return QuantizedInputState if self.formulation == "input" else QuantizedRingState
        return InputState if self.formulation == "input" else RingState

    def sizes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Shape of every part of a state of ``batch_size`` streams, the clock aside."""
        embed_dim = self.num_heads * self.head_dim
        x = (batch_size, self.sequence_len, embed_dim)
        kv = (batch_size, self.num_heads, self.sequence_len, self.head_dim)
        shapes = {
            "x": x,
            "x_scale": (*x[:-1], 1),
            "k": kv,
            "v": kv,
            "k_scale": (*kv[:-1], 1),
            "v_scale": (*kv[:-1], 1),
            "q": (batch_size, self.delay + 1 if self.delay else 0, embed_dim),
            "position": (batch_size,),
        }
        return {name: shapes[name] for name in self.state_type()._fields[:-1]}

    def dtype(self, part: str, tokens: torch.dtype) -> torch.dtype:
        """That of the part of a state called so, if the tokens are of dtype ``tokens``."""
        if part == "position":
            return torch.int64
        if self.cache_dtype is None or part == "q":
            return tokens
        return torch.float32 if part.endswith("_scale") else STORED_AS[self.cache_dtype]


def rings(state: State) -> tuple[Tensor, ...]:
    """The circular caches of a state; the slots are the last axis but one."""
    return tuple(state[:-2])


def new_clock(steps: int) -> Tensor:
    """A clock that reads ``steps``."""
    return torch.empty((steps, 0), device="cpu")


def new_state(layout: Layout, batch_size: int, like: Tensor) -> State:
    """The state of streams that have seen nothing: zero rings, dtype and device as ``like``."""
    parts = [
        zeros(size, layout.dtype(name, like.dtype), like.device)
        for name, size in layout.sizes(batch_size).items()
    ]
    state: State = layout.state_type()(*parts, new_clock(0))
    return state


def like_tokens(state: State) -> Tensor | None:
    """A part of a state that has the dtype of the tokens; None where there is none."""
    if isinstance(state, QuantizedInputState):
        return None
    return state.q if isinstance(state, QuantizedRingState) else state[0]


def rebuilt(state: State, parts: Iterable[Tensor], clock: Tensor | None = None) -> Any:
    """A state of the same kind from other rings and positions, and the clock if it changed."""
    kind: Any = type(state)
    return kind(*parts, state.clock if clock is None else clock)


def snapshot(state: State) -> Any:
    """A copy that later steps do not change, zero in the slots that a stream has not filled.

    Differentiable. The unfilled slots of a stream that was reset hold what was its former owner's.
    """
    copies = []
    for part in rings(state):
        unfilled = torch.arange(part.shape[-2], device=part.device) >= state.position[:, None]
        copies.append(part.masked_fill(_over_slots(unfilled, part), 0))
    return rebuilt(state, [*copies, state.position.clone()])


def _over_slots(mask: Tensor, part: Tensor) -> Tensor:
    """A mask ``(N, slots)`` shaped to broadcast against a ring."""
    return mask.view(mask.shape[0], *(1,) * (part.dim() - 3), mask.shape[1], 1)


def detach(state: State) -> Any:
    """The same memory, cut from the graph that made it."""
    follows = is_transformed()  # which ``requires_grad`` need not tell
    parts = (x.detach() if follows or x.requires_grad else x for x in state[:-1])
    return rebuilt(state, parts)


def forget(state: State, streams: Tensor, in_place: bool) -> Any:
    """The state after ``streams``, ``(N,)`` bool, were reset.

    A position of 0 hides keys and values. Waiting queries and inputs are cleared too, for they may
    be used before the stream itself has filled their slots; so are the scales of inputs, which may
    be NaN.
    """
    cleared = {"q", "x", "x_scale"} & set(state._fields)
    fill = torch.Tensor.masked_fill_ if in_place else torch.Tensor.masked_fill
    parts = {}
    if in_place and _tells_which(streams):  # a mask would go through the rings of all streams
        which = streams.nonzero().view(-1)
        parts = {name: getattr(state, name).index_fill_(0, which, 0) for name in cleared}
        cleared = set()
    for name in cleared:
        part = getattr(state, name)
        parts[name] = fill(part, streams.view(-1, *(1,) * (part.dim() - 1)), 0)
    return state._replace(**parts, position=fill(state.position, streams, 0))


def _tells_which(streams: Tensor) -> bool:
    """Whether a mask can be read: it waits for no device, and has numbers."""
    return streams.device.type == "cpu" and not (is_opaque(streams) or is_transformed())


def stream_of(state: State, index: int, sequence_len: int) -> Any:
    """A copy of one stream, as a state of batch size 1 with nothing in it but what it has seen."""
    copy = snapshot(detach(_row(state, index)))
    position = int(copy.position)
    for part in rings(copy):
        if part.shape[-2]:  # the next token overwrites this slot before anyone reads it
            part[..., position % part.shape[-2], :] = 0
    return copy._replace(clock=new_clock(min(position, sequence_len)))


def _row(state: State, index: int) -> Any:
    """The part of a state that is one stream's, in the same memory."""
    return rebuilt(state, (part[index : index + 1] for part in state[:-1]))


def row_of(state: State, index: int) -> Any:
    """A copy of all that lies in the place ``index``, for ``put_stream_`` to put back."""
    row: State = _row(detach(state), index)
    return rebuilt(row, (part.clone() for part in row[:-1]))


def put_stream_(state: State, index: int, stream: State) -> None:
    """Write a state of one stream to the place ``index``."""
    for part, new in zip(state[:-1], stream[:-1], strict=True):
        part[index].copy_(new[0])


def check_state(
    state: object, layout: Layout, dtypes: set[torch.dtype], device: torch.device
) -> Any:
    """``check_parts``, and that clock and positions agree, which waits for the device.

    Raises:
        TypeError: it is not a state of that formulation, or a dtype differs.
        ValueError: a shape or device differs, or clock and positions contradict each other.
    """
    checked = check_parts(state, layout, dtypes, device)
    _check_clock(checked, layout.sequence_len)
    return checked._replace(clock=new_clock(checked.clock.shape[0]))  # of which only that counts


def check_parts(
    state: object, layout: Layout, dtypes: set[torch.dtype], device: torch.device
) -> Any:
    """``state`` as the class that ``layout`` asks for, in one of ``dtypes``, if its parts fit.

    Raises:
        TypeError: it is not a state of that formulation, or a dtype differs.
        ValueError: a shape or device differs.
    """
    expected = layout.state_type()
    if not isinstance(state, (tuple, list)) or len(state) != len(expected._fields):
        raise TypeError(
            f"with formulation={layout.formulation!r} a state is ({', '.join(expected._fields)}), "
            f"but got {_describe(state)}"
        )
    for name, part in zip(expected._fields, state, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(f"state.{name} must be a tensor, but got {type(part).__name__}")
        if not is_plain(part):
            kind = how_stored(part)
            raise TypeError(f"state.{name} must be a plain dense tensor, but got {kind}")
    checked: State = expected(*state)
    if checked.position.dim() != 1:
        shape = tuple(checked.position.shape)
        raise ValueError(f"state.position must have shape (N,), but got {shape}")
    _check_rings(checked, layout, dtypes, device)
    shape = tuple(checked.clock.shape)
    if len(shape) != 2 or shape[1] != 0 or shape[0] > layout.sequence_len:
        most = f"(steps, 0) with steps <= {layout.sequence_len}"
        raise ValueError(f"state.clock must have shape {most}, but got {shape}")
    return checked


def _describe(state: object) -> str:
    kind = type(state).__name__
    return f"a {kind} of {len(state)}" if isinstance(state, (tuple, list)) else f"a {kind}"


def _check_rings(
    state: State, layout: Layout, dtypes: set[torch.dtype], device: torch.device
) -> None:
    like = like_tokens(state)
    dtypes = {like.dtype} if like is not None and like.dtype in dtypes else dtypes
    for name, size in layout.sizes(state.position.shape[0]).items():
        part = getattr(state, name)
        if tuple(part.shape) != size:
            raise ValueError(f"state.{name} must have shape {size}, but got {tuple(part.shape)}")
        allowed = {layout.dtype(name, dtype) for dtype in dtypes}
        if part.dtype not in allowed:
            expected = " or ".join(sorted(map(str, allowed)))
            raise TypeError(f"state.{name} must be {expected}, but got {part.dtype}")
        if part.device != device:
            raise ValueError(f"state.{name} must be on {device}, but is on {part.device}")


def _check_clock(state: State, sequence_len: int) -> None:
    position = state.position
    if not position.numel() or not has_numbers(position):
        return
    least, most = int(position.min()), int(position.max())
    if least < 0:
        raise ValueError(f"state.position must not be negative, but its least is {least}")
    if most > _OLDEST:
        raise ValueError(
            f"state.position must be at most 2**63 - 2**48, but its greatest is {most}"
        )
    steps = state.clock.shape[0]
    if steps < sequence_len and (least, most) != (steps, steps):
        raise ValueError(
            f"state.clock says that every stream has seen {steps} tokens, but state.position "
            f"ranges from {least} to {most}"
        )
