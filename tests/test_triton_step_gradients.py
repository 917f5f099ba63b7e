"""Gradients of `forward_step` by Triton's kernels in the dtypes that a GPU has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracles import ROUNDING, build
from trained_streams import drawn_calls, run
from triton_cases import needs_kernels

import continual_mha as co

pytestmark = needs_kernels


@pytest.fixture(autouse=True)
def by_triton() -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda") if on_gpu else nullcontext(), co.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_bias_kv": True, "add_zero_attn": True, "query_index": 0},
        {"formulation": "input"},
        {"formulation": "input", "add_bias_kv": True, "query_index": -2},
    ],
    ids=str,
)
def test_they_err_as_much_as_in_plain_pytorch(
    arguments: dict[str, Any], dtype: torch.dtype
) -> None:
    """In the root of the mean square: of so few numbers the largest error says little.

    Of tokens that leave every slot a share: where one takes all, as of normal ones here, what is
    left of the gradients are differences of equal numbers, in which either may be the luckier.
    """
    module = build(embed_dim=32, num_heads=2, sequence_len=3, dtype=dtype, **arguments)
    steps = [(given[0].detach().mul(0.3).requires_grad_(),) * 3 for given in drawn_calls(module, 4)]
    assert "triton: runs it, and makes new rings" in co.explain(module, steps[0][0])
    found = run(module, steps)
    with co.use_backend("torch"):
        plain = run(module, steps)
        wide = [(given[0].detach().double().requires_grad_(),) * 3 for given in steps]
        exact = run(module.double(), wide)
    for left, right, best in zip(found, plain, exact, strict=True):
        if best is not None and best.any():
            error, allowed = (torch.dist(x.double(), best) / best.norm() for x in (left, right))
            assert error <= 1.5 * allowed + ROUNDING[dtype]  # NaN fails too
