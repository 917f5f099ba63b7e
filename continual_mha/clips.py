"""One query over a clip: in which formulation, by which kernels, and with what gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, inputs, mixing
from .clip_node import (
    AttendClip,
    ClipCall,
    Node,
    as_moved,
    attended,
    is_large_product,
    node_of,
    unit_multiplies,
)
from .inputs import Mixing
from .operands import Tokens, Weights, has_extra_slots
from .tracing import is_opaque, needs_gradient

# From so many streams on torch multiplies bfloat16 faster than the CPU kernels: see docs/cpu.md.
_CPU_MANY_STREAMS = 64
_AVERAGES = "it averages the weights over the heads"
# How many eighths of multiply-adds more kernels are worth: as many as moving the projections of a
# clip of one token adds, where heads have eight features or more.
_WORTH_OF_KERNELS = 1


def input_formulation_is_cheaper(
    num_heads: int, clip_len: int, embed_dim: int, kdim: int, vdim: int, eighths: int = 0
) -> bool:
    """Whether moving the key and value projections to the query's side saves multiply-adds, or adds
    less than so many eighths of them: in whole numbers, which ``torch.export`` can solve for.

    Projecting a clip of ``S`` tokens costs ``S E (Ek + Ev)``, and the attention ``2 S E``. Moving
    the projections costs ``E (Ek + Ev)`` once, and the attention over inputs ``H S (Ek + Ev)``.
    """
    projected = clip_len * embed_dim * (kdim + vdim) + 2 * clip_len * embed_dim
    moved = (embed_dim + num_heads * clip_len) * (kdim + vdim)
    return 8 * moved < (8 + eighths) * projected


class ClipWay(NamedTuple):
    """How one query attends to clips.

    Attributes:
        run: takes query, key and value as ``(N, S, E*)``, weights and a mask, and returns the
            output ``(N, E)`` and the attention weights.
        moved: whether the projections of keys and values are moved to the query's side.
    """

    run: partial[tuple[Tensor, Tensor | None]]
    moved: bool


def way_of_clip(clips: Tokens, weights: Weights, mask: Tensor | None, call: ClipCall) -> ClipWay:
    """How ``inputs.attend_clip`` is done: in the formulation that is cheaper, fused where that
    gains. The same way serves all tensors like these.

    Raises:
        RuntimeError: a backend was forced that cannot do it.
    """
    asked, key, value = clips
    query = asked[:, call.query_index]
    # all kernels are for moved projections: who forces them means them whatever they cost
    kernels = backends.forced() not in (None, "torch")
    averages = call.average or not call.need_weights
    may_run = averages and backends.order(query.device.type)[0] != "torch"
    may_run = may_run and backends.why_plain(query) is None and not _is_for_torch(query)
    eighths = _WORTH_OF_KERNELS if may_run else 0
    moved = kernels or input_formulation_is_cheaper(call.num_heads, *_sizes(clips), eighths)
    if not averages:
        backends.leave_to_pytorch("single_query", _AVERAGES)
        return ClipWay(partial(_by_operators, call, moved, None), moved)
    # the operator for all of it computes weights where NaN is asked for
    as_with_weights = call.need_weights or (mask is not None and not call.blank)
    rest = (call.num_heads, call.options.add_zero_attn, as_with_weights)
    args = (query, key, value, *weights, mask, *rest)
    extra_slots = has_extra_slots(weights, call.options.add_zero_attn)
    if moved and call.options.dropout_p == 0.0 and _cpu_runs_at_once(args, extra_slots):
        run = None if is_opaque(query) else backends.choose("single_query", args)
        return ClipWay(partial(_at_once, call, rest, run), True)
    # what is dropped of extra slots cannot be drawn again
    known = not extra_slots or call.options.dropout_p == 0.0
    if moved and known and _is_one_node(args, call):
        node = node_of(query, key, None if value is key else value, mask, weights, call)
        return ClipWay(partial(_by_node, node, needs_gradient(args)), True)
    return ClipWay(partial(_by_operators, call, moved, mixing.mix), moved)


def explain_clip(
    clips: Tokens, weights: Weights, mask: Tensor | None, call: ClipCall
) -> tuple[str, list[str]]:
    """The formulation in which ``way_of_clip`` does it; a line for each backend that is asked."""
    asked, key, value = clips
    name = mixing.operator_for(call.options.dropout_p, call.need_weights)
    args = attended(key, value, mask, call)
    if call.need_weights and not call.average:
        moved = input_formulation_is_cheaper(call.num_heads, *_sizes(clips))
        return _formulation(moved), backends.reasons_to_leave(asked, _AVERAGES)
    try:
        way = way_of_clip(clips, weights, mask, call)
    except RuntimeError:  # one is forced that cannot
        return _formulation(True), backends.reasons(name, args)
    formulation = _formulation(way.moved)
    if way.run.func is _at_once:
        all_of_it = (asked[:, call.query_index], key, value, *weights, mask, *way.run.args[1])
        return formulation, backends.reasons("single_query", all_of_it)
    if way.run.func is _by_node and way.run.args[0].attend is None:
        first = backends.order(asked.device.type)[0]
        return formulation, [f"{first}: runs it, as one node of autograd"]
    if not way.moved:
        return formulation, ["torch: runs it, which is cheaper here than what has kernels"]
    if reason := _why_not_fused(key, value, mask, call):
        return formulation, backends.reasons_to_leave(asked, reason)
    lines = backends.reasons(name, args)
    return formulation, ["torch: multiplies by the weights; the rest:", *lines]


def _formulation(moved: bool) -> str:
    return "input" if moved else "kv"


def _sizes(clips: Tokens) -> tuple[int, int, int, int]:
    """The clip's length, and the features of query, key and value."""
    query, key, value = clips
    return key.shape[1], query.shape[-1], key.shape[-1], value.shape[-1]


