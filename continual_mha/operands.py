"""What every formula and kernel is given, tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Tokens = tuple[Tensor, Tensor, Tensor]  # query, key and value of a call, projected or not
# A step like one before: of tokens (N, E*) as ``told_apart`` returns them, and of who is active.
RepeatedStep = Callable[..., Tensor]


class Weights(NamedTuple):
    """The parameters of one attention, as ``torch.nn.MultiheadAttention`` holds them.

    ``in_proj_weight`` is ``(3E, E)`` and packs query, key and value; where ``k_proj_weight`` and
    ``v_proj_weight`` are given it is the query's ``(E, E)`` alone.
    """

    in_proj_weight: Tensor
    k_proj_weight: Tensor | None
    v_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    out_proj_weight: Tensor
    out_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of query ``(E, E)``, key ``(E, Ek)`` and value ``(E, Ev)``."""
        if self.k_proj_weight is not None and self.v_proj_weight is not None:
            return self.in_proj_weight, self.k_proj_weight, self.v_proj_weight
        q, k, v = self.in_proj_weight.chunk(3)
        return q, k, v

    def unpacked(self) -> Weights:
        """The same with three weights, for those who split often: each split has a gradient."""
        q, k, v = self.split()
        return self._replace(in_proj_weight=q, k_proj_weight=k, v_proj_weight=v)

    def split_bias(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The biases ``(E,)`` of query, key and value, or three times None."""
        if self.in_proj_bias is None:
            return None, None, None
        q, k, v = self.in_proj_bias.chunk(3)
        return q, k, v

    def project(self, tokens: Tokens, linear: Callable[..., Tensor]) -> Tokens:
        """Query, key and value ``(..., E*)`` after the in-projection, ``(..., E)`` each.

        Args:
            linear: as ``torch.nn.functional.linear``; called once where they are one tensor.
        """
        if self.k_proj_weight is None and is_shared(tokens):
            q, k, v = linear(tokens[0], self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        of_each = zip(tokens, self.split(), self.split_bias(), strict=True)
        q, k, v = (linear(x, weight, bias) for x, weight, bias in of_each)
        return q, k, v


class Options(NamedTuple):
    """What an attention can be asked for, tensors and sizes aside."""

    add_zero_attn: bool
    dropout_p: float


class Rings(NamedTuple):
    """The parts of a state with keys and values that an operator sees."""

    k: Any  # (N, H, L, D), a tensor or a QuantizedRing
    v: Any  # as k
    q: Tensor  # (N, R, E)
    position: Tensor  # (N,)


def is_shared(tokens: Tokens) -> bool:
    """Whether query, key and value are one tensor."""
    return tokens[1] is tokens[0] and tokens[2] is tokens[0]


def told_apart(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
    """The query alone if it is key and value too, as those are that are None; else the three."""
    if (key is None or key is query) and (value is None or value is query):
        return (query,)
    return query, query if key is None else key, query if value is None else value


def as_tokens(apart: Sequence[Tensor]) -> Tokens:
    """Query, key and value of what ``told_apart`` returned."""
    query, key, value = apart if len(apart) == 3 else tuple(apart) * 3
    return query, key, value


def of_each(function: Callable[[Tensor], Tensor], tokens: Tokens) -> Tokens:
    """What the function makes of query, key and value; what is one tensor stays one."""
    query, key, value = tokens
    asked = function(query)
    seen = asked if key is query else function(key)
    said = asked if value is query else seen if value is key else function(value)
    return asked, seen, said


def has_extra_slots(weights: Weights, add_zero_attn: bool) -> bool:
    """Whether ``add_bias_kv`` or ``add_zero_attn`` adds to what every query sees."""
    return weights.bias_k is not None or add_zero_attn
