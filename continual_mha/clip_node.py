"""One query over a clip with its projections, as one node of autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, backends, extra_slots, inputs, mixing, ops
from .dropout import dropout_seed
from .nodes import as_in_forward, gradients_by_operators, is_followed, without_autocast
from .operands import Options, Weights, has_extra_slots
from .products import Multiply, multiplier, sum_over_tokens

# In training torch is faster from products of so many multiply-adds on, or with AMX above so many
# tokens: see docs/cpu.md.
_CPU_LARGE_PRODUCT = 1 << 24
_CPU_MOST_TOKENS_OF_UNIT = 512


class ClipCall(NamedTuple):
    """What is asked of a clip, besides its tensors.

    Attributes:
        query_index: the token that asks.
        blank: whether a query to which the mask leaves nothing gets zeros, and not NaN.
        average: whether to average the weights over the heads.
    """

    num_heads: int
    query_index: int
    options: Options
    need_weights: bool
    blank: bool
    average: bool


class Node(NamedTuple):
    """What ``AttendClip`` is told besides tensors.

    Attributes:
        call: what is asked, which are no weights of single heads.
        attend: the function that runs ``mixing.operator_for`` on such tensors; None for the CPU
            library's operator for all of it, products included, which knows no extra slots.
    """

    call: ClipCall
    attend: Callable[..., Any] | None

    def asking(self, query: Tensor | None, key: Tensor) -> Tensor:
        """The queries' tokens ``(N, E)``."""
        return key[:, self.call.query_index] if query is None else query


def node_of(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    weights: Weights,
    call: ClipCall,
) -> Node:
    """The node for a query ``(N, E)``, keys ``(N, S, Ek)`` and values, None for the keys.

    Raises:
        RuntimeError: a backend was forced that cannot run it.
    """
    attend = None
    add_zero_attn, dropout_p = call.options
    if has_extra_slots(weights, add_zero_attn) or not _library_multiplies(query, weights[:6]):
        operator = mixing.operator_for(dropout_p, call.need_weights)
        attend = backends.choose(operator, attended(key, value, mask, call))
    return Node(call, attend)


def as_moved(key: Tensor, num_heads: int) -> Tensor:
    """Like moved queries in shape and dtype, which is all that decides."""
    return key[:, :1].expand(-1, num_heads, -1)


def attended(
    key: Tensor, value: Tensor | None, mask: Tensor | None, call: ClipCall
) -> tuple[Any, ...]:
    """What the operator for attention is given, as far as that decides who runs it."""
    how = (call.options.dropout_p, call.need_weights)
    rest = () if mixing.operator_for(*how) == "attend_shared" else (None, *how)
    own = None if value is key else value
    return (as_moved(key, call.num_heads), key, own, mask, None, *rest)


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
    return not is_large_product(tokens)


def is_large_product(tokens: Tensor) -> bool:
    """Whether torch multiplies tokens ``(N, E)`` and a weight faster than the CPU library, which is
    loaded, because they are so many."""
    isa = _native.cpu_isa()
    wide = isa == "avx2" and tokens.dtype in (torch.float32, torch.float64)
    by_unit = isa == "avx512_bf16" and tokens.dtype == torch.bfloat16
    return (wide or by_unit) and tokens.numel() * tokens.shape[1] >= _CPU_LARGE_PRODUCT


def unit_multiplies(tokens: Tensor, params: Sequence[Tensor | None]) -> bool:
    """Whether it does so by the processor's matrix unit, which is faster in inference as well."""
    bfloat16 = tokens.dtype == torch.bfloat16
    return bfloat16 and _library_multiplies(tokens, params) and _native.cpu_isa() == "amx"


