"""What the module refuses: every check runs before anything is computed or written."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from . import ring
from .operands import Tokens, Weights, is_shared
from .precision import autocast_dtype
from .quantized import STORED_AS
from .ring import Layout, State
from .tracing import how_stored, is_plain

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
_ROLES = ("query", "key", "value")


def check_arguments(
    embed_dim: int,
    num_heads: int,
    kdim: int | None,
    vdim: int | None,
    sequence_len: int | None,
    query_index: int,
) -> None:
    """Check the constructor's arguments.

    Raises:
        ValueError: a value is missing or out of its range.
        TypeError: a size or an index is not an integer.
    """
    if sequence_len is None:
        raise ValueError(
            "sequence_len is required: pass the number of tokens in the window, an integer >= 1"
        )
    required = {"embed_dim": embed_dim, "num_heads": num_heads, "sequence_len": sequence_len}
    optional = {"kdim": kdim, "vdim": vdim}
    given = required | {name: size for name, size in optional.items() if size is not None}
    for name, number in {**given, "query_index": query_index}.items():
        if not is_integer(number):
            raise TypeError(f"{name} must be an integer, but got {_shown(number)}")
    sizes = {name: operator.index(number) for name, number in given.items()}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, but got {size}")
    if sizes["embed_dim"] % sizes["num_heads"]:
        raise ValueError(
            f"embed_dim must be divisible by num_heads, but got {embed_dim} and {num_heads}"
        )
    length = sizes["sequence_len"]
    if not -length <= operator.index(query_index) < length:
        raise ValueError(
            f"query_index must be from {-length} to {length - 1} for sequence_len={length}, "
            f"but got {query_index}"
        )


def checked_dropout(dropout: Any) -> float:
    """The probability ``dropout`` as a float of Python.

    Raises:
        ValueError: it is not from 0 to 1.
        TypeError: it is no number.
    """
    if not isinstance(dropout, Real) or isinstance(dropout, bool):
        raise TypeError(f"dropout must be a number from 0 to 1, but got {_shown(dropout)}")
    probability = float(dropout)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"dropout must be a probability from 0 to 1, but got {dropout}")
    return probability


def out_weight(module: nn.MultiheadAttention) -> Tensor:
    """The weight of the output projection.

    Raises:
        TypeError: ``out_proj`` computes something else than ``torch.nn.Linear`` does.
    """
    projection = module.out_proj
    if not is_linear(projection) and not _adds_nothing(projection):
        raise TypeError(
            "out_proj must compute what torch.nn.Linear does, for its weight and bias are read and "
            f"its forward is not called, but got {type(projection).__name__}; merge what it adds "
            "into the weight, or let torch.nn.utils.parametrize compute the weight"
        )
    return projection.weight


def is_linear(projection: nn.Module) -> bool:
    """Whether nothing but its weight and bias decides what it computes, as in a linear layer."""
    return getattr(type(projection), "forward", None) is nn.Linear.forward


def _adds_nothing(projection: nn.Module) -> bool:
    """Whether an adapter, as those of ``peft``, is in the weight of a linear layer or switched off:
    not both, for then the weight holds what is switched off."""
    merged, off = (getattr(projection, n, False) is True for n in ("merged", "disable_adapters"))
    base = getattr(projection, "base_layer", None)  # none where it is the linear layer itself
    return merged is not off and (base is None or is_linear(base) or _adds_nothing(base))


def shapes_of_weights(width: int, kdim: int, vdim: int) -> Shapes:
    """What ``check_weights`` expects for so many features."""
    packed = width == kdim == vdim
    return (
        ("in_proj_weight", (3 * width, width)) if packed else ("q_proj_weight", (width, width)),
        ("k_proj_weight", (width, kdim)),
        ("v_proj_weight", (width, vdim)),
        ("in_proj_bias", (3 * width,)),
        ("out_proj.weight", (width, width)),
        ("out_proj.bias", (width,)),
        ("bias_k", (1, 1, width)),
        ("bias_v", (1, 1, width)),
    )


def check_weights(weights: Weights, shapes: Shapes) -> None:
    """Check the shapes of the weights, which kernels trust, and that they are in one place.

    Raises:
        ValueError: a shape is not that of the module's sizes, or a device not the others'.
    """
    where = weights.out_proj_weight.device
    for weight, (name, shape) in zip(weights, shapes, strict=True):
        if weight is None:
            continue
        if weight.shape != shape:
            raise ValueError(f"{name} must have the shape {shape}, but got {tuple(weight.shape)}")
        if weight.device != where:
            raise ValueError(
                f"{name} must be on {where} as out_proj.weight is, but is on {weight.device}"
            )


def check_source(module: nn.MultiheadAttention, known: tuple[str, ...]) -> None:
    """Check that the weights of ``module`` are the ``known`` ones, or what those are made of.

    Raises:
        TypeError: a subclass has weights besides, of which nothing is known here.
    """
    names = ((name, name.replace("parametrizations.", "")) for name in module.state_dict())
    besides = [name for name, what in names if not what.startswith(known)]
    if besides:
        raise TypeError(
            f"a {type(module).__name__} has weights that torch.nn.MultiheadAttention has not, "
            f"{', '.join(besides)}, and may compute something else; if not, build a module by "
            "hand and load the others with load_state_dict(..., strict=False)"
        )


def check_change(name: str, before: Any, value: Any, of_weights: bool, streams: bool) -> None:
    """Check that an attribute that decides the shape of the state may become another now.

    Raises:
        ValueError: the weights fix it, or there are streams.
    """
    if of_weights:
        raise ValueError(
            f"{name}={before} is that of the weights and cannot become {value!r}; make a new module"
        )
    if streams:
        raise ValueError(
            f"the state is that of {name}={before}; call clean_state() before setting it to "
            f"{value!r}"
        )


def check_tokens(
    module: nn.MultiheadAttention, tokens: Tokens, layout: str, feature_axis: int
) -> None:
    """Check query, key and value, laid out as ``layout`` says, against each other and the module.

    Raises:
        ValueError: a rank, a size or a device does not fit.
        TypeError: one is not a tensor, or its dtype is not the module's (autocast aside).
    """
    query, key, value = tokens
    widths = (module.embed_dim, module.kdim, module.vdim)
    weight = out_weight(module)
    _check_one(weight, "query", query, widths[0], layout, feature_axis)
    if is_shared(tokens) and widths[0] == widths[1] == widths[2]:
        return
    for role, x, width in zip(_ROLES[1:], (key, value), widths[1:], strict=True):
        _check_one(weight, role, x, width, layout, feature_axis)


def _check_one(
    weight: Tensor, role: str, x: Tensor, width: int, layout: str, feature_axis: int
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{role} must be a tensor {layout}, but got {type(x).__name__}")
    if not is_plain(x):
        raise TypeError(f"{role} must be a plain dense tensor {layout}, but got {how_stored(x)}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{role} must have the shape {layout}, but got {tuple(x.shape)}")
    if x.shape[feature_axis] != width:
        raise ValueError(
            f"{role} must have {width} features on axis {feature_axis} of {layout}, "
            f"but its shape is {tuple(x.shape)}"
        )
    if x.dtype != weight.dtype and not (autocast_dtype(x.device.type) and x.is_floating_point()):
        raise TypeError(
            f"{role} must be {weight.dtype} as the module's weights are, but got {x.dtype}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"{role} must be on {weight.device} as the module's weights are, but is on {x.device}"
        )


def check_same_steps(tokens: Tokens) -> None:
    """Check that tokens ``(N, ...)`` or ``(N, T, ...)`` agree in streams and steps.

    Raises:
        ValueError: they do not.
    """
    leading = [tuple(x.shape[:-1]) for x in tokens]
    if leading[0] != leading[1] or leading[0] != leading[2]:
        shapes = ", ".join(
            f"{role} {tuple(x.shape)}" for role, x in zip(_ROLES, tokens, strict=True)
        )
        raise ValueError(f"query, key and value must agree in streams and steps, but got {shapes}")


def check_clips(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that clips ``(N, L, E)``, ``(N, S, Ek)`` and ``(N, S, Ev)`` belong together.

    Raises:
        ValueError: sizes differ.
    """
    if key.shape[:2] != value.shape[:2] or query.shape[0] != key.shape[0]:
        raise ValueError(
            f"key and value must agree in batch and length, query in batch; as (N, L, E) they are "
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        )


