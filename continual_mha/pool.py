"""The server's side: many streams that come and go share the slots of one model.

A stream is opened, tokens are pushed to it at any time and from any thread, and each tick takes one
token of every stream that has one, in one call of the model.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from . import checks, storage
from .graphs import GraphedStep
from .modes import active_streams
from .streams import StatefulStreams, all_or_as_before, stateful_modules
from .tracing import has_numbers, is_plain, is_transformed

# The pool that a module keeps its streams for: the last one that was given the model.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


class PoolFull(RuntimeError):  # noqa: N818  (as in queue.Full)
    """No slot is free."""


class QueueFull(RuntimeError):  # noqa: N818
    """The stream has as many tokens waiting as it may."""


class UnknownStream(KeyError):  # noqa: N818
    """There is no open stream of this number, or not any more."""

    def __str__(self) -> str:  # KeyError would show the number alone
        if not self.args:
            return "there is no such open stream"
        return f"there is no open stream {self.args[0]}: it was closed, or is of another pool"


class Statistics(NamedTuple):
    """What a pool has done, at one moment.

    Attributes:
        capacity: slots.
        open: streams that are open.
        waiting: tokens in queues.
        longest_queue: tokens in the longest queue.
        ticks: ticks that took a token.
        tokens: tokens taken by all ticks.
        p50: median host time of the last ticks in seconds; NaN before the first. What a tick puts
            in a device's queue may take longer.
        p99: 99th percentile.
        p999: 99.9th percentile.
    """

    capacity: int
    open: int
    waiting: int
    longest_queue: int
    ticks: int
    tokens: int
    p50: float
    p99: float
    p999: float

    def __str__(self) -> str:
        """One line that tells how it goes."""
        times = ", ".join(f"{1e3 * t:.2f}" for t in (self.p50, self.p99, self.p999))
        return (
            f"{self.open}/{self.capacity} streams, {self.ticks} ticks, {self.tokens} tokens, "
            f"{self.waiting} waiting (at most {self.longest_queue} in a queue), "
            f"tick p50, p99, p99.9: {times} ms"
        )


class _Stream:
    """One open stream: its slot, the tokens it has seen, and those that wait."""

    def __init__(self, slot: int, seen: int = 0) -> None:
        self.slot = slot
        self.seen = seen
        self.queue: deque[_Waiting] = deque()


class _Waiting(NamedTuple):
    """A token in a queue, and the CUDA stream that copied it; None for one on the CPU."""

    token: Tensor
    stream: Any

    @classmethod
    def copy_of(cls, token: Tensor) -> _Waiting:
        copy = token.detach().clone()  # moved to the device with all others of its tick
        return cls(copy, torch.cuda.current_stream(copy.device) if copy.is_cuda else None)

    def arrived(self) -> Tensor:
        """The token, for this thread's CUDA stream to read."""
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.token.device)
            if stream != self.stream:
                stream.wait_stream(self.stream)
                self.token.record_stream(stream)
        return self.token


