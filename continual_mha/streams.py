"""The state that a module keeps for its streams: snapshots, resets, single streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, ring
from .ring import InputState, RingState, State

_PARTS = tuple(dict.fromkeys([*RingState._fields[:-1], *InputState._fields[:-1]]))


class StatefulStreams(nn.Module):
    """A module that remembers ``N`` streams from call to call, each at its own position.

    The state follows the module through ``to``, copies and pickles, but is not in its
    ``state_dict``. A module that uses this says what its state looks like by ``_layout``.
    """

    _clock: Tensor | None
    _ring_position: Tensor  # None, as all parts, before the first step

    def _init_streams(self) -> None:
        for name in _PARTS:
            self.register_buffer(f"_ring_{name}", None, persistent=False)
        self._clock = None
        self._rings_are_shared = False  # with a graph, or with whoever set the state

    def _layout(self) -> ring.Layout:
        raise NotImplementedError

    def _layout_of_new(self, batch_size: int, like: Tensor) -> ring.Layout:
        """The layout for streams that begin now."""
        raise NotImplementedError

    def _like(self) -> Tensor:
        """A tensor of the dtype and device that a state must have."""
        raise NotImplementedError

    def get_state(self) -> RingState | InputState | None:
        """A copy of the state, or None before the first step. Later steps do not change it."""
        state = self._state()
        return None if state is None else ring.snapshot(state)

    def set_state(self, state: RingState | InputState | None) -> None:
        """Go on from a copy of ``state``; None is ``clean_state``.

        Raises:
            TypeError: it is not a state of the module's formulation, or a dtype does not fit.
            ValueError: a shape or device does not fit, or the parts contradict each other.
        """
        if state is None:
            self.clean_state()
            return
        like = self._like()
        checked = ring.check_state(state, self._layout(), like.dtype, like.device)
        self._store(ring.snapshot(checked))
        self._rings_are_shared = any(part.requires_grad for part in checked)

    def clean_state(self) -> None:
        """Forget every stream: the next call starts anew, with any batch size."""
        for name in _PARTS:
            setattr(self, f"_ring_{name}", None)
        self._clock = None
        self._rings_are_shared = False

    def detach_state(self) -> None:
        """Cut the state from the graph: gradients stop here (truncated backpropagation)."""
        state = self._state()
        if state is not None:
            self._store(ring.detach(state))

    @property
    def ready(self) -> Tensor | None:
        """Which streams ``(N,)`` have seen ``sequence_len`` tokens, a bool tensor on the device.

        Their rows of the last output are the sliding window's. None before the first step.
        """
        if self._clock is None:
            return None
        return self._ring_position >= self._layout().sequence_len

    def start_streams(self, batch_size: int) -> None:
        """Make room for ``batch_size`` streams that begin when they like, each at position 0.

        From here on ``forward_step`` returns a tensor in every step, and ``ready`` tells which of
        its rows count.

        Raises:
            ValueError: ``batch_size`` is negative.
        """
        if batch_size < 0:
            raise ValueError(f"batch_size must not be negative, but got {batch_size}")
        self.clean_state()
        like = self._like()
        layout = self._layout_of_new(batch_size, like)
        state = ring.new_state(layout, batch_size, like)
        self._store(state._replace(clock=ring.new_clock(layout.sequence_len)))

    def reset(self, streams: Tensor | Sequence[int] | int) -> None:
        """Let some streams start anew, as if they had seen nothing; the others go on.

        Nothing waits for the device, so that it can stand in a CUDA graph if ``streams`` is a mask.

        Args:
            streams: a bool mask ``(N,)`` on the state's device, or indices.

        Raises:
            ValueError: a mask of another shape or device, or an index out of range.
            TypeError: neither a bool mask nor integers.
        """
        state = self._state()
        if state is None:
            return
        mask = checks.stream_mask(streams, state.position)
        in_place = not self._must_copy(state, differentiable=False)
        with torch.no_grad():
            self._store(ring.forget(state, mask, in_place))
        self._mix_ages()

    def get_stream(self, index: int) -> RingState | InputState:
        """A copy of one stream: a state of batch size 1, which ``set_stream`` takes anywhere.

        Raises:
            ValueError: there is no such stream.
        """
        state = self._existing_state()
        checks.check_stream_index(index, state)
        return ring.stream_of(state, index, self._layout().sequence_len)

    def set_stream(self, index: int, stream: RingState | InputState) -> None:
        """Put ``stream``, as ``get_stream`` returned it, in the place of stream ``index``.

        Raises:
            ValueError: there is no such stream, or a shape or device does not fit.
            TypeError: a dtype or the formulation does not fit.
        """
        state = self._existing_state()
        checks.check_stream_index(index, state)
        like = state[0]
        new = ring.check_state(stream, self._layout(), like.dtype, like.device)
        if new.position.shape[0] != 1:
            raise ValueError(f"one stream has batch size 1, but got {new.position.shape[0]}")
        if self._must_copy(state, differentiable=False):
            state = ring.snapshot(ring.detach(state))
            self._rings_are_shared = False
        with torch.no_grad():
            for part, one in zip(state[:-1], new[:-1], strict=True):
                part[index].copy_(one[0])
        self._store(state)
        self._mix_ages()

    def _existing_state(self) -> State:
        state = self._state()
        if state is None:
            raise ValueError("there are no streams yet; take a step or call start_streams first")
        return state

    def _mix_ages(self) -> None:
        """From now on streams may differ in age: every step returns a tensor."""
        length = self._layout().sequence_len
        if self._clock is not None and self._clock.shape[0] != length:
            self._clock = ring.new_clock(length)

    def _state(self) -> State | None:
        if self._clock is None:
            return None
        kind = self._layout().state_type
        parts = (getattr(self, f"_ring_{name}") for name in kind._fields[:-1])
        state: State = kind(*parts, self._clock)
        return state

    def _store(self, state: State) -> None:
        if state.clock is not self._clock:
            self._clock = state.clock
        for name, part in zip(state._fields[:-1], state[:-1], strict=True):
            if part is not getattr(self, f"_ring_{name}"):
                setattr(self, f"_ring_{name}", part)

    def _must_copy(self, state: State, differentiable: bool) -> bool:
        """Whether a graph still needs these rings, or torch forbids to write or save them."""
        if torch.compiler.is_compiling() or not state.position.is_inference():
            return self._rings_are_shared and not differentiable
        return not torch.is_inference_mode_enabled()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which cannot hold a part of a graph."""
        copied: dict[str, Any] = super().__getstate__()
        copied["_buffers"] = {
            n: None if b is None else b.detach() for n, b in self._buffers.items()
        }
        return copied
