"""``python -m bench.formulations``: what both formulations cost over the grid, as a table.

Bytes, operations, and where caching inputs overtakes caching keys and values if only bandwidth and
arithmetic counted; with ``--time`` also how long a step takes on this CPU. The lines go between two
markers of docs/formulations.md with ``--write``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from continual_mha import SingleOutputMultiheadAttention

from . import ROOT, marked
from .arguments import positive
from .grid import BYTES, FAMILIES, Case, Family, case_of, work

PAGE = ROOT / "docs" / "formulations.md"
STREAMS = (1, 8, 64, 512, 4096)
FORMULATIONS = ("kv", "input")
_ROUNDS = 8
_LARGEST_TIMED = 1 << 24  # elements of a key-value ring


def crossover(family: Family, dtype: str, ridge: float) -> int | None:
    """The fewest streams of which a step with inputs is bound to be faster; None if none is.

    Args:
        family: sizes of the attention.
        dtype: name of the dtype.
        ridge: operations that the machine does in the time of moving one byte.
    """
    for exponent in range(21):
        costs = (work(case_of(family, 1 << exponent, "step", dtype), f) for f in FORMULATIONS)
        kv, inputs = (max(cost.bytes, cost.flops / ridge) for cost in costs)
        if inputs < kv / 1.05:  # not a mere rounding of the weights' share
            return 1 << exponent
    return None


def step_times(case: Case, kinds: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Shortest time of a warm step in microseconds by the name of its kind, measured in turns."""
    dtype = getattr(torch, case.dtype)
    steps: dict[str, Callable[[], Any]] = {}
    with torch.inference_mode():
        clip = torch.randn(case.batch_size, case.sequence_len, case.embed_dim, dtype=dtype)
        for name, arguments in kinds.items():
            module = SingleOutputMultiheadAttention(
                case.embed_dim,
                case.num_heads,
                sequence_len=case.sequence_len,
                dtype=dtype,
                **arguments,
            ).eval()
            module.forward_steps(clip)
            steps[name] = lambda module=module: module.forward_step(clip[:, 0])  # type: ignore
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(_ROUNDS):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                best[name] = min(best[name], 1e6 * (time.perf_counter() - start))
    return best


def table(dtype: str, ridge: float, timed: bool) -> str:
    """The grid as markdown."""
    head = ["shape", "N", "MB kv", "MB input", "Mflop kv", "Mflop input", "crossover, N"]
    head += ["µs kv", "µs input", "µs int8 kv"] if timed else []
    lines = [head, ["---"] * len(head)]
    for family in FAMILIES:
        meets = crossover(family, dtype, ridge)
        for streams in STREAMS:
            case = case_of(family, streams, "step", dtype)
            costs = [work(case, formulation) for formulation in FORMULATIONS]
            line = [f"{family.name} E={family.embed_dim} H={family.num_heads}"]
            line[0] += f" L={family.sequence_len}"
            line += [str(streams), *(f"{c.bytes / 1e6:.3g}" for c in costs)]
            line += [*(f"{c.flops / 1e6:.3g}" for c in costs), str(meets or "none")]
            lines.append(line + (_timed(case) if timed else []))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _timed(case: Case) -> list[str]:
    if 2 * case.batch_size * case.sequence_len * case.embed_dim > _LARGEST_TIMED:
        return ["", "", ""]
    kinds: dict[str, dict[str, Any]] = {f: {"formulation": f} for f in FORMULATIONS}
    kinds["int8 kv"] = {"formulation": "kv", "cache_dtype": torch.int8}
    return [f"{us:.0f}" for us in step_times(case, kinds).values()]


def write(text: str) -> None:
    """Put ``text`` between the markers of the page."""
    PAGE.write_text(marked.replaced(PAGE.read_text(), {"formulations": text}.get))


def main() -> None:
    """Print the table, or write it to the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16")
    parser.add_argument(
        "--ridge", type=positive, default=200.0, help="operations per byte of a GPU"
    )
    parser.add_argument("--time", action="store_true", help="measure steps on this CPU, in fp32")
    parser.add_argument("--write", action="store_true", help=f"to {PAGE.name}")
    options = parser.parse_args()
    dtype = "float32" if options.time else options.dtype
    text = table(dtype, options.ridge, options.time)
    if options.time:
        threads = torch.get_num_threads()
        text = f"CPU, threads: {threads}, torch {torch.__version__}, {dtype}.\n\n{text}"
    write(text) if options.write else print(text)


if __name__ == "__main__":
    main()
