"""Going the same way again: what one call decided, kept for those that follow it.

In a small call most of the time went into asking the same questions again: whether the tokens fit,
which tensors the weights are, which backend serves. The answers hold as long as everything that
was asked is what it was, and that is cheaper to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import backends
from .modes import needs_gradient

# Where an answer came from: a namespace of a module, a name in it, and what was found. None is the
# module's own, for who is kept there and held that would only be freed by the garbage collector.
Found = tuple[Mapping[str, Any] | None, str, Any]
Run = Callable[[Tensor, Tensor | None], Tensor]  # a token (N, E), who is active, the output (N, E)


class Repeat:
    """A call that has been decided.

    Args:
        prepare: makes the function ``run`` that does it, for any tokens like those. It is given
            the first such tokens when they are here, so that an error in it comes before their
            call, and none are kept for it.
        found: all that was looked at to decide, besides the tokens and what surrounds the call.
        query: tokens of the kind that ``run`` takes.
        weights: those of the call, which may need a gradient.
    """

    __slots__ = (
        "_device", "_dtype", "_found", "_own", "_prepare", "_shape", "_trains", "_unchanged",
        "_weights", "run",
    )  # fmt: skip

    def __init__(
        self,
        prepare: Callable[[Tensor], Callable[..., Any]],
        found: Iterable[Found],
        query: Tensor,
        weights: Iterable[Tensor | None],
    ) -> None:
        self.run: Any = None  # until such tokens are here
        self._prepare: Callable[[Tensor], Callable[..., Any]] | None = prepare
        found = tuple(found)
        self._own = tuple((name, thing) for where, name, thing in found if where is None)
        self._found = tuple((x.get, name, thing) for x, name, thing in found if x is not None)
        self._shape, self._dtype, self._device = query.shape, query.dtype, query.device
        self._weights = tuple(x for x in weights if x is not None)
        self._trains = needs_gradient((query, *self._weights))
        self._unchanged = backends.same_surroundings(query.device.type)

    def serves(self, module: nn.Module, query: object) -> bool:
        """Whether a call with these tokens would be decided the same way; then ``run`` does it."""
        if type(query) is not Tensor or query.layout is not torch.strided or query.is_nested:
            return False
        if query.shape != self._shape:
            return False
        own = module.__dict__
        for name, thing in self._own:
            if own.get(name) is not thing:
                return False
        for get, name, thing in self._found:
            if get(name) is not thing:
                return False
        same = (
            query.dtype is self._dtype
            and query.device == self._device
            and needs_gradient((query, *self._weights)) is self._trains
            and self._unchanged()
        )
        prepare = self._prepare
        if same and prepare is not None:
            try:
                self.run = prepare(query)
            except RuntimeError:  # weights may be others behind their parameters
                return False
            self._prepare = None
        return same
