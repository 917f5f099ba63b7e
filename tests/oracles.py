"""What the tests compare with: attention over the sliding window, and how close is close enough.

Everything here works on tokens laid out batch first, (N, S, features), whatever layout the module
under test takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from continual_mha import SingleOutputMultiheadAttention

# Rounding that a result may add to twice the error of plain PyTorch, as a share of the largest
# expected magnitude.
ROUNDING = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# Errors that no computation in that precision may exceed here, however badly plain PyTorch does.
CEILING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

# Constructor arguments that change the arithmetic or the layout.
EMBED, HEADS, LENGTH = 12, 2, 5
CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no_bias": {"bias": False},
    "one_head": {"num_heads": 1},
    "head_dim_one": {"num_heads": EMBED},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv_and_zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_and_vdim": {"kdim": 7, "vdim": 10},
    "kdim": {"kdim": 7},
    "vdim": {"vdim": 10},
    "kdim_and_vdim_without_bias_with_extra_slots": {
        "kdim": 7,
        "vdim": 10,
        "bias": False,
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "first_query": {"query_index": 0},
    "last_query_counted_from_the_front": {"query_index": LENGTH - 1},
    "middle_query": {"query_index": 2},
    "query_before_the_last": {"query_index": -2},
    "first_query_counted_from_the_back": {"query_index": -LENGTH},
    "delayed_query_with_extra_slots": {
        "query_index": 1,
        "add_bias_kv": True,
        "add_zero_attn": True,
    },
    "sequence_first": {"batch_first": False},
    "sequence_first_delayed_with_kdim": {"batch_first": False, "query_index": -3, "kdim": 7},
    "embed_dim_second": {"embed_dim_second": True},
    "embed_dim_second_delayed_with_vdim": {"embed_dim_second": True, "query_index": 2, "vdim": 10},
}


def seeded(seed: int) -> torch.Generator:
    """A generator where tensors are made here; a plain one is the CPU's, and refuses all others."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def build(seed: int = 0, **arguments: Any) -> SingleOutputMultiheadAttention:
    """A module with every parameter random: biases of zero, as constructed, would hide mistakes."""
    arguments = {
        "embed_dim": EMBED,
        "num_heads": HEADS,
        "sequence_len": LENGTH,
        **arguments,
    }
    module = SingleOutputMultiheadAttention(**arguments)
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(2 * scale * values if parameter.dim() == 2 else 0.5 * values)
    return module


