"""The server's side: many streams that come and go share the slots of one model.

A stream is opened, tokens are pushed to it at any time and from any thread, and each tick takes one
token of every stream that has one, in one call of the model.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, storage
from .pool_slots import Batched, OneByOne, Slots, check_model, receptive_field_of
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
        foreign = check_model(model, graph)
        self.batched = not foreign
        # one by one, a stream that is not ready has no output
        self.receptive_field = receptive_field or (receptive_field_of(model) if self.batched else 0)
        # what inference mode makes could be written to in inference mode only
        with torch.inference_mode(False), torch.no_grad():
            shape = (capacity, *token_shape)
            example = torch.zeros(shape, dtype=self._dtype, device=self._device)
            self._device = example.device  # whichever GPU is the current one when it is used
            self._slots: Slots = (
                OneByOne(model, foreign, self._device)
                if foreign
                else Batched(model, example, graph)
            )
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


def _age(states: Mapping[str, Any]) -> int:
    """Tokens that a stream has seen, as far as its state tells."""
    positions = [getattr(state, "position", None) for state in states.values()]
    ages = [
        int(p[0])
        for p in positions
        if isinstance(p, Tensor) and p.dim() == 1 and len(p) and has_numbers(p)
    ]
    return max(ages, default=0)