def check_query_index(length: int, query_index: int) -> None:
    """Check that a clip of ``length`` tokens has the one that asks.

    Raises:
        ValueError: it has not.
    """
    if not -length <= query_index < length:
        raise ValueError(
            f"query_index={query_index} needs a longer clip than one of {length} tokens"
        )


def check_continues(state: State, tokens: Tokens, layout: Layout) -> None:
    """Check that ``tokens`` can be the next of the streams in ``state``.

    Raises:
        ValueError: another number of streams, another device, or tokens that the state cannot keep.
        TypeError: another dtype.
    """
    query, kept = tokens[0], ring.like_tokens(state)
    anew = "call clean_state() to start anew"
    streams = state.position.shape[0]
    if query.shape[0] != streams:
        raise ValueError(
            f"the state is that of {streams} streams, but got tokens for {query.shape[0]}; "
            f"{anew} with another batch size"
        )
    if kept is not None and query.dtype != kept.dtype:
        raise TypeError(f"the state is {kept.dtype}, but got tokens of {query.dtype}; {anew}")
    device = state.position.device
    if query.device != device:
        raise ValueError(f"the state is on {device}, but got tokens on {query.device}; {anew}")
    if layout.formulation == "input" and not is_shared(tokens):
        raise ValueError(
            "formulation='input' keeps one token for query, key and value, but got a key or value "
            "of its own; use formulation='kv'"
        )