class StreamPool:
    """A fixed number of slots on one device, for streams that come and go.

    All methods may be called from any thread. A stream is ready once its tokens fill the model's
    receptive field; from then on its outputs are those that the model gives it alone.

    A model whose stateful submodules are all of this package steps all streams at once. One that
    also holds modules with only ``get_state`` and ``set_state`` (as ``continual`` has them, whose
    streams all share one clock) is stepped stream by stream: right, but without the gain of a
    batch; ``batched`` tells which.

    Args:
        model: a module in ``eval()`` mode whose ``forward_step`` takes one tensor
            ``(N, *token_shape)``. The pool owns its state from now on; one that had the model
            before raises a RuntimeError in every call that needs it.
        capacity: slots.
        token_shape: shape of one stream's token, such as ``(E,)``.
        queue_size: tokens that may wait in each stream.
        dtype: of the tokens; that of the model's first parameter if None.
        device: of the model; that of its first parameter if None.
        receptive_field: tokens until a stream is ready; the model's own, or what its modules give
            if they stand in a row, if None. Stepped one by one, a stream is ready when it gets an
            output.
        graph: whether to replay a tick as a CUDA graph.
        history: ticks whose times the statistics are over.

    Attributes:
        capacity: slots.
        batched: whether all streams step at once.
        receptive_field: tokens until a stream is ready; 0 if each has an output once it is.

    Raises:
        ValueError: the model keeps no streams, or state that nobody can read, or normalises
            over a batch, as in training mode; a size is below 1; ``graph`` without a CUDA device or
            with a model that is stepped stream by stream.
        TypeError: the model is none, or has no ``forward_step``; a size is not an integer.

    Example:
        >>> import torch, continual_mha as co
        >>> model = co.SingleOutputMultiheadAttention(64, num_heads=4, sequence_len=2)
        >>> pool = co.StreamPool(model, capacity=100, token_shape=(64,))
        >>> stream = pool.open()
        >>> for token in torch.rand(3, 64):
        ...     pool.push(stream, token)
        >>> [list(pool.tick()) for _ in range(3)]  # the streams that got an output
        [[], [0], [0]]
        >>> pool.close(stream)
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        token_shape: tuple[int, ...],
        *,
        queue_size: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        receptive_field: int | None = None,
        graph: bool = False,
        history: int = 4096,
    ) -> None:
        sizes = {"capacity": capacity, "queue_size": queue_size, "history": history}
        if receptive_field is not None:
            sizes["receptive_field"] = receptive_field
        for name, size in sizes.items():
            checks.check_count(name, size, 1)
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model must be a torch.nn.Module, but got {type(model).__name__}")
        if not isinstance(token_shape, Sequence):
            raise TypeError(f"token_shape must be a tuple such as (E,), but got {token_shape!r}")
        for size in token_shape:
            checks.check_count("each size in token_shape", size, 0)
        parameter = next(model.parameters(), torch.empty(0))
        self._token_shape = tuple(token_shape)
        self._dtype = dtype or parameter.dtype
        self._device = torch.device(device or parameter.device)
        self._queue_size = queue_size
        alone = _foreign_modules(model)
        if not alone:
            stateful_modules(model)  # or there is nothing to serve
        if not callable(getattr(model, "forward_step", None)):
            raise TypeError(
                "the model must have a forward_step, which takes a token through its modules, but "
                f"{type(model).__name__} has none"
            )
        if mixing := _mixes_streams(model):
            raise ValueError(f"{mixing}, of which a pool serves each alone")
        if alone and graph:
            raise ValueError(f"no graph of a model that is stepped stream by stream: {alone[0]}")
        # one by one, a stream that is not ready has no output
        self.receptive_field = receptive_field or (0 if alone else _receptive_field(model))
        # what inference mode makes could be written to in inference mode only
        with torch.inference_mode(False), torch.no_grad():
            shape = (capacity, *token_shape)
            example = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._device = example.device  # whichever GPU is the current one when it is used
            self._slots: _Slots = (
                _OneByOne(model, alone, self._device) if alone else _Batched(model, example, graph)
            )
        self.batched = not alone
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._streams: dict[int, _Stream] = {}
        self._next_id = 0
        self._stepping = threading.Lock()  # whoever holds it may touch the model; taken first
        self._last_stream: Any = None  # of CUDA, that touched it last: this thread's, for now
        self._follow()
        # It guards all the books, and is entered as it is: a signal may come between two lines of
        # what enters a condition, and leave that locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._times: deque[float] = deque(maxlen=history)
        self._ticks = self._tokens = 0
        self._owner = object()  # it stands for the pool, which holds the model, in what must not
        _OWNERS.update(dict.fromkeys(self._slots.modules.values(), self._owner))

    # -- streams that come and go ----------------------------------------------------------------

    def open(self, timeout: float | None = 0.0) -> int:
        """Begin a stream and return its number, which is never used again.

        Args:
            timeout: seconds to wait for a free slot; None waits for ever.

        Raises:
            PoolFull: no slot became free in that time.
            ValueError: ``timeout`` is NaN.
        """
        return self._admit(self._slots.begin, 0, timeout)

    def restore(self, states: Mapping[str, Any], timeout: float | None = 0.0) -> int:
        """Begin a stream that goes on from what ``export`` returned, of this or another pool.

        Raises:
            PoolFull: no slot became free in that time.
            TypeError: ``states`` is no mapping from modules' names to states.
            ValueError: the state does not fit the model, or ``timeout`` is NaN; nothing has
                changed.
        """
        storage.check_states(states)
        return self._admit(lambda slot: self._slots.put(slot, states), _age(states), timeout)

    def _admit(self, prepare: Callable[[int], None], seen: int, timeout: float | None) -> int:
        checks.check_timeout(timeout)
        slot = stream = None
        try:
            with self._lock:
                if not self._wait_for(lambda: self._free, timeout):
                    raise PoolFull(
                        f"all {self.capacity} slots are taken: close a stream, wait with timeout, "
                        "or make a pool of more capacity"
                    )
                slot = self._free[-1]  # no call until it is taken, so that no signal comes between
                del self._free[-1]
            with self._stepping:
                self._take_model()
                prepare(slot)
            with self._lock:
                self._next_id += 1
                stream = self._next_id - 1
                self._streams[stream] = _Stream(slot, seen)
            return stream
        except BaseException:
            if slot is not None:
                self._give_back(slot, stream)
            raise

    def _give_back(self, slot: int, stream: int | None) -> None:
        """Free a slot, and end the stream that may have begun in it."""
        with self._lock:
            self._changed.notify_all()
            self._streams.pop(stream, None)  # type: ignore[arg-type]
            self._free.append(slot)

    def close(self, stream: int) -> None:
        """End a stream. Tokens that wait are dropped.

        Raises:
            UnknownStream: there is no such stream.
        """
        with self._stepping, self._lock:
            slot = self._existing(stream).slot
            self._changed.notify_all()
            del self._streams[stream]
            self._free.append(slot)

    def export(self, stream: int) -> dict[str, Any]:
        """A stream's state after its last tick, on the CPU: by the names of the model's modules.

        ``restore`` takes it, and ``states_to_bytes`` if all modules are of this package. Tokens
        that wait are not in it.

        Raises:
            UnknownStream: there is no such stream.
        """
        with self._stepping:
            self._take_model()
            with self._lock:
                slot = self._existing(stream).slot
            return self._slots.get(slot)

    # -- tokens ----------------------------------------------------------------------------------

    def push(self, stream: int, token: Tensor, timeout: float | None = 0.0) -> None:
        """Add a copy of ``token`` to those that wait for the next ticks.

        Args:
            stream: its number.
            token: of the pool's token shape and dtype, on any device.
            timeout: seconds to wait for room in the queue; None waits for ever.

        Raises:
            UnknownStream: there is no such stream, or it was closed in the meantime.
            QueueFull: there was no room in that time.
            ValueError: another shape, or no elements as on the device ``meta``; or ``timeout`` is
                NaN.
            TypeError: another dtype, or no dense tensor.
        """
        checks.check_timeout(timeout)
        if isinstance(token, Tensor) and not is_plain(token):
            raise TypeError("a token must be a plain dense tensor")
        if not isinstance(token, Tensor) or token.dtype != self._dtype:
            given = token.dtype if isinstance(token, Tensor) else type(token).__name__
            raise TypeError(f"a token must be a tensor of {self._dtype}, but got {given}")
        if tuple(token.shape) != self._token_shape:
            shapes = f"{self._token_shape}, but got {tuple(token.shape)}"
            raise ValueError(f"a token must have the shape {shapes}")
        if not has_numbers(token) or is_transformed():
            kind = "on the device meta" if token.is_meta else "fake, or one of a transform"
            raise ValueError(f"a token must have elements, but is {kind}")
        waiting = _Waiting.copy_of(token)
        with self._lock:
            there_is_room = lambda: len(self._existing(stream).queue) < self._queue_size
            if not self._wait_for(there_is_room, timeout):
                raise QueueFull(
                    f"stream {stream} has {self._queue_size} tokens waiting, as many as it may: "
                    "call tick first, wait with timeout, or make a pool of a larger queue_size"
                )
            self._existing(stream).queue.append(waiting)

    def _wait_for(self, holds: Callable[[], object], timeout: float | None) -> bool:
        """Whether it holds, at the latest after so many seconds; for whoever has the lock."""
        if holds():
            return True
        if timeout is None:
            return bool(self._changed.wait_for(holds))
        seconds = min(timeout, threading.TIMEOUT_MAX)
        return seconds > 0.0 and bool(self._changed.wait_for(holds, seconds))

    def _take_model(self) -> None:
        """Before anything is done with the model, by whoever holds ``_stepping``.

        Raises:
            RuntimeError: another pool was made of it since.
        """
        if any(_OWNERS.get(module) is not self._owner for module in self._slots.modules.values()):
            raise RuntimeError(
                "another StreamPool was made of this pool's model and has taken its streams; give "
                "each pool a model of its own, such as copy.deepcopy(model)"
            )
        self._follow()

    def _follow(self) -> None:
        """Let what this thread's CUDA stream does with the model come after what others did."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = stream

    def _existing(self, stream: int) -> _Stream:
        found = self._streams.get(stream)
        if found is None:
            raise UnknownStream(stream)
        return found

    def tick(self) -> dict[int, Tensor]:
        """Take one token of every stream that has one.

        Returns:
            The outputs of those streams that are ready, by number; on a GPU on the CUDA stream that
            is current.

        Raises:
            TypeError: what the model returned is not one tensor of a row for each stream.

        Whatever it raises, no stream has moved and no token is lost, so that it can be repeated.
        """
        with self._stepping:
            self._take_model()
            with self._lock:
                due = {i: s for i, s in self._streams.items() if s.queue}
                tokens = {s.slot: s.queue[0] for s in due.values()}
                before = self._books(due)
            if not due:
                return {}
            started = time.perf_counter()
            mark = self._slots.mark()
            try:
                rows = self._slots.step({slot: x.arrived() for slot, x in tokens.items()})
                outputs = self._outputs(due, rows)
                self._book(due, time.perf_counter() - started)
            except BaseException:
                self._slots.return_to(mark)
                self._unbook(due, tokens, before)
                raise
            return outputs

    def _outputs(self, due: Mapping[int, _Stream], rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {
            number: rows[stream.slot]
            for number, stream in due.items()
            if stream.slot in rows and stream.seen + 1 >= self.receptive_field
        }

    def _books(self, due: Mapping[int, _Stream]) -> tuple[int, int, list[int]]:
        """The counts that a tick changes."""
        return self._ticks, self._tokens, [stream.seen for stream in due.values()]

    def _book(self, due: Mapping[int, _Stream], seconds: float) -> None:
        """Take the tokens off the queues and count them."""
        with self._lock:
            for stream in due.values():
                stream.queue.popleft()
                stream.seen += 1
            self._ticks += 1
            self._tokens += len(due)
            self._times.append(seconds)
            self._changed.notify_all()

    def _unbook(
        self,
        due: Mapping[int, _Stream],
        tokens: Mapping[int, _Waiting],
        before: tuple[int, int, list[int]],
    ) -> None:
        """Undo as much of ``_book`` as was done."""
        self._ticks, self._tokens, seen = before
        with self._lock:
            for stream, count in zip(due.values(), seen, strict=True):
                stream.seen = count
                token = tokens[stream.slot]
                if not stream.queue or stream.queue[0] is not token:
                    stream.queue.appendleft(token)

    # -- how it goes -----------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """What the pool has done so far; ``str`` of it is one line."""
        with self._lock:
            queues = [len(stream.queue) for stream in self._streams.values()]
            times = sorted(self._times)
            counts = (self.capacity, len(queues), sum(queues), max(queues, default=0))
            return Statistics(
                *counts,
                self._ticks,
                self._tokens,
                *(_quantile(times, share) for share in (0.5, 0.99, 0.999)),
            )

    def progress(self) -> str:
        """A line for a terminal or a log: streams, ticks, queues, times."""
        return str(self.statistics())


def _quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed; NaN of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class _Slots(Protocol):
    """The states of a pool's streams by slot, and the model that steps them."""

    @property
    def modules(self) -> Mapping[str, Any]:
        """Those of the model that keep states, by name."""

    def begin(self, slot: int) -> None:
        """Let a stream begin in a slot, as one that has seen nothing."""

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        """Let a stream go on in a slot from what ``get`` returned, or change nothing."""

    def get(self, slot: int) -> dict[str, Any]:
        """Copies of a slot's states on the CPU, by the names of the model's modules."""

    def mark(self) -> Any:
        """What ``return_to`` needs to undo the next step."""

    def return_to(self, mark: Any) -> None:
        """Undo what happened since ``mark``: nothing, or one step, whole or in part."""

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """One step with these tokens by slot; the outputs by slot of those that have one."""


class _Batched:
    """Slots that are rows of one batch, for models whose modules all keep streams apart."""

    def __init__(self, model: nn.Module, example: Tensor, graph: bool) -> None:
        self._model = model
        self.modules = stateful_modules(model)
        self._tokens = example
        self._run: Callable[[Tensor], Tensor | None]
        if graph:
            graphed = GraphedStep(model, example)
            self._run, self._active = graphed, graphed.active
        else:
            with all_or_as_before(list(self.modules.values())):
                for module in self.modules.values():
                    module.start_streams(example.shape[0])
            self._run = model.forward_step  # type: ignore[assignment]
            self._active = torch.zeros(example.shape[0], dtype=torch.bool, device=example.device)

    def begin(self, slot: int) -> None:
        mask = torch.zeros_like(self._active)
        mask[slot] = True
        for module in self.modules.values():
            module.reset(mask)
        self._tokens[slot].zero_()

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        storage.import_stream(self._model, slot, states)

    def get(self, slot: int) -> dict[str, Any]:
        return storage.export_stream(self._model, slot)

    def mark(self) -> list[Any]:
        return [module.mark() for module in self.modules.values()]

    def return_to(self, mark: list[Any]) -> None:
        for module, before in zip(self.modules.values(), mark, strict=True):
            module.return_to(before)

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        alone = active_streams(self._active)
        try:
            return self._step(tokens, alone)
        except BaseException:
            alone.leave()
            raise

    def _step(self, tokens: Mapping[int, Tensor], alone: active_streams) -> dict[int, Tensor]:
        slots = _sent(torch.tensor(list(tokens)), self._tokens.device)
        with torch.no_grad(), alone:
            self._tokens.index_copy_(0, slots, _stacked(tokens.values(), self._tokens.device))
            self._active.zero_().index_fill_(0, slots, True)
            out = self._run(self._tokens)
            if out is None:
                return {}
            _check_rows(out, len(self._tokens))
            return dict(zip(tokens, out.index_select(0, slots).unbind(), strict=True))


def _check_rows(out: object, rows: int) -> None:
    """Raise a TypeError if a model's output is not one tensor of so many rows."""
    if not isinstance(out, Tensor) or out.shape[:1] != (rows,):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(
            f"the model's forward_step must return None or one tensor of shape ({rows}, ...), "
            f"but returned {given}"
        )


def _stacked(tokens: Iterable[Tensor], device: torch.device) -> Tensor:
    """Tokens as one tensor on ``device``, in one transfer if they are all in one place."""
    tokens = list(tokens)
    if len({token.device for token in tokens}) > 1:
        tokens = [token.to(device) for token in tokens]
    return _sent(torch.stack(tokens), device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor made for this on ``device``, without waiting for a GPU to have read it."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class _OneByOne:
    """Slots that each hold a whole state, for models with modules that know only one clock."""

    def __init__(self, model: nn.Module, foreign: list[str], device: torch.device) -> None:
        ours = [name for name, m in model.named_modules() if isinstance(m, StatefulStreams)]
        self._model: Any = model
        self._device = device
        self.modules: dict[str, Any] = {n: model.get_submodule(n) for n in [*ours, *foreign]}
        self._states: dict[int, dict[str, Any]] = {}

    def begin(self, slot: int) -> None:
        self._states[slot] = dict.fromkeys(self.modules)

    def put(self, slot: int, states: Mapping[str, Any]) -> None:
        storage.check_names(states, self.modules)
        ours = {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, StatefulStreams) and states[name] is not None
        }
        begun = {name: states[name] for name in ours}
        storage.fitted(ours, begun, lambda module, state: module._layout_of_given(state))
        for name, state in begun.items():
            if state.position.shape[0] != 1:
                streams = f"{state.position.shape[0]} streams, and not of one"
                raise ValueError(f"the state of module {name!r} does not fit: it is of {streams}")
        self._states[slot] = {name: _copy(state, self._device) for name, state in states.items()}

    def get(self, slot: int) -> dict[str, Any]:
        return {name: _copy(state, "cpu") for name, state in self._states[slot].items()}

    def mark(self) -> dict[int, dict[str, Any]]:
        return dict(self._states)

    def return_to(self, mark: dict[int, dict[str, Any]]) -> None:
        self._states = mark

    def step(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        outputs = {}
        for slot, token in tokens.items():
            for name, module in self.modules.items():
                state = self._states[slot][name]
                module.clean_state() if state is None else module.set_state(_copy(state))
            with torch.no_grad():
                out = self._model.forward_step(token.unsqueeze(0).to(self._device))
            self._states[slot] = {n: _copy(m.get_state()) for n, m in self.modules.items()}
            if out is not None and type(out).__name__ != "TensorPlaceholder":  # that of continual
                _check_rows(out, 1)
                outputs[slot] = out[0]
        return outputs


def _copy(state: Any, device: torch.device | str | None = None) -> Any:
    """A copy of a tree of tensors; its clock, which has no bytes, stays where it is."""
    if isinstance(state, Tensor):
        return state.detach().to(device or state.device, copy=True)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        parts = zip(state._fields, state, strict=True)
        return type(state)(*(x if _is_clock(name, x) else _copy(x, device) for name, x in parts))
    if isinstance(state, (tuple, list)):
        return type(state)(_copy(part, device) for part in state)
    if isinstance(state, dict):
        return {name: _copy(part, device) for name, part in state.items()}
    return state


def _is_clock(name: str, part: Any) -> bool:
    return name == "clock" and isinstance(part, Tensor) and part.numel() == 0


def _foreign_modules(model: nn.Module) -> list[str]:
    """Names of modules that keep a state by ``get_state`` and ``set_state`` and not by streams.

    Raises:
        ValueError: one has a state that cannot be read or set.
    """
    upstream = getattr(sys.modules.get("continual.module"), "CoModule", None)
    found = []
    for name, module in model.named_modules():
        if not _keeps(module, upstream) or isinstance(module, StatefulStreams):
            continue
        readable = _own(module, "get_state", upstream) and _own(module, "set_state", upstream)
        if not readable and any(_keeps(m, upstream) for m in module.children()):
            continue  # what it keeps, they do
        if not readable:
            raise ValueError(
                f"module {name!r} ({type(module).__name__}) keeps a state that cannot be read and "
                "set: it has clean_state, but not get_state and set_state"
            )
        found.append(name)
    return found


def _mixes_streams(model: nn.Module) -> str | None:
    """Which module's output for a row of a batch depends on the others, and why; None if none's."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        if module.training or module.running_mean is None:
            why = "call eval()" if module.running_mean is not None else "it keeps no statistics"
            return f"module {name!r} ({type(module).__name__}; {why}) normalises over streams"
    return None


def _keeps(module: nn.Module, upstream: type | None) -> bool:
    """Whether it, or a module inside, keeps a state."""
    if isinstance(module, StatefulStreams):
        return True
    names = ("get_state", "set_state", "clean_state")
    itself = any(_own(module, name, upstream) for name in names) and not _says_none(module)
    return itself or any(_keeps(child, upstream) for child in module.children())


def _says_none(module: nn.Module) -> bool:
    """Whether its ``_state_shape``, as in ``continual``, tells that there is no state."""
    shapes: list[Any] = [getattr(module, "_state_shape", 1)]
    while shapes and isinstance(shapes[-1], list):
        shapes.extend(shapes.pop())
    return all(shape == 0 for shape in shapes)


def _own(module: nn.Module, name: str, upstream: type | None) -> bool:
    """Whether the module's class itself has this method, and not only by ``continual``'s base."""
    method = getattr(type(module), name, None)
    return callable(method) and method is not getattr(upstream, name, None)


def _receptive_field(model: nn.Module) -> int:
    """Tokens that an output depends on: as the model says, or for its modules in a row."""
    own = getattr(model, "receptive_field", None)
    if isinstance(own, (int, Tensor)):
        return int(own)
    fields = [m._layout().sequence_len for m in model.modules() if isinstance(m, StatefulStreams)]
    return 1 + sum(length - 1 for length in fields)


def _age(states: Mapping[str, Any]) -> int:
    """Tokens that a stream has seen, as far as its state tells."""
    positions = [getattr(state, "position", None) for state in states.values()]
    ages = [
        int(p[0])
        for p in positions
        if isinstance(p, Tensor) and p.dim() == 1 and len(p) and has_numbers(p)
    ]
    return max(ages, default=0)
