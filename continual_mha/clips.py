"""One query over a clip: in which formulation, by which kernels, and with what gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, inputs, mixing, ops
from .dropout import dropout_seed
from .modes import is_batched, is_opaque, is_transformed
from .precision import autocast_dtype
from .products import multiply
from .reference import Options, Tokens, Weights

# From so many streams on torch multiplies bfloat16 faster than the CPU kernels: see docs/cpu.md.
_CPU_MANY_STREAMS = 64
# And in training products of so many multiply-adds, or with AMX of more tokens.
_CPU_LARGE_PRODUCT = 1 << 22
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
    extra_slots = _has_extra_slots(weights, options)
    if moved and options.dropout_p == 0.0 and _cpu_runs_at_once(args, extra_slots):
        out, attn = backends.run("single_query", args)
        return out, attn if need_weights else None
    node = _Node(num_heads, index, options.dropout_p, need_weights, blank)
    if moved and _is_one_node(node, clips, weights, options, mask):
        given = (None if asked is key else query, key, None if value is key else value)
        out, attn = _AttendClip.apply(node, *given, mask, *weights[:6])
        return out, attn if need_weights else None
    return inputs.attend_clip(tokens, weights, *how, mixing.mix)


def _has_extra_slots(weights: Weights, options: Options) -> bool:
    return weights.bias_k is not None or options.add_zero_attn


def _cpu_runs_at_once(args: tuple[Any, ...], extra_slots: bool) -> bool:
    """Whether to run ``attend_clip`` by the CPU's operator for all of it, without a gradient."""
    query, key, num_heads = args[0], args[1], args[12]
    if backends.order(query.device.type)[0] != "cpu":
        return False
    if mixing.why_plain(query) or _needs_gradient(args):
        return False
    if backends.forced():
        return True  # or it says why not
    if query.dtype == torch.bfloat16 and query.shape[0] >= _CPU_MANY_STREAMS:
        projections_dominate = num_heads * key.shape[1] < 2 * query.shape[1]
        by_node = not extra_slots and _unit_multiplies(query, args[3:9])
        if projections_dominate or by_node:
            return False
    return backends.why_not_later("cpu", "single_query", args) is None


def _needs_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd follows a function of these arguments."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _is_one_node(
    node: _Node, clips: Tokens, weights: Weights, options: Options, mask: Tensor | None
) -> bool:
    """Whether ``_AttendClip`` serves: in training, and where the CPU's matrix unit multiplies,
    but for what looks into it or it does not know.

    ``torch.compile`` writes the parts of a gradient in place by itself.
    """
    asked, key, value = clips
    if _has_extra_slots(weights, options) or is_opaque(asked):
        return False
    if not _needs_gradient((*clips, *weights)):
        asking = asked[:, node.query_index]
        if not _unit_multiplies(asking, weights[:6]):
            return False
    as_moved = key[:, :1].expand(-1, node.num_heads, -1)  # what decides is shape and dtype
    how = (mask, node.dropout_p, node.need_weights)
    return mixing.why_not_fused(as_moved, key, value, *how) is None


def _library_multiplies(tokens: Tensor, params: Sequence[Tensor | None]) -> bool:
    """Whether to multiply tokens ``(N, E)`` and weights by the CPU library, where autograd does not
    follow: where it was faster than torch's in docs/cpu.md."""
    if backends.order(tokens.device.type)[0] != "cpu":
        return False
    if backends.why_not("cpu", "product_", (tokens, *params)) is not None:
        return False
    isa = _native.cpu_isa()
    if tokens.dtype == torch.float16:
        return isa != "baseline"
    if isa not in ("amx", "avx512_bf16", "avx512"):
        return False
    if tokens.dtype != torch.bfloat16:
        return True
    if isa == "amx":
        return tokens.shape[0] <= _CPU_MOST_TOKENS_OF_UNIT
    return tokens.numel() * tokens.shape[1] < _CPU_LARGE_PRODUCT


def _unit_multiplies(tokens: Tensor, params: Sequence[Tensor | None]) -> bool:
    """Whether it does so by the processor's matrix unit, which is faster in inference as well."""
    bfloat16 = tokens.dtype == torch.bfloat16
    return bfloat16 and _library_multiplies(tokens, params) and _native.cpu_isa() == "amx"


class _Node(NamedTuple):
    """What ``_AttendClip`` is told besides tensors."""

    num_heads: int
    query_index: int
    dropout_p: float
    need_weights: bool
    blank: bool

    def asking(self, query: Tensor | None, key: Tensor) -> Tensor:
        """The queries' tokens ``(N, E)``."""
        return key[:, self.query_index] if query is None else query


