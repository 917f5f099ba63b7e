"""One query over a clip: in which formulation, by which kernels, and with what gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native, backends, inputs, mixing
from .clip_node import AttendClip, Node
from .modes import is_opaque
from .reference import Options, Tokens, Weights, has_extra_slots

# From so many streams on torch multiplies bfloat16 faster than the CPU kernels: see docs/cpu.md.
_CPU_MANY_STREAMS = 64
# And in training products of so many multiply-adds, or with AMX those of more tokens.
_CPU_LARGE_PRODUCT = 1 << 24
_CPU_MOST_TOKENS_OF_UNIT = 512


def input_formulation_is_cheaper(
    num_heads: int, clip_len: int, embed_dim: int, kdim: int, vdim: int
) -> bool:
    """Whether moving the key and value projections to the query's side saves multiply-adds.

    Projecting a clip of ``S`` tokens costs ``S E (Ek + Ev)``, and the attention ``2 S E``. Moving
    the projections costs ``E (Ek + Ev)`` once, and the attention over inputs ``H S (Ek + Ev)``.
    """
    projected = clip_len * embed_dim * (kdim + vdim) + 2 * clip_len * embed_dim
    moved = (embed_dim + num_heads * clip_len) * (kdim + vdim)
    return moved < projected


def attend_clip(
    clips: Tokens,
    index: int,
    weights: Weights,
    num_heads: int,
    options: Options,
    mask: Tensor | None = None,
    need_weights: bool = False,
    blank: bool = True,
    average: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``inputs.attend_clip`` in the formulation that is cheaper, fused where that gains.

    Query, key and value are ``(N, S, E*)``; it is the query of the token ``index`` that asks.
    """
    asked, key, value = clips
    query = asked[:, index]
    sizes = (key.shape[1], query.shape[-1], key.shape[-1], value.shape[-1])
    # all kernels are for moved projections: who forces them means them whatever they cost
    kernels = backends.forced() not in (None, "torch")
    moved = kernels or input_formulation_is_cheaper(num_heads, *sizes)
    tokens = (query, key, value)
    how = (num_heads, options, mask, need_weights, blank, moved)
    if need_weights and not average:
        backends.leave_to_pytorch("single_query", "it averages the weights over the heads")
        return inputs.attend_clip(tokens, weights, *how, average=False)
    # the operator for all of it computes weights where NaN is asked for
    as_with_weights = need_weights or (mask is not None and not blank)
    args = (*tokens, *weights, mask, num_heads, options.add_zero_attn, as_with_weights)
    extra_slots = has_extra_slots(weights, options.add_zero_attn)
    if moved and options.dropout_p == 0.0 and _cpu_runs_at_once(args, extra_slots):
        out, attn = backends.run("single_query", args)
        return out, attn if need_weights else None
    if moved and not extra_slots and _is_one_node(args, options.dropout_p, need_weights):
        by_library = _library_multiplies(query, weights[:6])
        node = Node(num_heads, index, options.dropout_p, need_weights, blank, by_library)
        given = (None if asked is key else query, key, None if value is key else value)
        out, attn = AttendClip.apply(node, *given, mask, *weights[:6])
        return out, attn if need_weights else None
    return inputs.attend_clip(tokens, weights, *how, mixing.mix)


def _cpu_runs_at_once(args: tuple[Any, ...], extra_slots: bool) -> bool:
    """Whether to run ``attend_clip`` by the CPU's operator for all of it, without a gradient."""
    query, key, num_heads = args[0], args[1], args[12]
    if backends.order(query.device.type)[0] != "cpu":
        return False
    if mixing.why_plain(query) or _needs_gradient(args):
        return False
    if backends.forced():
        return True  # or it says why not
    if query.shape[0] >= _CPU_MANY_STREAMS and _torch_may_be_faster(query):
        projections_dominate = num_heads * key.shape[1] < 2 * query.shape[1]
        by_node = not extra_slots and _unit_multiplies(query, args[3:9])
        if projections_dominate or by_node:
            return False
    return backends.why_not_later("cpu", "single_query", args) is None


def _torch_may_be_faster(query: Tensor) -> bool:
    """Whether torch multiplies by instructions of bfloat16, as far as that can be asked now."""
    if query.dtype != torch.bfloat16:
        return False
    known = not is_opaque(query) and backends.why_missing("cpu") is None
    return not known or _native.cpu_isa() not in ("avx2", "avx512")


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd follows a function of these arguments."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _is_one_node(args: tuple[Any, ...], dropout_p: float, need_weights: bool) -> bool:
    """Whether ``AttendClip`` serves: in training, and where the CPU's matrix unit multiplies,
    but for what looks into it or it does not know.

    ``torch.compile`` writes the parts of a gradient in place by itself.
    """
    query, key, value, mask, num_heads = *args[:3], *args[11:13]
    if is_opaque(query):
        return False
    if not _needs_gradient(args) and not _unit_multiplies(query, args[3:9]):
        return False
    as_moved = key[:, :1].expand(-1, num_heads, -1)  # what decides is shape and dtype
    return mixing.why_not_fused(as_moved, key, value, mask, dropout_p, need_weights) is None


def _library_multiplies(tokens: Tensor, params: Sequence[Tensor | None]) -> bool:
    """Whether a node is the CPU library's with its products of tokens ``(N, E)`` and weights: where
    those were faster than torch's in docs/cpu.md."""
    if backends.order(tokens.device.type)[0] != "cpu":
        return False
    if backends.why_not("cpu", "product_", (tokens, *params)) is not None:
        return False
    isa, bfloat16 = _native.cpu_isa(), tokens.dtype == torch.bfloat16
    if isa == "baseline":
        return False
    if bfloat16 and isa == "amx":
        return tokens.shape[0] <= _CPU_MOST_TOKENS_OF_UNIT
    wide = tokens.dtype in (torch.float32, torch.float64)
    if (bfloat16 and isa == "avx512_bf16") or (wide and isa == "avx2"):
        return tokens.numel() * tokens.shape[1] < _CPU_LARGE_PRODUCT
    return True


def _unit_multiplies(tokens: Tensor, params: Sequence[Tensor | None]) -> bool:
    """Whether it does so by the processor's matrix unit, which is faster in inference as well."""
    bfloat16 = tokens.dtype == torch.bfloat16
    return bfloat16 and _library_multiplies(tokens, params) and _native.cpu_isa() == "amx"
