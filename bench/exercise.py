"""``python3 -m bench.exercise``: small calls of every kernel, compared with float64 on the CPU.

Also for compute-sanitizer. Shapes are small, because a watched kernel is many times slower; but
windows wrap around, streams differ in age, and one window is long enough to be divided among
programs.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

import continual_mha
from continual_mha import SingleOutputMultiheadAttention

from .lost import why_lost
from .problem import TOLERANCE


class Shape(NamedTuple):
    """Of a module, and how many streams it has."""

    streams: int
    embed_dim: int
    num_heads: int
    sequence_len: int
    dtype: torch.dtype


SHAPES = (
    Shape(1, 64, 4, 5, torch.float32),
    Shape(3, 48, 4, 9, torch.float32),
    Shape(18, 64, 2, 7, torch.bfloat16),
    Shape(1, 64, 2, 1100, torch.bfloat16),
)


def module_of(
    shape: Shape, formulation: str, device: torch.device
) -> SingleOutputMultiheadAttention:
    """The module that is called."""
    module = SingleOutputMultiheadAttention(
        shape.embed_dim, shape.num_heads, sequence_len=shape.sequence_len, formulation=formulation,
        query_index=-2, device=device, dtype=shape.dtype,
    )  # fmt: skip
    return module.requires_grad_(False)


def clip_of(
    module: SingleOutputMultiheadAttention, streams: int, device: torch.device
) -> torch.Tensor:
    """Random tokens for ``calls``, in the dtype of the module."""
    size = (streams, module.sequence_len + 3, module.embed_dim)
    return torch.randn(size, device=device).to(module.out_proj.weight.dtype)


def calls(
    module: SingleOutputMultiheadAttention, clip: torch.Tensor
) -> Iterator[Callable[[], torch.Tensor | None]]:
    """Calls of all three forwards, from cold streams to warm ones of mixed ages."""
    length = module.sequence_len
    active = torch.arange(clip.shape[0], device=clip.device) % 2 == 0
    for token in clip[:, :2].unbind(1):
        yield partial(module.forward_step, token)
    yield partial(module.forward_steps, clip)
    yield lambda: module.reset(active)
    for token in clip[:, : min(length, 12) + 2].unbind(1):
        yield partial(module.forward_step, token, active=active)
    yield partial(module.forward_step, clip[:, 0], update_state=False)
    yield lambda: module.forward(clip)[0]

    def trained() -> torch.Tensor | None:
        with torch.enable_grad():
            x = clip.clone().requires_grad_(True)
            module.forward(x)[0].sum().backward()
        return x.grad

    yield trained


def main(arguments: list[str] | None = None) -> None:
    """Make the calls on each backend; exit with an error if one fails or a result is wrong."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.exercise", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append", help="by default triton and cuda")
    options = parser.parse_args(arguments)
    failures = 0
    for backend in options.backend or ("triton", "cuda"):
        if missing := continual_mha.backends.why_missing(backend):
            print(f"{backend}: {missing}")
            failures += 1
            continue
        for shape in SHAPES:
            for formulation in ("kv", "input"):
                module = module_of(shape, formulation, torch.device(options.device))
                about = f"N={shape.streams} {shape.dtype} {module.extra_repr()}"
                about = f"{backend} {formulation} {about}"
                try:
                    print(f"{about}: {_check(backend, module, shape.streams)}", flush=True)
                except Exception as error:  # the other shapes may tell more
                    failures += 1
                    print(f"{about}: {type(error).__name__}: {error}"[:400], flush=True)
                    if reason := why_lost(torch.device(options.device)):
                        raise SystemExit(reason) from error
    if failures:
        raise SystemExit(f"{failures} failed")


def _check(backend: str, module: SingleOutputMultiheadAttention, streams: int) -> str:
    """Make every call; what the backend declines is counted, and made by plain PyTorch."""
    weight = module.out_proj.weight
    clip = clip_of(module, streams, torch.device("cpu"))
    exact = copy.deepcopy(module).to("cpu", torch.float64)
    pairs = zip(calls(module, clip.to(weight.device)), calls(exact, clip.double()), strict=True)
    declined, errors = 0, []
    for call, exact_call in pairs:
        with torch.no_grad(), continual_mha.use_backend("torch"):
            expected = exact_call()
        try:
            with torch.no_grad(), continual_mha.use_backend(backend):
                out = call()
        except RuntimeError as error:
            if "no backend can run" not in str(error):
                raise
            declined += 1
            with torch.no_grad(), continual_mha.use_backend("torch"):
                out = call()
        if (out is None) != (expected is None):
            raise RuntimeError(f"call {len(errors)} returned {out}, expected {expected}")
        if out is None or expected is None:
            continue
        error = (out.cpu().double() - expected).norm() / expected.norm()
        if not error <= TOLERANCE[str(weight.dtype).removeprefix("torch.")]:
            raise RuntimeError(f"output {len(errors)} has a relative error of {error:.1e}")
        errors.append(float(error))
    return f"{len(errors)} outputs, worst error {max(errors):.1e}, {declined} calls declined"


if __name__ == "__main__":
    main()
