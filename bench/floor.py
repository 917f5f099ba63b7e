"""``python -m bench.floor``: a step on this CPU beside the least that its parts take.

The floor is what torch takes for the two projections of the new tokens, plus the time of reading
the rings once at the bandwidth of a sum over 256 MB. Step, reference package and projections are
timed in turns, for every number of threads that ``--threads`` names.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from . import grid, machine
from .arguments import count, positive
from .ceilings import CPU_SIZES, read_bandwidth
from .peers import libraries, ours
from .peers.base import Ready
from .problem import Problem
from .ratios import geometric_mean
from .tables import figures, markdown
from .timing import Contestant, time_on_host

# The points for which the design has figures of the reference package.
POINTS = (
    (grid.NARROW, 1),
    (grid.EXAMPLE, 1),
    (grid.EXAMPLE, 10),
    (grid.DETECTION, 16),
    (grid.MIDDLE, 64),
    (grid.WIDE, 256),
)


def _projections(problem: Problem) -> Ready:
    """Those of the new tokens, in and out."""
    mha, token = problem.mha, problem.tokens[:, 0]

    def run() -> torch.Tensor:
        F.linear(token, mha.in_proj_weight, mha.in_proj_bias)
        return F.linear(token, mha.out_proj.weight, mha.out_proj.bias)

    return Ready(run, torch.inference_mode)


def microseconds(case: grid.Case, budget: float) -> tuple[float, float, float]:
    """Medians of our step, of the reference package's, and of the two projections alone."""
    problem = Problem(case, torch.device("cpu"))
    (automatic,) = (peer for peer in ours.peers(problem.device) if peer.name == "ours")
    reference = libraries.peers(problem.device)[0]
    setups = (automatic.setup, reference.setup, _projections)
    with torch.inference_mode():
        problem.past_kv  # noqa: B018  (made once, and not in the time of whoever asks first)
    ready = [setup(problem) for setup in setups]
    summaries = time_on_host([Contestant(each.run, each.context) for each in ready], budget)
    step, other, projections = (summary.median for summary in summaries)
    return step, other, projections


def table(threads: int, budget: float) -> str:
    """The points with so many threads, as markdown."""
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth(CPU_SIZES[-1], torch.device("cpu")).value
    lines, ratios = [], []
    for family, streams in POINTS:
        case = grid.case_of(family, streams, "step", "float32")
        step, reference, projections = microseconds(case, budget)
        floor = projections + case.state_bytes / bandwidth / 1e3
        sizes = f"{streams}, {case.embed_dim}, {case.num_heads}, {case.sequence_len}"
        found = (step, reference, reference / step, floor, step / floor)
        lines.append([str(threads), sizes, *map(figures, found)])
        ratios.append(reference / step)
    header = ["threads", "N, E, H, L", "step, µs", "continual-inference, µs", "ratio", "floor, µs"]
    made = markdown([*header, "step / floor"], lines)
    mean = geometric_mean(ratios)
    return (
        f"{made}\n\nRead bandwidth {bandwidth:.3g} GB/s; geometric mean of the ratios {mean:.2g}."
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the machine, and a table for every number of threads."""
    parser = argparse.ArgumentParser(prog="python -m bench.floor", description=__doc__)
    parser.add_argument("--threads", type=count, action="append", help="default: 1, then all cores")
    parser.add_argument(
        "--budget", type=positive, default=1.0, help="seconds for each call and point"
    )
    options = parser.parse_args(arguments)
    about = machine.describe("cpu")
    print(f"{about['device']}, {about['versions']}, commit {about['commit']}")
    for threads in options.threads or sorted({1, machine.cpu_cores()}):
        print(f"\n{table(threads, options.budget)}")


if __name__ == "__main__":
    main()
