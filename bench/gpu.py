"""``python3 -m bench.gpu``: everything that only a machine with a GPU can tell, in one go.

Builds the native libraries in the tree, compiles what calls and benchmark will launch, calls every
kernel of each backend, runs the tests of the kernels on CUDA tensors, measures the grid and
then every way that the dispatcher could choose, runs all other tests, finds how many streams are
served in real time, runs the sanitizer on small shapes, and prints a short table last. It installs
nothing and takes whatever Python, torch and nvcc are there.
Every stage has a share of the time limit and leaves its log, the tests each outcome, and the
benchmark each finished case, whatever becomes of the others. The end of the output alone says what
failed and what was measured. Where the time of a machine comes in pieces, ``--stages`` picks some
and ``--go-on-from`` an earlier folder with measured cases.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import ROOT
from .arguments import real
from .digest import account, passed, without_numbers
from .lost import LOST
from .ratios import OURS, Results, geometric_mean
from .records import CHOICES, ROWS, read

LEFT = "{seconds left}"  # stands for a number that is known when the stage begins
TOOLS = ("memcheck", "racecheck", "initcheck")  # of compute-sanitizer
# Tests of the kernels themselves, which come first.
KERNELS = (
    "triton_ring_step", "triton_ring_steps", "triton_input_step", "triton_attend_shared",
    "triton_attend_window", "triton_training", "backends", "streaming",
)  # fmt: skip
# Tests to which a GPU makes no difference.
ELSEWHERE = (
    "ahead", "bench", "choices", "cuda_compile", "cuda_emulation", "cuda_host", "cuda_ptx", "demo",
    "gpu_rehearsal", "load", "native_build", "native_cpu", "packaging", "ptx_machine", "ray_pools",
    "separate_devices", "soak", "triton_compiles", "triton_driver", "triton_launch", "triton_ptx",
)  # fmt: skip
_CUDA = "/usr/local/cuda/bin"
_LEAST = 30.0  # seconds that it takes to import all and measure something
_GRACE = 5.0  # seconds that a killed process may take to be gone
_TOLD = 8  # lines, at the end of the output, of a stage that did not pass
_TOLD_OF_TESTS = 12  # two for each cause
_WIDTH = 120  # of those lines
_MOST_CASES = 40  # in the table


class Stage(NamedTuple):
    """A command, its share of the time, and its additions to the environment.

    Attributes:
        tells: the last lines of its log that are worth reading where it passed.
    """

    name: str
    command: list[str]
    share: float
    environment: Mapping[str, str] = {}
    tells: int = 0


class Outcome(NamedTuple):
    """What became of a stage."""

    name: str
    result: str
    seconds: float


def _tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_CUDA)


def _build_environment() -> dict[str, str]:
    """With a compiler there, building for the GPU that is there is no option but a duty.

    The library for CPUs would take longer, and nothing here asks for it.
    """
    nvcc = _tool("nvcc")
    if nvcc is None:
        return {}
    chosen = {"CONTINUAL_MHA_BUILD_CPU": "0", "CONTINUAL_MHA_BUILD_CUDA": "1"}
    if shutil.which("nvcc") is None:
        chosen["CUDA_HOME"] = str(Path(nvcc).parent.parent)
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    # the words of a failure are no numbers
    capabilities = [word for word in found if re.fullmatch(r"\d+\.\d+", word)]
    served = [capability for capability in capabilities if float(capability) >= 8.0]
    return chosen | ({"CONTINUAL_MHA_CUDA_ARCHS": ";".join(served)} if served else {})


def stages(folder: Path, size: str, bench_arguments: Sequence[str] = ()) -> list[Stage]:
    """All stages, in their order."""
    python = sys.executable
    build = [python, "setup.py", "build_ext", "--inplace"]
    going_on = ["--size", size, "--out", str(folder), "--resume", "--limit", LEFT]
    bench = [python, "-m", "bench", "--device", "cuda", *going_on, *bench_arguments]
    choices = [python, "-m", "bench.choices", *going_on]
    load = [python, "-m", "bench.load", "--device", "cuda", "--seconds", "20", "--limit", LEFT]
    load += ["--out", str(folder)]
    exercise = [python, "-m", "bench.exercise"]
    ahead = [python, "-m", "bench.ahead", "--size", size, "--limit", LEFT]
    found = [Stage("build", build, 0.2, _build_environment()), Stage("ahead", ahead, 0.08)]
    for backend in ("triton", "cuda"):
        found.append(Stage(f"exercise-{backend}", [*exercise, "--backend", backend], 0.06))
    files = [f"tests/test_{name}.py" for name in KERNELS]
    ignored = [f"--ignore=tests/test_{name}.py" for name in (*ELSEWHERE, *KERNELS)]
    found += [
        _tests("kernels", folder, files, 0.18),
        Stage("bench", bench, 0.25),
        Stage("choices", choices, 0.2, tells=_TOLD),
        # of the others those that run on a GPU's backend
        _tests("tests", folder, ["tests", *ignored, "-k", "triton or cuda or gpu"], 0.1),
        Stage("load", load, 0.08, tells=4),
    ]
    sanitizer = _tool("compute-sanitizer") or "compute-sanitizer"
    for tool in TOOLS:
        check = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
        # The caching allocator would hide reads past the end of a tensor.
        quiet = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found.append(Stage(tool, [*check, *exercise], 0.05, quiet))
    return found


def _tests(name: str, folder: Path, which: Sequence[str], share: float) -> Stage:
    """Tests on the backends of a GPU, every outcome into a file."""
    command = [sys.executable, "-m", "pytest", *which, "-q", "--tb=short", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", "--backends", "triton,cuda"]
    command += ["--continue-on-collection-errors"]  # a file may need a package that is not there
    command += ["-p", "bench.digest", "--digest", str(outcomes_of(folder / f"{name}.log"))]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
    if importlib.util.find_spec("pytest_timeout"):  # no signal ends a wait for the device
        command += ["--timeout", "60", "--timeout-method", "thread"]
    return Stage(name, command, share, {"OMP_NUM_THREADS": "1"}, tells=3)


def limit_of(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """Seconds for a stage out of those left for it and the later ones."""
    return left * stage.share / (stage.share + sum(other.share for other in later))


def run(stage: Stage, log: Path, limit: float) -> Outcome:
    """Run a stage, with all that it says into ``log``; it and its children end at its limit.

    What has lost its device is run again in the time that is left, and goes on without the cause.
    """
    started = time.monotonic()
    log.unlink(missing_ok=True)
    losses = 0
    while True:
        result = _attempt(stage, log, limit - (time.monotonic() - started))
        if result != _failed(LOST):
            break
        losses += 1
        if limit - (time.monotonic() - started) < _LEAST:
            break
    if losses:
        result += f"; devices lost: {losses}"
    return Outcome(stage.name, result, time.monotonic() - started)


def _failed(code: int) -> str:
    return f"failed with code {code}"


def _attempt(stage: Stage, log: Path, limit: float) -> str:
    """Run a stage once; what became of it."""
    # The benchmark needs some seconds to finish the case that it is in when its time is up.
    left_text = str(max(1, round(limit - min(45, limit / 4))))
    command = [left_text if part == LEFT else part for part in stage.command]
    quiet = {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}
    environment = {**os.environ, **stage.environment, **quiet}
    with log.open("a") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
        except OSError as error:
            file.write(f"{error}\n")
            return "could not be started"
        try:
            code = process.wait(limit)
            return "passed" if code == 0 else _failed(code)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:  # children of a stage that ended, too, or was interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process may hang in the driver, where no signal reaches it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def outcomes_of(log: Path) -> Path:
    """Where a stage of tests keeps every test's outcome, beside its log."""
    return log.with_name(f"{log.stem}-outcomes.jsonl")


