"""``python3 -m bench.gpu``: everything that only a machine with a GPU can tell, in one go.

Builds the native libraries in the tree, runs the tests on CUDA tensors, runs the sanitizer on
small shapes, measures, and prints a short table last. It installs nothing, takes whatever Python,
torch and nvcc are there, and gives every stage a time limit, so that a stage which fails or hangs
leaves the others' results.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LEFT = "{seconds left}"  # stands for a number that is known when the stage begins
SANITIZED = """
import torch, continual_mha
from continual_mha import SingleOutputMultiheadAttention
for backend in ("triton", "cuda"):
    if backend not in continual_mha.backends.available():
        continue
    for n, e, h, length in ((1, 64, 4, 5), (3, 48, 4, 9)):
        module = SingleOutputMultiheadAttention(e, h, sequence_len=length, device="cuda").eval()
        with torch.inference_mode(), continual_mha.use_backend(backend):
            for _ in range(2 * length + 1):
                out = module.forward_step(torch.randn(n, e, device="cuda"))
        assert out.isfinite().all()
        print(backend, n, e, h, length)
torch.cuda.synchronize()
"""


class Stage(NamedTuple):
    """A command, its time limit in seconds, and its additions to the environment."""

    name: str
    command: list[str]
    limit: float
    environment: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """What became of a stage."""

    name: str
    result: str
    seconds: float


def stages(folder: Path, limit: float, size: str) -> list[Stage]:
    """All stages; ``limit`` seconds are shared out among them."""
    python = sys.executable
    build = [python, "setup.py", "build_ext", "--inplace"]
    tests = [python, "-m", "pytest", "tests", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    tests += ["-n", "4"] if importlib.util.find_spec("xdist") else []
    bench = [python, "-m", "bench", "--device", "cuda", "--size", size, "--out", str(folder)]
    found = [
        Stage("build", build, 0.3 * limit),
        Stage("tests", tests, 0.35 * limit),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is not None:
        check = [sanitizer, "--error-exitcode", "1", python, "-c", SANITIZED]
        # The caching allocator would hide reads past the end of a tensor.
        quiet = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Stage("sanitizer", check, 0.1 * limit, quiet))
    # What the stages before have not used is the benchmark's; it stops by itself before that.
    found.append(Stage("bench", [*bench, "--limit", LEFT], limit))
    return found


def run(stage: Stage, log: Path, left: float) -> Outcome:
    """Run a stage, with all that it says into ``log``; it and its children end at its limit."""
    limit = min(stage.limit, left)
    started = time.monotonic()
    # The benchmark needs some seconds to finish the case that it is in when its time is up.
    left_text = str(max(1, round(limit - 45)))
    command = [left_text if part == LEFT else part for part in stage.command]
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            result = "passed" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"stopped after {limit:.0f} s"
    return Outcome(stage.name, result, time.monotonic() - started)


def _tail(log: Path, count: int) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def short_table(folder: Path) -> str:
    """Our median times beside the reference package's and the fastest other's, as text."""
    from .ratios import OURS, Results
    from .records import read

    results = Results(read(folder))
    lines = [f"{'':62s}{'graph':>9s}{'cold':>9s}{'host':>9s}{'roof':>6s}  over the fastest other"]
    for case in results.cases:
        rows = [results.row(case, OURS, timer) for timer in ("graph", "cold", "host")]
        cells = "".join(f"{row['median_us']:9.2f}" if row else f"{'-':>9s}" for row in rows)
        roof = f"{100 * rows[1]['roofline_share']:5.0f}%" if rows[1] else f"{'-':>6s}"
        best = results.best_rival(case)
        other = f"{best[1].value:.2f}x {best[0]} ({best[1].timer})" if best else ""
        lines.append(f"{case.label:62s}{cells}{roof}  {other}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run all stages; exit with 1 if one of them did not pass."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="results folder")
    parser.add_argument("--limit", type=float, default=570, help="seconds for everything")
    parser.add_argument("--size", default="standard", help="of the grid")
    parser.add_argument("--stages", default="build,tests,sanitizer,bench", help="which to run")
    options = parser.parse_args(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.limit
    outcomes = []
    for stage in stages(folder, options.limit, options.size):
        if stage.name not in options.stages.split(","):
            continue
        log = folder / f"{stage.name}.log"
        outcome = run(stage, log, max(5, end - time.monotonic()))
        outcomes.append(outcome)
        print(f"== {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", flush=True)
        if outcome.result != "passed":
            print(_tail(log, 40), flush=True)
    (folder / "stages.json").write_text(json.dumps([o._asdict() for o in outcomes], indent=1))
    print(short_table(folder))
    print(f"results in {folder}")
    for outcome in outcomes:
        print(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s")
    if any(outcome.result != "passed" for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