class _Found(NamedTuple):
    """What the gradients need of the forward."""

    seed: Tensor | None
    q: Tensor  # (N, H, D)
    moved: Tensor  # (N, H, Ek)
    mixed: Tensor  # (N, H, Ev)
    lse: Tensor
    kept: Tensor
    heads: Tensor  # (N, E)
    share: Tensor | None = None  # (N, H, 1), which the library works out again
    extra: Tensor | None = None  # scores of the extra slots, (N, H, X)
    on_extra: Tensor | None = None  # their weights


class AttendClip(torch.autograd.Function):
    """Attention over inputs with its projections as one node of autograd.

    From single operators autograd would make, for each part that is taken of the packed weight or
    of the clip, a gradient as large as the whole, and add them up. This writes every part in place.
    A query of None is a token of the keys, and a value of None the keys. Returns the output and the
    averaged weights, the latter without elements where they are not asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        node: Node,
        query: Tensor | None,
        key: Tensor,
        value: Tensor | None,
        mask: Tensor | None,
        *params: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = (query, key, value, mask, *params)
        out, attn, found = _run(node, given)
        ctx.node, ctx.forced = node, backends.forced()
        ctx.set_materialize_grads(False)  # the weights are often asked for, and seldom used
        ctx.save_for_backward(*given, *found)
        return out, attn

    @staticmethod
    def results(node: Node, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """What ``apply`` returns, where no gradient is needed."""
        return _run(node, given)[:2]

    @staticmethod
    @as_in_forward
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_attn: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which may be asked for but once
        given, found = saved[:_GIVEN], _Found(*saved[_GIVEN:])
        if grad_out is None:
            grad_out = torch.zeros_like(found.heads)
        grads = (grad_out, grad_attn if ctx.node.call.need_weights else None)
        needed = Needed(*ctx.needs_input_grad[1:])
        if is_followed(grads):
            attend = partial(_attend_by_operators, ctx.node, found.seed)
            device = grad_out.device.type
            return None, *gradients_by_operators(attend, given, grads, needed, device)
        with without_autocast(grad_out.device.type):
            return None, *_gradients(ctx.node, given, found, grads, needed)


def gradients_of_output(
    node: Node, given: tuple[Any, ...], d_out: Tensor, needed: Needed
) -> tuple[Tensor | None, ...]:
    """Gradients of what a node is given, for callers who have kept nothing of its forward."""
    _, _, found = _run(node, given)
    return _gradients(node, given, found, (d_out, None), needed)


def _run(node: Node, given: tuple[Any, ...]) -> tuple[Tensor, Tensor, _Found]:
    run = _attend_by_library if node.attend is None else partial(_attend, node.attend)
    return run(node, given, dropout_seed(node.call.options.dropout_p, given[1].device))


def _attend_by_library(
    node: Node, given: tuple[Any, ...], seed: Tensor | None
) -> tuple[Tensor, Tensor, _Found]:
    num_heads, query_index, (_, dropout_p), need_weights, blank, _ = node.call
    how = (num_heads, query_index, dropout_p, need_weights, blank)
    out, attn, *found = _native.cpu_function("attend_clip")(*given[:10], seed, *how)
    return out, attn, _Found(seed, *found)


def _attend(
    attend: Callable[..., Any], node: Node, given: tuple[Any, ...], seed: Tensor | None
) -> tuple[Tensor, Tensor, _Found]:
    """The output, the averaged weights and what the gradients need, of a node's arguments."""
    query, key, value, mask, *params = given
    weights = Weights._make(params)
    (w_q, w_k, w_v), (b_q, b_k, b_v) = weights.split(), weights.split_bias()
    multiply, H = multiplier(key), node.call.num_heads
    add_zero_attn, dropout_p = node.call.options
    projected = multiply(node.asking(query, key), w_q.t(), b_q)
    N, E = projected.shape
    D = E // H
    q = projected.view(N, H, D)
    moved = _by_head(multiply, q, w_k.view(H, D, -1), scale=1.0 / math.sqrt(D))
    extra = extra_slots.moved_scores_of(q, weights, b_k, add_zero_attn)
    options = (dropout_p, node.call.need_weights, node.call.blank)
    mix, lse, kept = mixing.mix_by(attend, moved, key, value, mask, extra, *options, seed)
    mixed, share, on_extra, attn = mix
    by_value = w_v.view(H, D, -1).transpose(1, 2)
    bias = None if b_v is None else b_v.view(H, D)
    if bias is None or share is None:
        heads = _by_head(multiply, mixed, by_value, bias)
    else:
        heads = _by_head(multiply, mixed, by_value)
        heads = torch.addcmul(heads, bias, share.to(heads.dtype), out=heads)
    heads = extra_slots.with_bias(heads, on_extra, weights).view(N, E)
    out = multiply(heads, weights.out_proj_weight.t(), weights.out_proj_bias)
    found = _Found(seed, q, moved, mixed, lse, kept, heads, share, extra, on_extra)
    return out, lse.new_empty(0) if attn is None else attn, found


