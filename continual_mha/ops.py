"""The operators: schemas, fake kernels, gradients and registrations, and nothing else.

``Library.define`` and ``impl`` rather than ``custom_op``: a step is bound by the cost of its
launch, and the former adds about 2 µs to a call where the latter adds 16. Operators that end in an
underscore write to the arguments marked ``!`` and are for inference: a schema that mutates cannot
have a formula for its gradient. Those of steps come from ``attend_window``, which writes nothing,
or from ``reference.py`` and ``inputs.py``. Second derivatives come from ``reference.py``.

With ``k_scale`` and ``v_scale``, ``(N, H, L, 1)`` in fp32, the rings of keys and values are those
of ``quantized.py``: int8, or uint8 for the bits of e4m3; so is that of inputs with ``x_scale``,
``(N, L, 1)``. Callers without them leave them out.

Each operator stands three times: under its own name, which asks ``backends`` who runs it, and with
the prefixes ``cpu_`` and ``cuda_``, which the native libraries implement if they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _native, backends, reference
from .nodes import as_in_forward, is_followed
from .precision import autocast_dtype, wide
from .tracing import is_opaque

NAMESPACE = "continual_mha"

_TOKENS_AND_WEIGHTS = (
    "Tensor query, Tensor key, Tensor value, "
    "Tensor in_proj_weight, Tensor? k_proj_weight, Tensor? v_proj_weight, Tensor? in_proj_bias, "
    "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor? bias_k, Tensor? bias_v, "
)
_STEP_ARGS = _TOKENS_AND_WEIGHTS + (
    "Tensor(a!) k_ring, Tensor(b!) v_ring, Tensor(c!) q_ring, Tensor(d!) position, "
)
_STEP_OPTIONS = "bool add_zero_attn, float dropout_p, bool update"
_STEP_MORE = "Tensor(e!)? k_scale=None, Tensor(f!)? v_scale=None, bool batch_invariant=False"
_INPUT_ARGS = (
    "Tensor query, "
    "Tensor in_proj_weight, Tensor? in_proj_bias, Tensor out_proj_weight, Tensor? out_proj_bias, "
    "Tensor? bias_k, Tensor? bias_v, Tensor(a!) x_ring, Tensor(b!) position, "
    "int num_heads, int delay, "
)
_INPUT_MORE = "Tensor(c!)? x_scale=None, bool batch_invariant=False"
_SHARED_ARGS = "Tensor query, Tensor key, Tensor? value, Tensor? mask, Tensor? sink"
_CLIP_WEIGHTS = (
    "Tensor in_proj_weight, Tensor? k_proj_weight, Tensor? v_proj_weight, Tensor? in_proj_bias, "
    "Tensor out_proj_weight, Tensor? out_proj_bias"
)
_CLIP_ARGS = f"Tensor? query, Tensor key, Tensor? value, Tensor? mask, {_CLIP_WEIGHTS}"
_NODE_ARGS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor k_ring, Tensor v_ring, "
    f"{_CLIP_WEIGHTS}, Tensor position"
)
_FULL_BACKWARD_ARGS = (
    "Tensor grad_out, Tensor? grad_lse, Tensor? grad_kept, Tensor? grad_average, "
    f"{_SHARED_ARGS}, Tensor? seed, Tensor out, Tensor lse, Tensor kept, float dropout_p"
)
_WINDOW_ARGS = (
    "Tensor query, Tensor key, Tensor value, Tensor k_ring, Tensor v_ring, Tensor position, "
    "Tensor? sink, Tensor? seed"
)

SCHEMAS = {
    "ring_step_": f"({_STEP_ARGS} Tensor? active, {_STEP_OPTIONS}, {_STEP_MORE}) -> Tensor",
    "ring_steps_": f"({_STEP_ARGS} SymInt first, {_STEP_OPTIONS}, {_STEP_MORE}) -> Tensor",
    "input_step_": f"({_INPUT_ARGS} Tensor? active, {_STEP_OPTIONS}, {_INPUT_MORE}) -> Tensor",
    "input_steps_": f"({_INPUT_ARGS} SymInt first, {_STEP_OPTIONS}, {_INPUT_MORE}) -> Tensor",
    "single_query": f"({_TOKENS_AND_WEIGHTS} Tensor? mask, int num_heads, bool add_zero_attn, "
    "bool need_weights) -> (Tensor, Tensor)",
    "attend_shared": f"({_SHARED_ARGS}) -> (Tensor, Tensor)",
    "attend_shared_backward": f"(Tensor grad_out, Tensor? grad_lse, {_SHARED_ARGS}, "
    "Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)",
    "attend_shared_full": f"({_SHARED_ARGS}, Tensor? seed, float dropout_p, bool need_weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "attend_shared_full_backward": f"({_FULL_BACKWARD_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    "attend_shared_query_backward": f"({_FULL_BACKWARD_ARGS}) -> (Tensor, Tensor)",
    "attend_window": f"({_WINDOW_ARGS}, SymInt first, float dropout_p) -> (Tensor, Tensor)",
    "attend_window_backward": f"(Tensor grad_out, Tensor? grad_lse, {_WINDOW_ARGS}, Tensor out, "
    "Tensor lse, SymInt first, float dropout_p, bool rings) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}

# Operators of the CPU library alone, for callers that are not compiled. `cpu_bind_*` keeps a step's
# arguments under a number, and `cpu_bound_step_` takes the step for any token and mask; torch is
# not told of the rings to which it writes. `cpu_attend_clip`, `cpu_ring_step_backward` and
# `cpu_new_ring_steps` are what the nodes of autograd do in one call each way, `cpu_product_` is the
# product of which they are made, for tests, and `cpu_take_slots` is `reference.take_slots`.
_OF_CPU = {
    **{
        f"cpu_bind_{n}": SCHEMAS[n].replace("-> Tensor", "-> int")
        for n in ("ring_step_", "input_step_")
    },
    "cpu_bound_step_": "(int bound, Tensor query, Tensor? active) -> Tensor",
    "cpu_attend_clip": f"({_CLIP_ARGS}, Tensor? seed, int num_heads, int query_index, "
    "float dropout_p, bool need_weights, bool blank) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cpu_attend_clip_backward": f"(Tensor grad_out, Tensor? grad_attn, {_CLIP_ARGS}, Tensor? seed, "
    "Tensor q, Tensor moved, Tensor mixed, Tensor lse, Tensor kept, Tensor heads, int num_heads, "
    "int query_index, float dropout_p, bool blank, bool[] needed) -> Tensor?[]",
    "cpu_ring_step_backward": "(Tensor? grad_out, Tensor? grad_k_ring, Tensor? grad_v_ring, "
    f"{_NODE_ARGS}, bool[] needed) -> Tensor?[]",
    "cpu_new_ring_steps": f"({_NODE_ARGS}, Tensor? seed, int first, float dropout_p) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cpu_new_ring_steps_backward": "(Tensor? grad_out, Tensor? grad_k_ring, "
    f"Tensor? grad_v_ring, {_NODE_ARGS}, Tensor? seed, Tensor projected, Tensor heads, Tensor lse, "
    "int first, float dropout_p, bool[] needed) -> Tensor?[]",
    "cpu_product_": "(Tensor(a!) out, Tensor left, Tensor right, Tensor? bias, float scale, "
    "bool add) -> ()",
    "cpu_take_slots": "(Tensor ring, Tensor position, int first, int count) -> Tensor",
}

_library = torch.library.Library(NAMESPACE, "DEF")


def _output_dtype(query: Tensor) -> torch.dtype:
    return autocast_dtype(query.device.type) or query.dtype


def _fake_step(query: Tensor, *args: Any) -> Tensor:
    return query.new_empty(query.shape, dtype=_output_dtype(query))


def _fake_steps(first: int, query: Tensor, *args: Any) -> Tensor:
    """Of an operator whose argument number ``first`` is the first token with an output."""
    shape = (query.shape[0], query.shape[1] - args[first - 1], query.shape[2])
    return query.new_empty(shape, dtype=_output_dtype(query))


def _fake_single_query(
    query: Tensor, key: Tensor, value: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    bias_k, (add_zero_attn, need_weights) = args[6], args[10:]
    extra_slots = int(bias_k is not None) + int(add_zero_attn)  # numbers: a bool is no size
    slots = key.shape[1] + extra_slots
    shape = (query.shape[0], slots) if need_weights else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=wide(query.dtype))


def _fake_attend_shared(
    query: Tensor, key: Tensor, value: Tensor | None, mask: Tensor | None, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:2], (key if value is None else value).shape[2]))
    return out, query.new_empty(query.shape[:2], dtype=wide(query.dtype))


def _fake_attend_shared_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_sink = lse.new_empty(0) if sink is None else torch.empty_like(sink, dtype=lse.dtype)
    d_query, d_key = query.new_empty(query.shape), key.new_empty(key.shape)
    d_value = key.new_empty(0) if value is None else value.new_empty(value.shape)
    return d_query, d_key, d_value, d_sink


def _fake_attend_shared_full(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _fake_attend_shared(query, key, value, mask, sink)
    kept = lse.new_empty(0) if seed is None else torch.empty_like(lse)
    average = lse.new_empty((key.shape[0], key.shape[1]) if need_weights else 0)
    return out, lse, kept, average


def _fake_attend_shared_full_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_kept: Tensor | None,
    grad_average: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    mask: Tensor | None,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kept: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_attend_shared_backward(grad_out, lse, query, key, value, mask, sink, out, lse)


def _fake_attend_shared_query_backward(*args: Any) -> tuple[Tensor, Tensor]:
    d_query, _, _, d_sink = _fake_attend_shared_full_backward(*args)
    return d_query, d_sink


def _fake_attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    first: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    N, T, H, D = query.shape
    out = query.new_empty((N, T - first, H, D))
    return out, query.new_empty((N, T - first, H), dtype=wide(query.dtype))


def _fake_attend_window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    first: int,
    dropout_p: float,
    rings: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (query.new_empty(query.shape) for _ in range(3))
    d_k_ring, d_v_ring = (query.new_empty(k_ring.shape if rings else 0) for _ in range(2))
    d_sink = lse.new_empty(0 if sink is None else lse.shape)
    return d_query, d_key, d_value, d_k_ring, d_v_ring, d_sink


def _fake_take_slots(ring: Tensor, position: Tensor, first: int, count: int) -> Tensor:
    return ring.new_empty((*ring.shape[:-2], count, ring.shape[-1]))


_FAKES: dict[str, Callable[..., Any]] = {
    "ring_step_": _fake_step,
    "ring_steps_": partial(_fake_steps, 15),
    "input_step_": _fake_step,
    "input_steps_": partial(_fake_steps, 11),
    "single_query": _fake_single_query,
    "attend_shared": _fake_attend_shared,
    "attend_shared_backward": _fake_attend_shared_backward,
    "attend_shared_full": _fake_attend_shared_full,
    "attend_shared_full_backward": _fake_attend_shared_full_backward,
    "attend_shared_query_backward": _fake_attend_shared_query_backward,
    "attend_window": _fake_attend_window,
    "attend_window_backward": _fake_attend_window_backward,
}


Run = Callable[..., Any]  # takes an operator's name and arguments, as ``_by_name``


def _by_name(name: str, *args: Any) -> Any:
    return getattr(torch.ops.continual_mha, name)(*args)


def _by_name_if_opaque(name: str, *args: Any) -> Any:
    return (_by_name if is_opaque(args[0]) else backends.run_directly)(name, *args)


def _run_backward(run: Run, name: str, *args: Any) -> Any:
    """The backward operator ``name``, or what can be differentiated once more or transformed."""
    followed = is_followed(x for x in args if isinstance(x, Tensor))
    return getattr(reference, name)(*args) if followed else run(name, *args)


def shared_gradients(
    run: Run, of_tiles: bool, *args: Any
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Gradients of query, key, value and sink of ``attend_shared`` and ``attend_shared_full``.

    Args:
        of_tiles: whether key or value needs one; if not, both get None.
        args: those of ``attend_shared_full_backward``.
    """
    if not of_tiles:
        d_query, d_sink = run("attend_shared_query_backward", *args)
        return d_query, None, None, d_sink
    plain = _native.plain_backward(args)
    name = "attend_shared_full_backward" if plain is None else "attend_shared_backward"
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = run(name, *(plain or args))
    return gradients