class _Found(NamedTuple):
    """What the gradients need of the forward."""

    q: Tensor  # (N, H, D)
    moved: Tensor  # (N, H, Ek)
    mixed: Tensor  # (N, H, Ev)
    share: Tensor | None
    lse: Tensor
    kept: Tensor
    heads: Tensor  # (N, E)
    seed: Tensor | None


class _AttendClip(torch.autograd.Function):
    """Attention over inputs with its projections, without extra slots, as one node of autograd.

    From single operators autograd would make, for each part that is taken of the packed weight or
    of the clip, a gradient as large as the whole, and add them up. This writes every part in place.
    A query of None is a token of the keys, and a value of None the keys. Returns the output and the
    averaged weights, the latter without elements where they are not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        node: _Node,
        query: Tensor | None,
        key: Tensor,
        value: Tensor | None,
        mask: Tensor | None,
        *params: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weights = _without_extra_slots(params)
        (w_q, w_k, w_v), (b_q, _, b_v) = weights.split(), weights.split_bias()
        asking = node.asking(query, key)
        by_library = _library_multiplies(asking, params)
        q = multiply(asking, w_q.t(), b_q, by_library=by_library)
        q = q.unflatten(-1, (node.num_heads, -1))
        moved = inputs.moved_queries(q, w_k, by_library)
        seed = dropout_seed(node.dropout_p, key.device)
        name = "attend_shared"
        args: tuple[Any, ...] = (moved, key, value, mask, None)
        if not mixing.is_plain(node.dropout_p, node.need_weights):
            name, args = f"{name}_full", (*args, seed, node.dropout_p, node.need_weights)
        mixed, lse, *more = backends.run_directly(name, *args)
        kept, attn = more or (lse.new_empty(0), lse.new_empty(0))
        share = None if seed is None else kept.unsqueeze(-1)
        if mask is not None and node.blank:
            mixed, share = mixing.blanked(mixed, share, lse)
        heads = inputs.projected_mix(mixed, share, w_v, b_v, by_library).flatten(1)
        ctx.node, ctx.by_library = node, by_library
        ctx.set_materialize_grads(False)  # the weights are often asked for, and seldom used
        found = _Found(q, moved, mixed, share, lse, kept, heads, seed)
        ctx.save_for_backward(query, key, value, mask, *params, *found)
        w_o, b_o = weights.out_proj_weight, weights.out_proj_bias
        return multiply(heads, w_o.t(), b_o, by_library=by_library), attn

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_attn: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which may be asked for but once
        given, found = saved[:10], _Found(*saved[10:])
        if grad_out is None:
            grad_out = torch.zeros_like(found.heads)
        grads = (grad_out, grad_attn if ctx.node.need_weights else None)
        needed = _Needed(*ctx.needs_input_grad[1:])
        followed = torch.is_grad_enabled() or is_transformed()  # the former with create_graph
        if followed or any(map(is_batched, grads)):
            return None, *_gradients_by_operators(ctx.node, given, found.seed, grads, needed)
        with _without_autocast(grad_out.device.type):
            return None, *_gradients(ctx.node, ctx.by_library, given, found, grads, needed)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """As the forward ran, whatever surrounds its backward."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _without_extra_slots(params: Sequence[Any]) -> Weights:
    return Weights._make((*params, None, None))


class _Needed(NamedTuple):
    """Which arguments of a node need a gradient."""

    query: bool
    key: bool
    value: bool
    mask: bool
    in_proj_weight: bool
    k_proj_weight: bool
    v_proj_weight: bool
    in_proj_bias: bool
    out_proj_weight: bool
    out_proj_bias: bool