def draw_tokens(
    module: nn.MultiheadAttention, streams: int, count: int, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Query (N, S, E), key (N, S, kdim) and value (N, S, vdim) of `count` tokens, all different."""
    generator = seeded(seed)
    weight = module.out_proj.weight
    return tuple(  # type: ignore[return-value]
        torch.randn(streams, count, features, generator=generator, dtype=torch.float64).to(weight)
        for features in (module.embed_dim, module.kdim, module.vdim)
    )


def to_layout(module: SingleOutputMultiheadAttention, x: Tensor) -> Tensor:
    """(N, S, features) in the layout that `module` takes."""
    if module.embed_dim_second:
        return x.transpose(1, 2)
    return x if module.batch_first else x.transpose(0, 1)


from_layout = to_layout  # each of the layouts is its own inverse


def query_lag(module: SingleOutputMultiheadAttention) -> int:
    """How many tokens the query of an output is behind the newest, counted from its definition."""
    index = module.query_index % module.sequence_len
    return module.sequence_len - 1 - index


def torch_attention(module: nn.MultiheadAttention, dtype: torch.dtype | None = None):
    """`torch.nn.MultiheadAttention` with the parameters of `module`, as a function, batch first.

    Autograd reaches the parameters. It runs in training mode without dropout, so that it takes
    none of its fast paths."""
    dtype = dtype or module.out_proj.weight.dtype
    shell = nn.MultiheadAttention(
        module.embed_dim,
        module.num_heads,
        bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None,
        add_zero_attn=module.add_zero_attn,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=True,
        dtype=dtype,
    )
    shell.load_state_dict(module.state_dict())
    parameters = {name: p.to(dtype) for name, p in module.named_parameters()}

    def attend(query: Tensor, key: Tensor, value: Tensor, **arguments: Any):
        tokens = (query.to(dtype), key.to(dtype), value.to(dtype))
        for name in ("key_padding_mask", "attn_mask"):
            if name in arguments and arguments[name].is_floating_point():
                arguments[name] = arguments[name].to(dtype)
        return functional_call(shell, parameters, tokens, arguments)

    return attend


def window_attention(
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """Outputs (N, S - L + 1, E) of all full windows over S tokens: one masked call of PyTorch's."""
    key = query if key is None else key
    value = query if value is None else value
    length, lag, count = module.sequence_len, query_lag(module), query.shape[1]
    newest = torch.arange(length - 1, count, device=query.device)[:, None]  # of windows
    token = torch.arange(count, device=query.device)
    outside = (token > newest) | (token <= newest - length)
    queries = query[:, length - 1 - lag : count - lag]
    if len(newest) == 0 or query.shape[0] == 0:
        return query.new_empty(query.shape[0], len(newest), module.embed_dim, dtype=dtype)
    output, _ = torch_attention(module, dtype)(
        queries, key, value, attn_mask=outside, need_weights=False
    )
    return output


def assert_as_exact_as_torch(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    rounded: torch.dtype | None = None,
    in_mean: bool = False,
) -> None:
    """`actual` errs at most twice as much as `plain` PyTorch in the same dtype, plus rounding.

    Args:
        rounded: what both are computed from was rounded to this dtype before.
        in_mean: compare the roots of mean squares, and not the largest errors, which say little
            where there are few numbers.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    if exact.numel() == 0:
        return
    actual, exact, plain = (x.detach().cpu() for x in (actual, exact, plain))
    dtype = rounded or actual.dtype
    size = torch.linalg.vector_norm if in_mean else lambda x: x.abs().max()
    scale = max(size(exact).item(), 1e-3)
    error, plain_error = (size(x.double() - exact).item() / scale for x in (actual, plain))
    bound = min(2 * plain_error + ROUNDING[dtype], CEILING[dtype])
    assert error <= bound, f"relative error {error:.2e}, allowed {bound:.2e}"  # NaN fails too


def assert_equals_window(
    actual: Tensor,
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> None:
    """`actual` (N, S - L + 1, E) is attention over every full window of the given tokens."""
    with torch.no_grad():
        exact = window_attention(module, query, key, value)
        plain = window_attention(module, query, key, value, dtype=actual.dtype)
    assert_as_exact_as_torch(actual, exact, plain)


def assert_near(actual: Tensor, exact: Tensor, share: float) -> None:
    """No error is larger than `share` of the largest expected magnitude."""
    error = (actual.detach().double() - exact.detach().double()).abs().max()
    assert error <= share * exact.abs().max()


def step_through(
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **arguments: Any,
) -> list[Tensor | None]:
    """What `forward_step` answers to each of the tokens (N, S, features)."""
    return [
        module.forward_step(
            query[:, t],
            None if key is None else key[:, t],
            None if value is None else value[:, t],
            **arguments,
        )
        for t in range(query.shape[1])
    ]


def stack(outputs: list[Tensor | None], module: SingleOutputMultiheadAttention) -> Tensor:
    """Outputs of a stream from its first token on, (N, t, E); just the cold ones must be None."""
    cold = min(module.sequence_len - 1, len(outputs))
    assert all(output is None for output in outputs[:cold])
    warm = [output for output in outputs[cold:] if output is not None]
    assert len(warm) == len(outputs) - cold
    return torch.stack(warm, dim=1)


def run_steps(
    module: SingleOutputMultiheadAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    **arguments: Any,
) -> Tensor | None:
    """`forward_steps` on tokens (N, T, features), its output batch first."""
    tokens = [None if x is None else to_layout(module, x) for x in (query, key, value)]
    output = module.forward_steps(*tokens, **arguments)
    return None if output is None else from_layout(module, output)


def assert_same_state(left: Any, right: Any) -> None:
    """Two snapshots agree bit for bit (or both are None)."""
    assert (left is None) == (right is None)
    if left is None:
        return
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a.detach(), b.detach())