def _by_head(
    multiply: Multiply,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``(N, H, columns)``, contiguous, of ``(N, H, inner)`` and ``(H, inner, columns)``."""
    out = left.new_empty((*left.shape[:2], right.shape[2]))
    multiply(left.transpose(0, 1), right, bias, scale, out.transpose(0, 1))
    return out


class Needed(NamedTuple):
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
    bias_k: bool
    bias_v: bool


_GIVEN = len(Needed._fields)  # arguments of a node


def _gradients(node: Node, *args: Any) -> tuple[Tensor | None, ...]:
    run = _gradients_by_library if node.attend is None else _gradients_by_products
    return run(node, *args)


def _gradients_by_library(
    node: Node,
    given: tuple[Any, ...],
    found: _Found,
    grads: tuple[Tensor, Tensor | None],
    needed: Needed,
) -> tuple[Tensor | None, ...]:
    function = _native.cpu_function("attend_clip_backward")
    num_heads, query_index, (_, dropout_p), _, blank, _ = node.call
    how = (num_heads, query_index, dropout_p, blank)
    grads_of = function(*grads, *given[:10], *found[:7], *how, needed[:10])
    return *grads_of, None, None


def _gradients_by_products(
    node: Node,
    given: tuple[Any, ...],
    found: _Found,
    grads: tuple[Tensor, Tensor | None],
    needed: Needed,
) -> tuple[Tensor | None, ...]:
    """Gradients of the arguments ``given`` to a node, of those that need one."""
    query, key, value, mask, *params = given
    weights = Weights._make(params)
    (w_q, w_k, w_v), (_, b_k, b_v) = weights.split(), weights.split_bias()
    d_out, d_attn = grads
    seed, q, moved, mixed, lse, kept, heads, share, extra, on_extra = found
    N, H, D = q.shape
    scale = 1.0 / math.sqrt(D)
    # what they take, from the queries' projection to the heads' outputs
    asking_in_clip = needed.key and query is None
    of_queries = needed.query or asking_in_clip or needed.in_proj_weight or needed.in_proj_bias
    of_attention = of_queries or needed.key or needed.value or needed.k_proj_weight or needed.bias_k
    of_heads = of_attention or needed.v_proj_weight or needed.bias_v
    d_query = d_key = d_value = d_extra = None
    d_params: list[Any] = [
        x.new_empty(x.shape) if x is not None and need else None
        for x, need in zip(params, needed[4:], strict=True)
    ]
    # one buffer for what is one parameter, of which these are the parts
    d_w_q, d_w_k, d_w_v = d_params[:3] if params[1] is not None else _parts(d_params[0])
    d_b_q, d_b_k, d_b_v = _parts(d_params[3])

    multiply = multiplier(key)
    if needed.out_proj_weight:
        sum_over_tokens(d_out.t(), heads, d_params[4])
    if needed.out_proj_bias:
        torch.sum(d_out, 0, out=d_params[5])
    if of_heads:
        d_heads = multiply(d_out, weights.out_proj_weight).view(N, H, D)
        if d_w_v is not None:
            by_head = d_w_v.view(H, D, -1)
            sum_over_tokens(d_heads.permute(1, 2, 0), mixed.transpose(0, 1), by_head)
        if d_b_v is not None:
            torch.sum(d_heads if share is None else d_heads * share, 0, out=d_b_v.view(H, D))
        if needed.bias_v and on_extra is not None:
            torch.sum(d_heads * on_extra[..., :1], 0, out=d_params[7].view(H, D))
    if of_attention:
        d_mixed = _by_head(multiply, d_heads, w_v.view(H, D, -1))
        d_kept = d_lse = None
        if extra is not None and on_extra is not None:
            d_on_extra, d_attn = extra_slots.gradients_of_weights(
                d_heads, d_attn, on_extra, weights, b_v
            )
            d_extra = on_extra * d_on_extra
            d_lse = -d_extra.sum(-1)
        if seed is not None and b_v is not None:
            d_kept = (d_heads * b_v.view(H, D)).sum(-1).to(kept.dtype)
        if mask is not None and node.call.blank and extra is None:
            hidden = torch.isneginf(lse)
            d_mixed = d_mixed.masked_fill(hidden.unsqueeze(-1), 0.0)
            d_kept = None if d_kept is None else d_kept.masked_fill(hidden, 0.0)
        sink = extra_slots.sink(extra)
        dropout_p = node.call.options.dropout_p
        operands = (moved, key, value, mask, sink, seed, mixed, lse, kept, dropout_p)
        of_tiles = needed.key or needed.value
        d_moved, d_key, d_value, d_sink = ops.shared_gradients(
            backends.run_directly, of_tiles, d_mixed, d_lse, d_kept, d_attn, *operands
        )
        if d_extra is not None:
            assert extra is not None
            d_extra = scale * extra_slots.gradients_of_scores(d_extra, extra, d_sink)
        if d_w_k is not None:
            by_head = d_w_k.view(H, D, -1)
            sum_over_tokens(q.permute(1, 2, 0), d_moved.transpose(0, 1), by_head, scale)
        if d_b_k is not None:
            if d_extra is None:  # in all scores of a head alike: the softmax takes it away
                d_b_k.zero_()
            else:
                torch.sum(-d_extra.sum(-1, keepdim=True) * q, 0, out=d_b_k.view(H, D))
        if needed.bias_k and d_extra is not None:
            torch.sum(d_extra[..., :1] * q, 0, out=d_params[6].view(H, D))
    if of_queries:
        d_q = _by_head(multiply, d_moved, w_k.view(H, D, -1).transpose(1, 2), scale=scale)
        if d_extra is not None:
            d_q = extra_slots.gradients_of_queries(d_q, d_extra, weights, b_k)
        d_q = d_q.view(N, H * D)
        if d_w_q is not None:
            sum_over_tokens(d_q.t(), node.asking(query, key), d_w_q)
        if d_b_q is not None:
            torch.sum(d_q, 0, out=d_b_q)
        if needed.query:
            d_query = multiply(d_q, w_q)
        if asking_in_clip:
            assert d_key is not None
            multiply(d_q, w_q, out=d_key[:, node.call.query_index], add=True)
    gradients = (d_query, d_key, d_value, None, *d_params)
    return tuple(x if need else None for x, need in zip(gradients, needed, strict=True))


def _parts(packed: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of query, key and value of a parameter that has all three."""
    return (None,) * 3 if packed is None else packed.chunk(3)


def _attend_by_operators(
    node: Node,
    seed: Tensor | None,
    query: Tensor | None,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    *params: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The node's results by operators that autograd knows."""
    tokens = (node.asking(query, key), key, key if value is None else value)
    call = node.call
    how = (call.num_heads, call.options, mask, call.need_weights, call.blank, True)
    mix = None if seed is None else partial(mixing.fused_mix, seed=seed)
    return inputs.attend_clip(tokens, Weights._make(params), *how, mix)
