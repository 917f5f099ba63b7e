"""What one call decided, kept for the calls that repeat it.

Most of a small call's time went into asking the same questions again: whether the tokens fit, which
tensors the weights are, which backend serves. The answers hold as long as all that was looked at is
what it was, and that is cheaper to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .tracing import needs_gradient

_STRIDED = torch.strided
# Where an answer came from: a namespace of a module, a name in it, and what was found. None stands
# for the namespace of the module itself: an answer that it keeps and that held its namespace would
# make a cycle, which only the garbage collector frees.
Found = tuple[Mapping[str, Any] | None, str, Any]


class Repeat:
    """A call that has been decided.

    Args:
        prepare: makes the function ``run`` that does it, for any tensors like ``given``. It is
            called with those of the first call that repeats this one: none are kept for it, and its
            errors come before anything has run.
        found: all that was looked at to decide, besides the tensors and what surrounds the call.
        given: tokens, and masks, of the kind that ``run`` takes.
        weights: those of the call, which may need a gradient.
    """

    __slots__ = (
        "_found", "_given", "_own", "_prepare", "_trains", "_unchanged", "_weights", "run",
    )  # fmt: skip

    def __init__(
        self,
        prepare: Callable[..., Callable[..., Any]],
        found: Iterable[Found],
        given: Sequence[Tensor],
        weights: Iterable[Tensor | None],
    ) -> None:
        self.run: Any = None  # until a call repeats this one
        self._prepare: Callable[..., Callable[..., Any]] | None = prepare
        found = tuple(found)
        self._own = tuple((name, thing) for where, name, thing in found if where is None)
        self._found = tuple((x.get, name, thing) for x, name, thing in found if x is not None)
        self._given = tuple((x.shape, x.dtype, x.device) for x in given)
        self._weights = tuple(x for x in weights if x is not None)
        self._trains = needs_gradient((*given, *self._weights))
        self._unchanged = backends.same_surroundings(given[0].device.type)

    def serves(self, module: nn.Module, given: Sequence[Any]) -> bool:
        """Whether a call with these tensors would be decided the same way; then ``run`` does it."""
        if len(given) != len(self._given):
            return False
        for x, (shape, dtype, device) in zip(given, self._given):  # noqa: B905  (slower)
            if type(x) is not Tensor or x.layout is not _STRIDED or x.is_nested:
                return False
            if x.shape != shape or x.dtype is not dtype or x.device != device:
                return False
        own = module.__dict__
        for name, thing in self._own:
            if own.get(name) is not thing:
                return False
        for get, name, thing in self._found:
            if get(name) is not thing:
                return False
        trains = torch.is_grad_enabled() and needs_gradient((*given, *self._weights))
        same = trains is self._trains and self._unchanged()
        prepare = self._prepare
        if same and prepare is not None:
            try:
                self.run = prepare(*given)
            except RuntimeError:  # weights may be others behind their parameters
                return False
            self._prepare = None
        return same
