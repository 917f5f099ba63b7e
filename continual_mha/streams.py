"""The state that a module keeps for its streams: snapshots, resets, single streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from . import checks, functional, reference, ring
from .repeat import Found, Repeat
from .ring import State
from .tracing import has_numbers, is_transformed, makes_onnx, makes_program

# Of tokens under autocast, and so of a state that was made from them.
AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS: tuple[Any, ...] = get_args(State)
_BUFFERS: dict[type, list[str]] = {
    kind: [f"_ring_{name}" for name in kind._fields[:-1]] for kind in _KINDS
}
_ALL_BUFFERS = tuple(dict.fromkeys(name for names in _BUFFERS.values() for name in names))
_SCALES = ("_ring_k_scale", "_ring_v_scale", "_ring_x_scale")
# Buffers that were pickled for a process that begins, for as long as it is known.
_SENT: WeakKeyDictionary[Any, list[dict[str, Tensor | None]]] = WeakKeyDictionary()


class Mark(NamedTuple):
    """Where a module's streams are, to return to if what comes next does not complete.

    Attributes:
        state: the module's own tensors, not copies; None before the first step.
        shared: whether someone else needs them as they are, so that nobody writes to them.
        position: a copy of the positions, or None where the clock tells them.
        slots: rings, each with a copy of the slots that will be overwritten and are still needed,
            which are all from the second on: the first holds nothing that the next token sees.
    """

    state: State | None
    shared: bool
    position: Tensor | None = None
    slots: Sequence[tuple[Tensor, Tensor]] = ()


class OrAsBefore:
    """Inside the block modules' streams change or, if something raises, return to these marks.

    No generator does it: one that a signal leaves suspended goes on whenever it is dropped, and
    would undo then what was done since.
    """

    def __init__(self, *marked: tuple[StatefulStreams, Mark]) -> None:
        self._marked = marked

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if kind is not None:
            for module, mark in self._marked:
                module.return_to(mark)


def all_or_as_before(modules: Sequence[StatefulStreams]) -> OrAsBefore:
    """A block in which the streams of all modules change or, if something raises, those of none.

    That is for what puts new states in the place of theirs, and at most takes steps from those.
    """
    return OrAsBefore(*((module, module.mark()) for module in modules))


class StatefulStreams(nn.Module):
    """A module that remembers ``N`` streams from call to call, each at its own position.

    The state follows the module through ``to``, copies and pickles, but is not in its
    ``state_dict``. A module that uses this says what its state looks like by ``_layout``.
    """

    _state_types: tuple[Any, ...]  # of a state with keys and values, and of one with inputs
    _clock: Tensor | None
    _repeat: Repeat | None  # how the next step goes if nothing changes; keeps the state alive
    _many_repeat: Repeat | None  # the same for many tokens at once
    _clip_repeats: dict[Any, Repeat]  # the same of clips, by what is to be returned
    _last_shapes: dict[Any, Any]  # of what was last decided, by the kind of call
    _ring_position: Tensor  # None, as all parts, before the first step

    def _init_streams(self) -> None:
        """Keep no streams yet."""
        for name in _ALL_BUFFERS:
            self.register_buffer(name, None, persistent=False)
        self._clock = None
        self._begins_in_program = False  # that torch.export or torch.jit.trace makes
        self._forget_calls()
        self._rings_are_shared = False  # with a graph, or with whoever set the state

    def _forget_calls(self) -> None:
        """Decide all calls anew."""
        self._repeat, self._many_repeat = None, None
        self._clip_repeats, self._last_shapes = {}, {}

    def _comes_again(self, kind: Any, given: Sequence[Tensor]) -> bool:
        """Whether the last call of this kind that was decided had such tensors too.

        Only then it pays to keep how: clips of changing lengths would be kept in vain, and so would
        all that is traced or transformed.
        """
        if is_transformed():
            return False
        now = ([x.shape for x in given], torch.is_grad_enabled())
        before = self._last_shapes.get(kind)
        self._last_shapes[kind] = now
        return bool(before == now)

    def _layout(self) -> ring.Layout:
        raise NotImplementedError

    def _layout_of_new(self, batch_size: int, like: Tensor) -> ring.Layout:
        """The layout for streams that begin now."""
        raise NotImplementedError

    def _layout_of_given(self, state: object) -> ring.Layout:
        """The layout that ``state`` must have for all streams to go on from it."""
        raise NotImplementedError

    def _like(self) -> Tensor:
        """A tensor of the dtype and device that a state must have."""
        raise NotImplementedError

    def get_state(self) -> State | None:
        """A copy of the state, or None before the first step. Later steps do not change it."""
        state = self._state()
        return None if state is None else ring.snapshot(state)

    def set_state(self, state: State | None) -> None:
        """Go on from a copy of ``state``; None is ``clean_state``.

        A module of ``formulation="auto"`` takes a state of either, and goes on in that.

        Raises:
            TypeError: it is not a state of the module's formulation, or a dtype does not fit.
            ValueError: a shape or device does not fit, or the parts contradict each other.
        """
        if state is None:
            self.clean_state()
            return
        checked = self._checked(state)
        copy = ring.snapshot(checked)
        with OrAsBefore((self, self._mark_before(0))):
            self._store(copy)
            self._rings_are_shared = any(part.requires_grad for part in checked)

    def clean_state(self) -> None:
        """Forget every stream: the next call starts anew, with any batch size."""
        self._clock = None  # first: without it there is no state, whatever is left of one
        for name in _ALL_BUFFERS:
            setattr(self, name, None)
        self._begins_in_program = makes_program()
        self._repeat = self._many_repeat = None
        self._rings_are_shared = False

    def detach_state(self) -> None:
        """Cut the state from the graph: gradients stop here (truncated backpropagation)."""
        state = self._state()
        if state is not None:
            again = None if torch.compiler.is_compiling() else self._repeat
            self._store(ring.detach(state))
            if again is not None:  # it looks for itself which parts it goes on from
                self._repeat = again

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
            TypeError: it is not an integer.
        """
        checks.check_batch_size(batch_size)
        with OrAsBefore((self, self._mark_before(0))):
            self.clean_state()
            like = self._like()
            layout = self._layout_of_new(batch_size, like)
            state = ring.new_state(layout, batch_size, like)
            self._store(state._replace(clock=ring.new_clock(layout.sequence_len)))

    def reset(self, streams: Tensor | Sequence[int] | int) -> None:
        """Let some streams start anew, as if they had seen nothing; the others go on.

        Nothing waits for the device, so that it can stand in a CUDA graph if ``streams`` is a mask.
        Interrupted half-way, it is completed before the exception goes on.

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
        try:
            self._forget(state, mask)
        except BaseException:
            if not torch.compiler.is_compiling():
                self._forget(state, mask)
            raise

    def _forget(self, state: State, streams: Tensor) -> None:
        in_place = not self._must_copy(state, differentiable=False)
        with torch.set_grad_enabled(not in_place):  # a graph goes on for the streams that do
            self._store(ring.forget(state, streams, in_place))
        self._mix_ages()

    def get_stream(self, index: int) -> State:
        """A copy of one stream: a state of batch size 1, which ``set_stream`` takes anywhere.

        Raises:
            ValueError: there is no such stream.
            TypeError: ``index`` is not an integer.
        """
        state = self._existing_state()
        checks.check_stream_index(index, state)
        return ring.stream_of(state, index, self._layout().sequence_len)

    def set_stream(self, index: int, state: State) -> None:
        """Put ``state``, as ``get_stream`` returned it, in the place of stream ``index``.

        All streams are cut from the graph, as by ``detach_state``.

        Raises:
            ValueError: there is no such stream, or a shape or device does not fit.
            TypeError: a dtype or the formulation does not fit, or ``index`` is not an integer.
        """
        existing = self._existing_state()
        checks.check_stream_index(index, existing)
        new = self._checked(state, joins=True)
        if new.position.shape[0] != 1:
            raise ValueError(f"one stream has batch size 1, but got {new.position.shape[0]}")
        new = ring.snapshot(ring.detach(new))
        if self._must_copy(existing, differentiable=False):
            existing = ring.snapshot(ring.detach(existing))
        mark, before = self._mark_before(0), ring.row_of(existing, index)
        try:
            with torch.no_grad():
                ring.put_stream_(existing, index, new)
                self._store(existing)
                self._mix_ages()
                self._rings_are_shared = False
        except BaseException:
            self.return_to(mark)
            with torch.no_grad():
                ring.put_stream_(existing, index, before)
            raise

    def mark(self) -> Mark:
        """What ``return_to`` needs to undo the next ``forward_step``; a copy of the positions.

        A step that fails is undone by the module itself. This is for models of several modules, of
        which some have stepped when another fails.
        """
        state = self._state()
        if state is None:
            return Mark(None, False)
        return Mark(state, self._rings_are_shared, state.position.clone())

    def return_to(self, mark: Mark) -> None:
        """Undo what happened since ``mark``: nothing, or one ``forward_step``.

        Raises:
            TypeError: ``mark`` is not what ``mark()`` returned.
        """
        if not isinstance(mark, Mark):
            raise TypeError(f"return_to takes what mark() returned, but got {type(mark).__name__}")
        if mark.state is None:
            self.clean_state()
            return
        state = mark.state
        self._assign(state)
        # a graph may hold them, also that of a step which is undone
        self._rings_are_shared = self._rings_are_shared or mark.shared
        if self._rings_are_shared:
            return  # so nobody wrote to it
        # of inference, whoever wrote to them did so in inference mode, where alone it can be undone
        in_inference = any(part.is_inference() for part in state[:-1])
        with torch.inference_mode() if in_inference else torch.no_grad():
            if mark.position is not None:
                state.position.copy_(mark.position)
            elif state.clock.shape[0] < self._layout().sequence_len:
                state.position.fill_(state.clock.shape[0])
            for part, old in mark.slots:
                reference.put_slots_(part, state.position, 1, old)

    def _mark_before(self, tokens: int) -> Mark:
        """A mark before so many tokens are written in place; with ``tokens=0`` it costs nothing.

        That serves before one step, too: the slot which it writes is overwritten by the next step
        before anyone reads it, so that only the position tells whether it happened. Operators
        advance that last. Once streams differ in age an interrupted step may therefore have
        happened, for all of them, or not. Many tokens overwrite what is still needed, unless the
        streams march together and their rings have room.
        """
        state = self._state()
        if tokens == 0 or state is None:
            return Mark(state, self._rings_are_shared)
        seen = state.clock.shape[0]
        together = seen < self._layout().sequence_len
        slots = []
        known: dict[tuple[int, int], Tensor] = {}
        with torch.no_grad():
            for part in ring.rings(state):
                lost = min(tokens, part.shape[-2]) - 1
                if lost > 0 and not (together and seen + tokens <= part.shape[-2]):
                    slots.append(
                        (part, functional.take_slots(part, state.position, 1, lost, known))
                    )
            position = None if together else state.position.clone()
        return Mark(state, self._rings_are_shared, position, slots)

    def _checked(self, state: object, joins: bool = False) -> Any:
        """``state`` as a state of this module, if it fits; errors are those of ``set_state``.

        Args:
            joins: whether it goes in among the streams there are, and must be kept as they are.
        """
        like = self._like()
        layout = self._layout() if joins else self._layout_of_given(state)
        among = joins and self._clock is not None
        dtypes = {like.dtype} if among else {like.dtype, *AUTOCAST_DTYPES}
        return ring.check_state(state, layout, dtypes, like.device)

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
        buffers = self._buffers
        with_keys, with_inputs = self._state_types
        kind = with_keys if buffers["_ring_x"] is None else with_inputs
        state: State = kind(*[buffers[name] for name in _BUFFERS[kind]], self._clock)
        return state

    def _store(self, state: State) -> None:
        if makes_program():
            if not self._begins_in_program:
                self._write(state)
                return
        elif self._begins_in_program:
            self._begins_in_program = False
        self._assign(state)

    def _assign(self, state: State) -> None:
        """Put a state in the place of the one that was there."""
        if state.clock is not self._clock:
            self._clock = state.clock
        buffers = self._buffers
        parts = dict(zip(_BUFFERS[type(state)], state[:-1], strict=True))
        compiling, changed = torch.compiler.is_compiling(), False
        for name in _ALL_BUFFERS:
            part = parts.get(name)
            if part is not buffers[name]:
                changed = True
                if compiling:  # which follows attributes
                    setattr(self, name, part)
                else:  # as that would, but it asks what each is, for a third of a small step's time
                    buffers[name] = part
        if changed and (compiling or self._repeat is not None or self._many_repeat is not None):
            self._repeat = self._many_repeat = None

    def _write(self, state: State) -> None:
        """Write a state to the buffers, in a program of which another run shall go on from it.

        Raises:
            RuntimeError: the program cannot keep it, or it is not of full windows.
        """
        if makes_onnx():
            raise RuntimeError(
                "an ONNX program keeps no streams from one run to the next; make it of a module "
                "that takes a state and returns the next: "
                "_forward_step(query, key, value, prev_state)"
            )
        before = self._state()
        if (
            before is None
            or type(before) is not type(state)
            # with the clock, which stands where windows are full
            or any(
                x.shape != y.shape or x.dtype != y.dtype for x, y in zip(before, state, strict=True)
            )
        ):
            raise RuntimeError(
                "a program of steps goes on from the streams that it was made with, of any age if "
                "they began by start_streams(batch_size), and else with full windows; call that "
                "before torch.export"
            )
        if any(part.requires_grad for part in before):
            raise RuntimeError(
                "a program of steps would write to streams of which a graph still has need; call "
                "detach_state() and set_state(get_state()) first"
            )
        for part, new in zip(before[:-1], state[:-1], strict=True):
            if new is not part:
                part.copy_(new.detach())

    def _where_state_is(self, of_its_own: bool) -> list[Found]:
        """All that says which state this is and who may write to it, and where that was found.

        Args:
            of_its_own: whether its parts must be these, and not others like them.
        """
        names = ("_clock", "_rings_are_shared")
        parts = self._buffers.items() if of_its_own else ()
        return self._attributes(*names) + [(self._buffers, name, part) for name, part in parts]

    def _attributes(self, *names: str) -> list[Found]:
        """What the module's attributes of these names are."""
        return [(None, name, self.__dict__[name]) for name in names]

    def _stepping(
        self, kind: type, step: Callable[..., Any]
    ) -> Callable[[Sequence[Tensor], Tensor | None], Tensor]:
        """``step`` from the parts of a state of that kind, whatever they are, and to new ones."""
        buffers, names = self._buffers, _BUFFERS[kind]

        def run(apart: Sequence[Tensor], active: Tensor | None) -> Tensor:
            out: Tensor
            out, after = step(apart, [buffers[name] for name in names], active)
            buffers.update(zip(names, after, strict=True))
            return out

        return run

    def _must_copy(self, state: State, differentiable: bool) -> bool:
        """Whether a graph still needs these rings, or torch forbids to write or save them."""
        if self._rings_are_shared and not differentiable:
            return True
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return False
        return any(part.is_inference() for part in state[:-1])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As in torch, but positions, codes and scales go along without becoming another dtype.

        Rings stay contiguous, and streams whose numbers do not come along, as in ``to_empty``, are
        forgotten.
        """
        self._forget_calls()
        buffers: dict[str, Any] = self._buffers
        position = buffers["_ring_position"]
        kept = {
            name: buffers[name]
            for name in _ALL_BUFFERS
            if buffers[name] is not None
            and (name in _SCALES or not buffers[name].is_floating_point())
        }
        try:
            buffers.update(dict.fromkeys(kept))
            applied = super()._apply(fn, recurse)
            for name, part in kept.items():
                moved = fn(part)
                kept[name] = moved if moved.dtype == part.dtype else part.to(moved.device)
        finally:
            buffers.update(kept)
        if position is not None and _is_lost(position, buffers["_ring_position"]):
            self.clean_state()
        for name in _ALL_BUFFERS:
            buffers[name] = None if buffers[name] is None else buffers[name].contiguous()
        return applied

    def _load_from_state_dict(self, *args: Any) -> None:
        """As in torch, which may swap tensors only that nobody else holds."""
        self._forget_calls()
        super()._load_from_state_dict(*args)

    def _replicate_for_data_parallel(self) -> Any:
        """As in torch; a replica's weights and state are others."""
        replica: Any = super()._replicate_for_data_parallel()
        replica._forget_calls()
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have a state of their own and no part of a graph.

        Two cannot write to the same rings, as those pickled for another process would.
        """
        copied: dict[str, Any] = super().__getstate__()
        copied.update(_repeat=None, _many_repeat=None, _clip_repeats={}, _last_shapes={})
        buffers = {n: None if b is None else b.detach().clone() for n, b in self._buffers.items()}
        process = get_spawning_popen()
        if process is not None:  # it is told where in shared memory they are, and has yet to look
            _SENT.setdefault(process, []).append(buffers)
        copied["_buffers"] = buffers
        return copied


def stateful_modules(model: nn.Module) -> dict[str, StatefulStreams]:
    """The submodules of ``model`` that keep streams, by name; the model itself is ``""``.

    Raises:
        ValueError: there is none.
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"streams are kept by a torch.nn.Module, but got {type(model).__name__}")
    found = {name: m for name, m in model.named_modules() if isinstance(m, StatefulStreams)}
    if not found:
        raise ValueError(f"{type(model).__name__} holds no module that keeps streams")
    return found


def _is_lost(before: Tensor, after: Tensor) -> bool:
    """Whether numbers have not come along from one tensor to the other."""
    if before is after or not has_numbers(after):
        return False
    return not has_numbers(before) or not torch.equal(before.to(after.device), after)
