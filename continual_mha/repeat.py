"""Going the same way again: what one step decided, kept for those that follow it.

In a small step most of the time went into asking the same questions again: whether the token fits,
which tensors the weights are, which backend serves. The answers hold as long as everything that
was asked is what it was, and that is cheaper to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import backends

# Where an answer came from: a namespace of a module, a name in it, and what was found.
Found = tuple[Mapping[str, Any], str, Any]
Run = Callable[[Tensor, Tensor | None], Tensor]


class Repeat:
    """A step that has been decided.

    Args:
        run: takes a token ``(N, E)`` and the mask of active streams, returns the output ``(N, E)``.
        found: all that was looked at to decide, besides the token and what surrounds the call.
        query: a token of the kind that ``run`` takes.
    """

    __slots__ = ("_device", "_dtype", "_found", "_shape", "_unchanged", "run")

    def __init__(self, run: Run, found: Iterable[Found], query: Tensor) -> None:
        self.run = run
        self._found = tuple((where.get, name, thing) for where, name, thing in found)
        self._shape, self._dtype, self._device = query.shape, query.dtype, query.device
        self._unchanged = backends.same_surroundings(query.device.type)

    def serves(self, query: object) -> bool:
        """Whether a step with this token would be decided the same way."""
        if type(query) is not Tensor or query.layout is not torch.strided or query.is_nested:
            return False
        if query.shape != self._shape:
            return False
        for get, name, thing in self._found:
            if get(name) is not thing:
                return False
        return (
            query.dtype is self._dtype
            and query.device == self._device
            and not torch.is_grad_enabled()
            and self._unchanged()
        )
