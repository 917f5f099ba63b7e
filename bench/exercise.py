"""``python3 -m bench.exercise``: small calls of every kernel, for compute-sanitizer.

Shapes are small, because a watched kernel is many times slower; but windows wrap around, streams
differ in age, and one window is long enough to be divided among programs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import torch

import continual_mha
from continual_mha import SingleOutputMultiheadAttention

# N, E, H, L, dtype
SHAPES = (
    (1, 64, 4, 5, torch.float32),
    (3, 48, 4, 9, torch.float32),
    (18, 64, 2, 7, torch.bfloat16),
    (1, 64, 2, 1100, torch.bfloat16),
)


def _calls(
    module: SingleOutputMultiheadAttention, streams: int
) -> Iterator[Callable[[], torch.Tensor | None]]:
    """Calls of all three forwards, from cold streams to warm ones of mixed ages."""
    weight, length = module.out_proj.weight, module.sequence_len
    options = {"device": weight.device, "dtype": weight.dtype}
    clip = torch.randn(streams, length + 3, module.embed_dim, **options)
    active = torch.arange(streams, device=weight.device) % 2 == 0
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
    """Make the calls on every backend that loads; exit with an error if a result is not finite."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.exercise", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", action="append", help="by default triton and cuda")
    options = parser.parse_args(arguments)
    for backend in options.backend or ("triton", "cuda"):
        if backend not in continual_mha.backends.available():
            print(f"{backend}: {continual_mha.backends.why_not(backend, 'ring_step_', ())}")
            continue
        for streams, embed_dim, heads, length, dtype in SHAPES:
            for formulation in ("kv", "input"):
                module = SingleOutputMultiheadAttention(
                    embed_dim, heads, sequence_len=length, formulation=formulation,
                    query_index=-2, device=options.device, dtype=dtype,
                ).requires_grad_(False)  # fmt: skip
                _check(backend, module, streams)


def _check(backend: str, module: SingleOutputMultiheadAttention, streams: int) -> None:
    """Make every call; what the backend declines is counted."""
    made = declined = 0
    with torch.no_grad(), continual_mha.use_backend(backend):
        for call in _calls(module, streams):
            try:
                out = call()
            except RuntimeError as error:
                if "no backend can run" not in str(error):
                    raise
                declined += 1
                continue
            made += 1
            if out is not None and not out.isfinite().all():
                raise SystemExit(f"{backend}, {module}: a result is not finite")
    sizes = f"N={streams} {module.extra_repr()}"
    print(f"{backend} {module.formulation} {sizes}: {made} made, {declined} declined", flush=True)


if __name__ == "__main__":
    main()