def check_formulation(formulation: str, embed_dim: int, kdim: int, vdim: int) -> None:
    """Check the constructor's keyword ``formulation``.

    Raises:
        ValueError: there is none of that name, or it does not serve these sizes.
    """
    if formulation not in ("auto", "kv", "input"):
        raise ValueError(f"formulation must be auto, kv or input, but got {formulation!r}")
    if formulation == "input" and not embed_dim == kdim == vdim:
        raise ValueError(
            "formulation='input' keeps one token for query, key and value, and needs kdim and vdim "
            f"equal to embed_dim={embed_dim}, but got {kdim} and {vdim}"
        )


def check_cache_dtype(cache_dtype: torch.dtype | None) -> None:
    """Check the constructor's keyword ``cache_dtype``.

    Raises:
        ValueError: rings are not kept so.
    """
    known = isinstance(cache_dtype, torch.dtype) and cache_dtype in STORED_AS
    if cache_dtype is not None and not known:
        expected = ", ".join(map(str, STORED_AS))
        raise ValueError(f"cache_dtype must be None, {expected}, but got {cache_dtype!r}")


def check_active(active: Tensor, query: Tensor) -> None:
    """Check a mask of active streams against the query of a step.

    Raises:
        ValueError: another shape or device.
        TypeError: not a bool tensor.
    """
    if not isinstance(active, Tensor) or active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, but got {_kind(active)}")
    if active.shape != query.shape[:1] or active.device != query.device:
        raise ValueError(
            f"active must have the shape {tuple(query.shape[:1])} on {query.device}, "
            f"but got {tuple(active.shape)} on {active.device}"
        )


def check_batch_size(batch_size: int) -> None:
    """Check a number of streams.

    Raises:
        ValueError: it is negative.
        TypeError: it is not an integer.
    """
    check_count("batch_size", batch_size, 0)


def check_count(name: str, count: int, least: int) -> None:
    """Check a number of things.

    Raises:
        ValueError: there are less than ``least``.
        TypeError: it is not an integer.
    """
    if not is_integer(count):
        raise TypeError(f"{name} must be an integer, but got {_shown(count)}")
    if count < least:
        few = "not be negative" if least == 0 else f"be at least {least}"
        raise ValueError(f"{name} must {few}, but got {count}")


def check_step_shape(step_shape: Sequence[int], embed_dim: int) -> None:
    """Check the shape of a query token ``(N, E)``.

    Raises:
        ValueError: it is another.
    """
    sized = isinstance(step_shape, Sequence) and len(step_shape) == 2
    if not sized or step_shape[1] != embed_dim:
        raise ValueError(f"step_shape must be (N, {embed_dim}), but got {step_shape!r}")
    check_batch_size(step_shape[0])