def judged(outcome: Outcome, log: Path) -> Outcome:
    """The outcome; that of tests which were all skipped, as without a GPU, is no success."""
    outcomes = outcomes_of(log)
    if outcome.result == "passed" and outcomes.exists() and not passed(outcomes):
        return outcome._replace(result="passed no test")
    return outcome


def told(log: Path, count: int) -> list[str]:
    """So many lines of what a stage has to say: of tests the account, else the end of its log."""
    lines = account(outcomes_of(log)).splitlines()[:count]
    if not lines and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-count:] if count else []
    return [line[:_WIDTH] for line in lines]


def troubles(folder: Path, most: int = _TOLD) -> list[str]:
    """Why there is no time of something that was to be measured, ours first, each cause once."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in (*read(folder), *read(folder, CHOICES)):
        if row.get("status") in ("failed", "wrong"):
            plan = row.get("plan", {}).get("path")
            who = f"{OURS}, {row['formulation']} by {plan}" if plan else row["implementation"]
            why = row.get("reason") or f"relative error {row['error']:.1e}"
            found.setdefault((who, without_numbers(why)), []).append(why)
    causes = sorted(
        found.items(), key=lambda item: (not item[0][0].startswith(OURS), -len(item[1]))
    )
    lines = [f"{len(why)}x {who}: {why[0]}"[:_WIDTH] for (who, _), why in causes[:most]]
    return lines + [f"and {len(causes) - most} other causes"] * (len(causes) > most)


def short_table(folder: Path) -> str:
    """Our median times beside the reference package's and the fastest other's, as text."""
    results = Results(read(folder))
    lines = [f"{'':62s}{'graph':>9s}{'cold':>9s}{'host':>9s}{'roof':>6s}  over the fastest other"]
    for case in results.cases[:_MOST_CASES]:
        rows = [results.row(case, OURS, timer) for timer in ("graph", "cold", "host")]
        cells = "".join(f"{row['median_us']:9.2f}" if row else f"{'-':>9s}" for row in rows)
        roof = f"{100 * rows[1]['roofline_share']:5.0f}%" if rows[1] else f"{'-':>6s}"
        best = results.best_rival(case)
        other = f"{best[1].value:.2f}x {best[0]} ({best[1].timer})" if best else ""
        lines.append(f"{case.label:62s}{cells}{roof}  {other}")
    rivals = {case.label: results.best_rival(case) for case in results.cases}
    ratios = {label: best[1].value for label, best in rivals.items() if best}
    if ratios:
        least, most = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        lines.append(
            f"{len(ratios)} cases, over the fastest other {geometric_mean(ratios.values()):.2f}x; "
            f"least {ratios[least]:.2f}x: {least}; most {ratios[most]:.2f}x: {most}"
        )
    return "\n".join(lines)


def summary(folder: Path, planned: Sequence[Stage], outcomes: Sequence[Outcome]) -> str:
    """All that is worth knowing, and last what matters most: of a long output the end is kept."""
    lines: list[str] = []
    for stage, outcome in reversed(list(zip(planned, outcomes, strict=False))):
        log = folder / f"{stage.name}.log"
        most = _TOLD_OF_TESTS if outcomes_of(log).exists() else _TOLD
        said = told(log, stage.tells if outcome.result == "passed" else most)
        lines += [f"-- {stage.name}: {outcome.result}", *said] if said else []
    lines += [*troubles(folder), short_table(folder), f"results in {folder}"]
    lines += [f"{each.name}: {each.result}, {each.seconds:.0f} s" for each in outcomes]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [stage.name for stage in stages(Path(), "quick")]
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="results folder")
    parser.add_argument("--limit", type=real, default=570, help="seconds for everything")
    parser.add_argument("--size", default="standard", help="of the grid")
    parser.add_argument("--stages", default=",".join(names), help="which to run")
    parser.add_argument("--go-on-from", type=Path, help="folder whose measured cases to keep")
    parser.add_argument("--bench", type=shlex.split, default=[], help="arguments of the benchmark")
    options = parser.parse_args(arguments)
    options.stages = options.stages.split(",")
    if set(options.stages) - set(names):
        parser.error(f"--stages takes {', '.join(names)}")
    return options


def _stop(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def main(arguments: list[str] | None = None) -> None:
    """Run the chosen stages; exit with 1 if one of them did not pass."""
    options = parse(arguments)
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ROWS, CHOICES):
        earlier = options.go_on_from and options.go_on_from / name
        if earlier and earlier.exists() and not (folder / name).exists():
            shutil.copy(earlier, folder / name)
    end = time.monotonic() + options.limit
    chosen = [s for s in stages(folder, options.size, options.bench) if s.name in options.stages]
    outcomes: list[Outcome] = []
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for i, stage in enumerate(chosen):
            log = folder / f"{stage.name}.log"
            left = max(5.0, end - time.monotonic())
            outcomes.append(judged(run(stage, log, limit_of(stage, chosen[i + 1 :], left)), log))
            _say(outcomes[-1], log)
            done = [outcome._asdict() for outcome in outcomes]
            (folder / "stages.json").write_text(json.dumps(done, indent=1))
    finally:
        signal.signal(signal.SIGTERM, before)
        print(summary(folder, chosen, outcomes), flush=True)
    if any(outcome.result != "passed" for outcome in outcomes):
        raise SystemExit(1)


def _say(outcome: Outcome, log: Path) -> None:
    print(f"== {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", flush=True)
    print("\n".join(told(log, 3 if outcome.result == "passed" else 30)), flush=True)


if __name__ == "__main__":
    main()