def _gradients(
    node: _Node,
    by_library: bool,
    given: tuple[Any, ...],
    found: _Found,
    grads: tuple[Tensor, Tensor | None],
    needed: _Needed,
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments ``given`` to a node, of those that need one."""
    query, key, value, mask, *params = given
    weights = _without_extra_slots(params)
    (w_q, w_k, w_v), (_, _, b_v) = weights.split(), weights.split_bias()
    d_out, d_attn = grads
    q, moved, mixed, share, lse, kept, heads, seed = found
    N, H, D = q.shape
    scale = 1.0 / math.sqrt(D)
    # what they take, from the queries' projection to the heads' outputs
    asking_in_clip = needed.key and query is None
    of_queries = needed.query or asking_in_clip or needed.in_proj_weight or needed.in_proj_bias
    of_attention = of_queries or needed.key or needed.value or needed.k_proj_weight
    of_heads = of_attention or needed.v_proj_weight
    d_query = d_key = d_value = None
    d_params: list[Any] = [
        x.new_empty(x.shape) if x is not None and need else None
        for x, need in zip(params, needed[4:], strict=True)
    ]
    # one buffer for what is one parameter, of which these are the parts
    d_w_q, d_w_k, d_w_v = d_params[:3] if params[1] is not None else _parts(d_params[0])
    d_b_q, d_b_k, d_b_v = _parts(d_params[3])
    product = partial(multiply, by_library=by_library)

    if needed.out_proj_weight:
        product(d_out.t(), heads, out=d_params[4])
    if needed.out_proj_bias:
        torch.sum(d_out, 0, out=d_params[5])
    if of_heads:
        d_heads = product(d_out, weights.out_proj_weight).view(N, H, D)
        if d_w_v is not None:
            by_head = d_w_v.unflatten(0, (H, D))
            product(d_heads.permute(1, 2, 0), mixed.transpose(0, 1), out=by_head)
        if d_b_v is not None:
            torch.sum(d_heads if share is None else d_heads * share, 0, out=d_b_v.view(H, D))
    if of_attention:
        d_mixed = product(d_heads.transpose(0, 1), w_v.unflatten(0, (H, D))).transpose(0, 1)
        d_kept = None
        if seed is not None and b_v is not None:
            d_kept = (d_heads * b_v.view(H, D)).sum(-1).to(kept.dtype)
        if mask is not None and node.blank:
            hidden = torch.isneginf(lse)
            d_mixed = d_mixed.masked_fill(hidden.unsqueeze(-1), 0.0)
            d_kept = None if d_kept is None else d_kept.masked_fill(hidden, 0.0)
        operands = (moved, key, value, mask, None, seed, mixed, lse, kept, node.dropout_p)
        of_tiles = needed.key or needed.value
        d_moved, d_key, d_value, _ = ops.shared_gradients(
            backends.run_directly, of_tiles, d_mixed, None, d_kept, d_attn, *operands
        )
        d_moved = d_moved.transpose(0, 1)  # (H, N, Ek)
        if d_w_k is not None:
            by_head = d_w_k.unflatten(0, (H, D))
            product(q.permute(1, 2, 0), d_moved, scale=scale, out=by_head)
        if d_b_k is not None:
            d_b_k.zero_()  # in every score of a head alike, so that the softmax takes it away
    if of_queries:
        d_q = product(d_moved, w_k.unflatten(0, (H, D)).transpose(1, 2), scale=scale)
        d_q = d_q.transpose(0, 1).reshape(N, H * D)
        if d_w_q is not None:
            product(d_q.t(), node.asking(query, key), out=d_w_q)
        if d_b_q is not None:
            torch.sum(d_q, 0, out=d_b_q)
        if needed.query:
            d_query = product(d_q, w_q)
        if asking_in_clip:
            assert d_key is not None
            product(d_q, w_q, out=d_key[:, node.query_index], add=True)
    gradients = (d_query, d_key, d_value, None, *d_params)
    return tuple(x if need else None for x, need in zip(gradients, needed, strict=True))


def _parts(packed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of query, key and value of a parameter that has all three."""
    return (None,) * 3 if packed is None else packed.chunk(3)


def _gradients_by_operators(
    node: _Node,
    given: tuple[Any, ...],
    seed: Tensor | None,
    grads: tuple[Tensor, Tensor | None],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same by operators that can be differentiated and transformed, from the arguments on.

    What they are of are views: a gradient then ends here, even where one argument comes from
    another or is given twice, and no hook of an argument runs.
    """
    create_graph = torch.is_grad_enabled()
    options = Options(False, node.dropout_p)
    with torch.enable_grad(), _without_autocast(given[1].device.type):
        given = tuple(None if x is None else x.view_as(x) for x in given)
        query, key, value, mask, *params = given
        tokens = (node.asking(query, key), key, key if value is None else value)
        weights = _without_extra_slots(params)
        how = (node.num_heads, options, mask, node.need_weights, node.blank, True)
        again = None if seed is None else partial(mixing.fused_mix, seed=seed)
        results = inputs.attend_clip(tokens, weights, *how, again)
        followed = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
        outs, grads_of_outs = zip(*followed, strict=True)
        wanted = [x for x, need in zip(given, needed, strict=True) if need]
        gradients = torch.autograd.grad(
            outs, wanted, grads_of_outs, create_graph=create_graph, allow_unused=True
        )
    found = iter(gradients)
    return tuple(next(found) if need else None for need in needed)