def check_stream_index(index: int, state: State) -> None:
    """Check the number of a stream.

    Raises:
        ValueError: there is no such stream.
        TypeError: it is not an integer.
    """
    if not is_integer(index):
        raise TypeError(f"the number of a stream must be an integer, but got {index!r}")
    streams = state.position.shape[0]
    if not 0 <= index < streams:
        raise ValueError(f"there are streams 0 to {streams - 1}, but got {index}")


def stream_mask(streams: Tensor | Sequence[int] | int, position: Tensor) -> Tensor:
    """The streams to reset as a bool mask ``(N,)`` beside ``position``.

    Indices on a device other than the CPU are not checked: that would wait for the device.

    Raises:
        ValueError: a mask of another shape or device, or an index out of range.
        TypeError: neither a bool mask nor integers.
    """
    try:
        # not where torch makes tensors by default, from which it would be copied back
        given = streams if isinstance(streams, Tensor) else torch.as_tensor(streams, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(streams).__name__
        raise TypeError(f"streams must be a bool mask or integers, but got {kind}") from error
    if given.dtype == torch.bool:
        given = given if isinstance(streams, Tensor) else given.to(position.device)
        if given.shape != position.shape or given.device != position.device:
            raise ValueError(
                f"a mask of streams must have the shape {tuple(position.shape)} on "
                f"{position.device}, but got {tuple(given.shape)} on {given.device}"
            )
        return given
    if given.numel() and (given.is_floating_point() or given.is_complex()):
        raise TypeError(f"streams must be a bool mask or integers, but got {given.dtype}")
    given = given.to(torch.int64).reshape(-1)
    count = position.shape[0]
    if given.device.type == "cpu" and given.numel():
        least, most = int(given.min()), int(given.max())
        if least < 0 or most >= count:
            raise ValueError(
                f"there are streams 0 to {count - 1}, but got indices from {least} to {most}"
            )
    given = given.to(position.device)
    return (torch.arange(count, device=position.device)[:, None] == given).any(dim=1)


def check_timeout(timeout: float | None) -> None:
    """Check seconds to wait, or None.

    Raises:
        ValueError: it is NaN, which would wait for ever.
    """
    if timeout is not None and math.isnan(timeout):
        raise ValueError("timeout must be seconds, or None to wait for ever, but is NaN")


def is_integer(number: Any) -> bool:
    """Whether it is one to ``operator.index``, as those of numpy are; a bool is none here."""
    if isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool:
        return False
    try:
        operator.index(number)
    except TypeError:
        return False
    return True


def _shown(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"


def _kind(x: object) -> str:
    return f"one of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def merged_mask(
    num_heads: int,
    key: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> Tensor | None:
    """Both masks of ``forward`` as one to add to scores ``(N, H, S)``, or None.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a mask is no tensor, or neither bool nor floating point.
    """
    if key_padding_mask is None and attn_mask is None:
        return None
    batch, length = key.shape[:2]
    merged = None
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch, length)], key)
        merged = _additive(key_padding_mask, key).view(batch, 1, length)
    if attn_mask is not None:
        shapes = [(1, length), (batch * num_heads, 1, length)]
        _check_mask("attn_mask", attn_mask, shapes, key)
        shape = (1, 1, length) if attn_mask.dim() == 2 else (batch, num_heads, length)
        added = _additive(attn_mask, key).reshape(shape)
        merged = added if merged is None else merged + added
    return merged


def check_causal(is_causal: bool, attn_mask: Tensor | None) -> None:
    """Check that what ``is_causal`` says something about is there, as torch does.

    Raises:
        ValueError: it is not.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal=True says that attn_mask is causal, but there is no attn_mask")


def _check_mask(name: str, mask: Tensor, shapes: Sequence[tuple[int, ...]], key: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, but got {type(mask).__name__}")
    if not is_plain(mask):
        raise TypeError(f"{name} must be a plain dense tensor, but got {how_stored(mask)}")
    if tuple(mask.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{name} must have the shape {expected}, but got {tuple(mask.shape)}")
    if mask.device != key.device:
        raise ValueError(f"{name} must be on {key.device} as the key is, but is on {mask.device}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating point, but got {mask.dtype}")


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(
        mask, -math.inf
    )
