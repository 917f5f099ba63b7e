"""What a ``with`` block sets for all calls inside it, in its thread or asynchronous task alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Surrounding(Generic[T]):
    """A value that each context has for itself.

    Attributes:
        get: the context's own.
        last: in whichever context a block was last entered or left, for what ``torch.compile``
            traces, which cannot read what is a context's own.
    """

    def __init__(self, name: str, default: T) -> None:
        self._own: ContextVar[T] = ContextVar(f"continual_mha_{name}", default=default)
        self.get: Callable[[], T] = self._own.get
        self.last = default

    def set(self, value: T) -> None:
        self.last = value
        self._own.set(value)

    def run_with(self, value: T, function: Callable[..., Any], *args: Any) -> Any:
        """A function in a context of which this is the value, whatever was set last elsewhere."""
        token = self._own.set(value)
        try:
            return function(*args)
        finally:
            self._own.reset(token)


class Block(ContextDecorator, Generic[T]):
    """Sets a value inside a ``with`` block, or the calls of a function that it decorates.

    No generator: one that a signal leaves suspended would set a value whenever it is dropped.
    """

    def __init__(self, where: Surrounding[T], value: T) -> None:
        self._where, self._value = where, value
        self._before: list[T] = []  # as often as the block is entered

    def __enter__(self) -> None:
        self._before.append(self._where.get())
        self._where.set(self._value)

    def __exit__(self, *exc_info: object) -> None:
        self._where.set(self._before[-1])
        self._before.pop()

    def leave(self) -> None:
        """Undo what is left where a signal came between entering or leaving and the block."""
        while self._before:
            self.__exit__()

    def _recreate_cm(self) -> Block[T]:
        """For each call of a function that it decorates."""
        return Block(self._where, self._value)