def _differentiate_shared(
    run: Run, ctx: Any, grad_out: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of the five tensors that both operators begin with."""
    value, sink, out = args[5], args[7], args[9]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    of_tiles = any(ctx.needs_input_grad[1:3])
    run_backward = partial(_run_backward, run)
    d_query, d_key, d_value, d_sink = shared_gradients(run_backward, of_tiles, grad_out, *args)
    d_value = None if value is None else d_value
    return d_query, d_key, d_value, None, None if sink is None else d_sink.to(sink.dtype)


def _save_for_attend_shared(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # only extra slots ask for the second result


def _differentiate_attend_shared(
    run: Run, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grads = (grad_out, grad_lse, None, None)
    return _differentiate_shared(run, ctx, *grads, *inputs, None, out, lse, lse, 0.0)


def _save_for_attend_shared_full(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    *tensors, ctx.dropout_p, ctx.need_weights = inputs
    out, lse, kept, _ = output
    ctx.save_for_backward(*tensors, out, lse, kept)
    ctx.set_materialize_grads(False)  # the weights are often asked for, and seldom differentiated


def _differentiate_attend_shared_full(
    run: Run,
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_kept: Tensor | None,
    grad_average: Tensor | None,
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_kept = None if saved[5] is None else grad_kept  # a result without elements has none
    grad_average = grad_average if ctx.need_weights else None
    grads = (grad_out, grad_lse, grad_kept, grad_average)
    return *_differentiate_shared(run, ctx, *grads, *saved, ctx.dropout_p), None, None, None


def _save_for_attend_window(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, ctx.first, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # only extra slots ask for the second result


def _differentiate_attend_window(
    run: Run, ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    sink, out = saved[6], saved[8]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    rings = any(ctx.needs_input_grad[3:5])
    how = (ctx.first, ctx.dropout_p, rings)
    *grads, d_k_ring, d_v_ring, d_sink = _run_backward(
        run, "attend_window_backward", grad_out, grad_lse, *saved, *how
    )
    of_rings = (d_k_ring, d_v_ring) if rings else (None, None)
    d_sink = None if sink is None else d_sink.to(sink.dtype)
    return *grads, *of_rings, None, d_sink, None, None, None


_DIFFERENTIABLE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "attend_shared": (_differentiate_attend_shared, _save_for_attend_shared),
    "attend_shared_full": (_differentiate_attend_shared_full, _save_for_attend_shared_full),
    "attend_window": (_differentiate_attend_window, _save_for_attend_window),
}


def _function_of(name: str) -> type[torch.autograd.Function]:
    """The operator with its gradients, for callers that need no name."""
    differentiate, save = _DIFFERENTIABLE[name]

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = backends.run_directly(name, *args)
            save(ctx, args, output)
            ctx.forced = backends.forced()
            return output

        backward = staticmethod(as_in_forward(partial(differentiate, _by_name_if_opaque)))

    return Operator


_FUNCTIONS = {name: _function_of(name) for name in _DIFFERENTIABLE}


def call(name: str, *args: Any) -> Any:
    """Run an operator that has gradients: by its name where it is opaque.

    By name autograd takes 40 µs more on a CPU, a sixth of a small call forward.
    """
    if is_opaque(args[0]):
        return _by_name(name, *args)
    return _FUNCTIONS[name].apply(*args)


def _register() -> None:
    for name, schema in SCHEMAS.items():
        for prefix in ("", "cpu_", "cuda_"):
            _library.define(prefix + name + schema)
            fake = f"{NAMESPACE}::{prefix}{name}"
            torch.library.register_fake(fake, _FAKES[name], lib=_library)
        for key in ("CPU", "CUDA"):
            _library.impl(name, partial(backends.run_directly, name), key)
    for name, schema in _OF_CPU.items():
        _library.define(name + schema)
    take_slots = f"{NAMESPACE}::cpu_take_slots"
    torch.library.register_fake(take_slots, _fake_take_slots, lib=_library)
    for name, (differentiate, save) in _DIFFERENTIABLE.items():
        gradients = partial(differentiate, _by_name)
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", gradients, setup_context=save, lib=_library
        )


_register()