def _at_once(
    call: ClipCall,
    rest: tuple[Any, ...],
    run: Callable[..., tuple[Tensor, Tensor]] | None,
    clips: Tokens,
    weights: Weights,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """By the operator for all of it, as it was chosen, or by its name where it is opaque."""
    asked, key, value = clips
    args = (asked[:, call.query_index], key, value, *weights, mask, *rest)
    out, attn = backends.run("single_query", args) if run is None else run(*args)
    return out, attn if call.need_weights else None


def _by_node(
    node: Node, trains: bool, clips: Tokens, weights: Weights, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    asked, key, value = clips
    query = None if asked is key else asked[:, node.call.query_index]
    given = (query, key, None if value is key else value, mask, *weights)
    out, attn = AttendClip.apply(node, *given) if trains else AttendClip.results(node, given)
    return out, attn if node.call.need_weights else None


def _by_operators(
    call: ClipCall,
    moved: bool,
    mixing: Mixing | None,
    clips: Tokens,
    weights: Weights,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """By operators each of which autograd knows."""
    asked, key, value = clips
    tokens = (asked[:, call.query_index], key, value)
    how = (call.num_heads, call.options, mask, call.need_weights, call.blank, moved, mixing)
    return inputs.attend_clip(tokens, weights, *how, call.average)


def _cpu_runs_at_once(args: tuple[Any, ...], extra_slots: bool) -> bool:
    """Whether to run ``attend_clip`` by the CPU's operator for all of it, without a gradient."""
    query, key, num_heads = args[0], args[1], args[12]
    if backends.order(query.device.type)[0] != "cpu":
        return False
    if backends.why_plain(query) or needs_gradient(args):
        return False
    if backends.forced():
        return True  # or it says why not
    if query.shape[0] >= _CPU_MANY_STREAMS and _torch_may_be_faster(query):
        projections_dominate = num_heads * key.shape[1] < 2 * query.shape[1]
        by_node = not extra_slots and unit_multiplies(query, args[3:9])
        if projections_dominate or by_node:
            return False
    return backends.why_not_later("cpu", "single_query", args) is None


def _is_for_torch(query: Tensor) -> bool:
    """Whether torch's products are known to be faster than CPU kernels."""
    if backends.order(query.device.type)[0] != "cpu" or is_opaque(query):
        return False
    return backends.why_missing("cpu") is None and is_large_product(query)


def _torch_may_be_faster(query: Tensor) -> bool:
    """Whether torch multiplies by instructions of bfloat16, as far as that can be asked now."""
    if query.dtype != torch.bfloat16:
        return False
    known = not is_opaque(query) and backends.why_missing("cpu") is None
    return not known or _native.cpu_isa() not in ("avx2", "avx512")


def _is_one_node(args: tuple[Any, ...], call: ClipCall) -> bool:
    """Whether ``AttendClip`` serves: in training, and in inference where that is faster than the
    operators, but for what looks into it or it does not know.

    ``torch.compile`` writes the parts of a gradient in place by itself.
    """
    query, key, value, mask = *args[:3], args[11]
    if is_opaque(query):
        return False
    faster = backends.order(query.device.type)[0] == "triton"
    if not (faster or needs_gradient(args) or unit_multiplies(query, args[3:9])):
        return False
    return _why_not_fused(key, value, mask, call) is None


def _why_not_fused(key: Tensor, value: Tensor, mask: Tensor | None, call: ClipCall) -> str | None:
    """``mixing.why_not_fused`` of the queries with moved projections."""
    how = (call.options.dropout_p, call.need_weights)
    return mixing.why_not_fused(as_moved(key, call.num_heads), key, value, mask, *how)
