"""The benchmark: its grid, that implementations agree, its statistics, reports and judgements."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import (
    ceilings,
    compare,
    floor,
    gpu,
    grid,
    load,
    machine,
    measure,
    paper,
    ratios,
    records,
    report,
)  # fmt: skip
from bench.ceilings import Ceiling, Roofline
from bench.grid import Case
from bench.peers import Peer, Ready, all_peers
from bench.problem import TOLERANCE, Problem
from bench.timing import Contestant, quantile, share_out, summarise, time_on_host

CPU = torch.device("cpu")
TINY = {
    "step": Case("tiny", 3, 24, 2, 7, 1, "float32", "step"),
    "steps": Case("tiny", 3, 24, 2, 7, 5, "float32", "steps"),
    "steps beyond the window": Case("tiny", 2, 24, 2, 4, 9, "float32", "steps"),
    "steps_backward": Case("tiny", 3, 24, 2, 7, 5, "float32", "steps_backward"),
    "forward": Case("tiny", 3, 24, 2, 7, 1, "float32", "forward"),
    "forward_backward": Case("tiny", 3, 24, 2, 7, 1, "float32", "forward_backward"),
}
PEERS = all_peers(CPU)
CEILINGS = [
    Ceiling("read bandwidth", "1000", 100.0, "GB/s"),
    Ceiling("read bandwidth", "1000000", 10.0, "GB/s"),
    Ceiling("matrix rate", "float32", 50.0, "GFLOP/s"),
]


class FakeClock:
    """A clock that only moves when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def worker(self, *seconds: float) -> Contestant:
        """A call that takes these times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Contestant(run, nullcontext)


# -- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("size", grid.SIZES)
def test_every_grid_is_well_formed(device_type, size):
    cases = list(grid.cases(device_type, size))
    assert len(cases) == len(set(cases))
    assert {case.mode for case in cases} == set(grid.MODES)
    for case in cases:
        assert case.embed_dim % case.num_heads == 0
        assert case.takes_many == (case.tokens > 1)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_larger_size_begins_with_the_smaller_one(device_type):
    """So that a run that is cut short has something of every mode."""
    quick, standard, full = (list(grid.cases(device_type, size)) for size in grid.SIZES)
    assert standard[: len(quick)] == quick
    assert full[: len(standard)] == standard
    own = set(grid._cases_of_mode(device_type, "full", "steps", "float32"))
    assert own >= {c._replace(dtype="float32") for c in standard if c.mode == "steps"}


def test_the_grid_holds_the_shapes_of_the_reference_measurements():
    measured = {(c.batch_size, c.embed_dim, c.num_heads, c.sequence_len)
                for c in grid.cases("cpu", "standard", ("step",))}  # fmt: skip
    wanted = {(1, 128, 4, 32), (1, 512, 8, 32), (10, 512, 8, 32)}
    wanted |= {(16, 1024, 8, 64), (64, 512, 8, 128), (256, 512, 8, 256)}
    assert wanted <= measured


def test_least_work_is_that_of_the_formulas():
    case = Case("x", 3, 8, 2, 5, 1, "float32", "step")
    kv, inputs = grid.work(case, "kv"), grid.work(case, "input")
    assert kv.bytes == 4 * (4 * 64 + 3 * (2 * 5 * 8 + 2 * 8 + 2 * 8))
    assert kv.flops == 2 * 3 * (4 * 64 + 2 * 5 * 8)
    assert inputs.bytes == 4 * (4 * 64 + 3 * (5 * 8 + 8 + 2 * 8))
    assert inputs.flops == 2 * 3 * (4 * 64 + 2 * 2 * 5 * 8)
    steps = grid.work(case._replace(mode="steps", tokens=7), "kv")  # of which the ring keeps five
    assert steps.bytes == 4 * (4 * 64 + 3 * (2 * 5 * 8 + 2 * 5 * 8 + 7 * 2 * 8))
    assert steps.flops == 7 * kv.flops
    clip = grid.work(case._replace(mode="forward"))
    assert clip.bytes == 4 * (4 * 64 + 3 * (5 * 8 + 8))
    assert clip.flops == 2 * 3 * (2 * 64 + 2 * 64 + 2 * 2 * 5 * 8)  # projections are moved
    few = grid.work(case._replace(mode="forward", sequence_len=1, num_heads=8))
    assert few.flops == 2 * 3 * (2 * 64 + 2 * 64 + 2 * 8)
    for mode, forward in (("forward_backward", clip), ("steps_backward", steps)):
        trained = grid.work(case._replace(mode=mode, tokens=7))
        assert trained == tuple(3 * x for x in forward)


# -- implementations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "peer"),
    [(name, peer) for name, case in TINY.items() for peer in PEERS if case.mode in peer.modes],
    ids=lambda part: getattr(part, "name", part),
)
def test_implementations_agree_with_the_exact_result(name, peer: Peer):
    case = TINY[name]
    reason = peer.why_absent(case)
    if reason is not None:
        pytest.skip(reason)
    problem = Problem(case, CPU)
    ready = peer.setup(problem)
    with ready.context():
        assert problem.error(ready.run()) <= TOLERANCE["float32"]
        again = ready.run()
    assert all(x.isfinite().all() for x in (again if isinstance(again, tuple) else (again,)))


@pytest.mark.parametrize(
    "peer",
    [p for p in PEERS if "step" in p.modes and p.why_absent(TINY["step"]) is None],
    ids=lambda peer: peer.name,
)
def test_implementations_go_on_from_their_own_state(peer: Peer):
    case = TINY["step"]
    problem, later = Problem(case, CPU), Problem(case, CPU)
    ready = peer.setup(problem)
    # The same token over and over: after each call the window holds one more of it.
    for calls in range(1, case.sequence_len + 2):
        seen = torch.cat([problem.past, problem.tokens.expand(-1, calls - 1, -1)], dim=1)
        later.past = seen[:, -case.sequence_len :]
        later.__dict__.pop("expected", None)
        with ready.context():
            assert later.error(ready.run()) <= TOLERANCE["float32"]


def test_absent_implementations_say_why():
    for peer in PEERS:
        for case in TINY.values():
            reason = peer.why_absent(case)
            assert reason is None or len(reason) > 5


def _bench(peers: list[Peer]) -> measure.Bench:
    return measure.Bench(CPU, peers, Roofline(CEILINGS), {"device_type": "cpu"}, budget=0.001)


def _constant(problem: Problem) -> Ready:
    return Ready(lambda: torch.zeros_like(problem.tokens))


def _broken(problem: Problem) -> Ready:
    raise RuntimeError("no such kernel\nand more")


def test_every_implementation_leaves_a_row_whatever_becomes_of_it():
    good = next(peer for peer in PEERS if peer.name == "ours")
    peers = [
        good,
        Peer("liar", ("step",), _constant),
        Peer("broken", ("step",), _broken),
        Peer("gone", ("step",), _constant, lambda case: "is not installed"),
        Peer("other", ("forward",), _constant),
    ]
    rows = {row.get("implementation"): row for row in _bench(peers).rows(TINY["step"])}
    statuses = {name: row["status"] for name, row in rows.items() if name}
    assert statuses == {"ours": "ok", "liar": "wrong", "broken": "failed", "gone": "absent"}
    assert rows["broken"]["reason"] == "RuntimeError: no such kernel"
    assert rows["liar"]["error"] >= 0.1
    assert rows["ours"]["p20_us"] <= rows["ours"]["median_us"] <= rows["ours"]["p80_us"]


def test_rows_carry_their_share_of_the_roofline():
    good = next(peer for peer in PEERS if peer.name == "ours")
    row = next(r for r in _bench([good]).rows(TINY["step"]) if r["kind"] == "time")
    floor = Roofline(CEILINGS).microseconds(TINY["step"], "kv")
    assert row["roofline_us"] == pytest.approx(floor, abs=1e-4)
    assert row["roofline_share"] == pytest.approx(floor / row["median_us"], rel=0.05, abs=1e-4)


def test_implementations_that_do_not_fit_together_are_timed_apart():
    case = TINY["step"]
    peers = [Peer(str(i), ("step",), _constant, copies=2) for i in range(5)]
    found = list(measure.groups(peers, case, memory=5 * case.state_bytes))
    assert [len(group) for group in found] == [2, 2, 1]
    assert [peer for group in found for peer in group] == peers
    assert [len(group) for group in measure.groups(peers, case, memory=0)] == [1] * 5


# -- statistics ------------------------------------------------------------------------------------


def test_summary_is_median_and_percentiles():
    summary = summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert summary == (3.5, 2.0, 5.0, 6)
    assert quantile([1.0, 2.0], 0.25) == 1.25
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_host_timer_finds_the_time_of_each_contestant():
    clock = FakeClock()
    contestants = [clock.worker(3e-6), clock.worker(2e-3), clock.worker(0.3)]
    found = time_on_host(contestants, budget=0.1, clock=clock)
    assert [summary.median for summary in found] == pytest.approx([3.0, 2e3, 3e5])
    assert [summary.samples for summary in found] == [40, 40, 3]


def test_host_timer_is_not_misled_by_a_few_slow_calls():
    clock = FakeClock()
    [summary] = time_on_host([clock.worker(1.0, 0.5, *[4e-3] * 8, 0.1, 4e-3)], 0.2, clock=clock)
    assert summary.median == pytest.approx(4e3)


def test_host_timer_ends_on_a_machine_that_became_slow():
    clock = FakeClock()
    [summary] = time_on_host([clock.worker(*[1e-4] * 200, 1e-2)], budget=0.2, clock=clock)
    assert 5 <= summary.samples < 40
    assert clock.now < 2


def test_samples_of_contestants_alternate():
    turns = []
    contestants = [Contestant(lambda i=i: turns.append(i), nullcontext) for i in range(2)]
    ticks = iter(range(10_000))
    time_on_host(contestants, budget=4, shortest=1, least=5, clock=lambda: float(next(ticks)))
    runs = re.findall(r"0+|1+", "".join(map(str, turns)))
    assert len(runs) >= 5


def test_contexts_surround_the_timed_calls():
    depth = []

    class Block:
        def __enter__(self):
            depth.append(1)

        def __exit__(self, *exc_info):
            depth.pop()

    clock = FakeClock()

    def run():
        assert depth
        clock.now += 1e-3

    time_on_host([Contestant(run, Block)], budget=0.01, clock=clock)
    assert not depth


@pytest.mark.parametrize("one", [1e-6, 1e-4, 1e-2, 1.0])
def test_gpu_budget_is_shared_out_among_samples(one):
    samples, calls = share_out(0.1, one, 40, 50)
    assert 5 <= samples <= 40
    assert 1 <= calls <= 50
    assert samples * calls * one <= 0.1 or (samples, calls) == (5, 1)


# -- ceilings --------------------------------------------------------------------------------------


def test_roofline_takes_the_cache_that_holds_the_data():
    roofline = Roofline(CEILINGS)
    assert roofline.bandwidth(500) == 100.0
    assert roofline.bandwidth(5000) == 10.0
    assert roofline.bandwidth(10**9) == 10.0
    assert roofline.bandwidth(500, cold=True) == 10.0


def test_ceilings_are_measured_and_survive_the_file(monkeypatch):
    monkeypatch.setattr(ceilings, "CPU_SIZES", (1 << 16, 1 << 18))
    found = ceilings.measure(CPU, ("float32",))
    names = {ceiling.name for ceiling in found}
    assert names == {"read bandwidth", "copy bandwidth", "matrix rate", "op dispatch"}
    assert all(math.isfinite(ceiling.value) and ceiling.value > 0 for ceiling in found)
    assert ceilings.from_rows(json.loads(json.dumps(ceilings.as_rows(found)))) == found


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_grid(monkeypatch):
    """Two cases, and ceilings that cost nothing to measure."""
    cases = [TINY["step"], TINY["forward"]]
    monkeypatch.setattr(grid, "cases", lambda *args: iter(cases))
    monkeypatch.setattr(ceilings, "measure", lambda *args: CEILINGS)
    return cases


def _run(folder: Path, *arguments: str) -> list[records.Row]:
    only = ["--only", "ours,continual", "--budget", "0.001"]
    command.main(["--device", "cpu", "--out", str(folder), *only, *arguments])
    return records.read(folder)


def test_a_run_writes_rows_with_machine_and_versions_inside(tiny_grid, tmp_path):
    rows = _run(tmp_path)
    for row in rows:
        about = row["machine"]
        assert about["device"].startswith(machine.cpu_name())
        assert {"torch", "continual_mha"} <= set(about["versions"])
        assert about["commit"]
    assert {row["case"]["mode"] for row in rows if row["kind"] == "time"} == {"step", "forward"}


def test_generations_of_one_model_name_are_kept_apart(tmp_path, monkeypatch):
    machine.describe.cache_clear()
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "cpu_cores", lambda: 2)
    found = []
    for family, model in ((25, 17), (26, 2)):
        core = f"cpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\npower:\n\n"
        machine._CPUINFO.write_text(f"processor\t: 0\n{core}processor\t: 1\n{core}")
        found.append(machine.describe("cpu"))
        machine.describe.cache_clear()
    assert [about["device"] for about in found] == [
        "AMD EPYC (family 25 model 17), 2 cores",
        "AMD EPYC (family 26 model 2), 2 cores",
    ]
    assert machine.slug(found[1]) == "amd-epyc-family-26-model-2-2-cores"
    row = {"kind": "case", "case": TINY["step"]._asdict(), "machine": found[0]}
    assert records.finished([row], found[0])
    assert not records.finished([row], found[1])
    machine._CPUINFO.write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n")
    assert machine.cpu_name().endswith(" (implementer 0x41 part 0xd40)")
    machine._CPUINFO.write_text("hart : 0\n")
    assert machine.cpu_name() == machine.platform.machine()


def test_sources_are_told_apart_by_their_names_and_contents(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    found = set()
    for name, text in (("a", "x"), ("a", "y"), ("b", "x")):
        for path in (tmp_path / "continual_mha").glob("*"):
            path.unlink()
        (tmp_path / "continual_mha").mkdir(exist_ok=True)
        (tmp_path / "continual_mha" / f"{name}.py").write_text(text)
        found.add(machine.source_digest())
        (tmp_path / "continual_mha" / "lib.so").write_text(text)
        (tmp_path / "README.md").write_text(text)
        found.add(machine.source_digest())  # of which neither is a source
    assert len(found) == 3


def test_copy_of_a_tree_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "0123456789ab")
    monkeypatch.setattr(machine, "_output", lambda *command: "fedcba987654")
    assert machine.commit() == "fedcba987654+"  # git knows better
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert machine.commit() == "0123456789ab"
    monkeypatch.delenv("COMMIT")
    assert machine.commit() == "unknown"


def test_a_run_goes_on_where_another_was_cut_short(tiny_grid, tmp_path, monkeypatch):
    _run(tmp_path, "--limit", "-1")
    assert records.finished(records.read(tmp_path), machine.describe("cpu")) == set()
    [first, second] = tiny_grid
    tiny_grid.remove(second)
    _run(tmp_path, "--resume")
    tiny_grid.append(second)
    measured = []
    rows_of = measure.Bench.rows
    monkeypatch.setattr(
        measure.Bench, "rows", lambda self, case: measured.append(case) or rows_of(self, case)
    )
    rows = _run(tmp_path, "--resume")
    assert measured == [second]
    assert records.finished(rows, machine.describe("cpu")) == {first, second}
    for changed in ("sources", "device"):
        assert records.finished(rows, machine.describe("cpu") | {changed: "other"}) == set()


def test_a_run_without_resume_begins_anew(tiny_grid, tmp_path):
    assert len(_run(tmp_path)) == len(_run(tmp_path))


def test_a_run_that_measures_nothing_leaves_the_rows_of_another(tiny_grid, tmp_path):
    rows = _run(tmp_path)
    _run(tmp_path, "--limit", "0")
    assert records.read(tmp_path) == rows


def test_a_run_goes_on_with_implementations_that_another_left_out(tiny_grid, tmp_path):
    _run(tmp_path)
    before = len(records.read(tmp_path))
    _run(tmp_path, "--resume", "--only", "ours")  # with fewer there is nothing left
    assert len(records.read(tmp_path)) == before
    rows = _run(tmp_path, "--resume", "--only", "ours,ring + SDPA math")
    # of the two cases one, as the ring is not in the race of forward
    [measured] = [row for row in rows[before:] if row["kind"] == "case"]
    assert measured["case"]["mode"] == "step"
    assert {"ours", "ring + SDPA math"} <= set(measured["implementations"])


@pytest.mark.parametrize(
    "asked",
    [
        (command, "--budget", "0"),
        (command, "--budget", "nan"),
        (command, "--budget", "inf"),
        (command, "--limit", "nan"),
        (load, "--seconds", "0"),
        (load, "--seconds", "0.9"),
        (load, "--threads", "0"),
        (floor, "--threads", "0"),
        (floor, "--budget", "-1"),
        (report, "--results", "nowhere"),
    ],
    ids=lambda asked: " ".join([asked[0].__name__, *asked[1:]]),
)
def test_numbers_and_folders_that_mean_nothing_are_refused(asked, capsys):
    module, *arguments = asked
    with pytest.raises(SystemExit) as refused:
        module.main(arguments)
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert arguments[0] in said or arguments[1] in said


@pytest.mark.parametrize("asked", [("--only", "ourz"), ("--only", "ourz,theirs")])
def test_a_run_of_nothing_leaves_the_rows_of_another(asked, tiny_grid, tmp_path):
    rows = _run(tmp_path)
    with pytest.raises(SystemExit, match="--only takes what implementations start with: ours"):
        _run(tmp_path, *asked)
    tiny_grid.clear()
    assert _run(tmp_path) == rows


# -- reports ---------------------------------------------------------------------------------------

ABOUT = {
    "device": "A processor, 2 cores",
    "device_type": "cpu",
    "capability": "AVX2",
    "driver": None,
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "sources": "def",
}


def _row(name: str, case: Case, median: float, spread: float = 0.02, timer: str = "wall"):
    return {
        "kind": "time",
        "case": case._asdict(),
        "implementation": name,
        "formulation": "kv",
        "timer": timer,
        "status": "ok",
        "reason": None,
        "error": 1e-7,
        "machine": ABOUT,
        "median_us": median,
        "p20_us": median * (1 - spread),
        "p80_us": median * (1 + spread),
        "samples": 9,
        "bytes": 1000,
        "flops": 4000,
        "gb_per_s": 1.0,
        "roofline_us": 2.0,
        "roofline_share": round(2 / median, 4),
    }


def _fixture(slower: float = 1.0, machine_slower: float = 1.0) -> list[records.Row]:
    """Steps of three implementations; the last shape of ours takes ``slower`` times as long."""
    rows = [{"kind": "ceiling", "machine": ABOUT, **c._asdict()} for c in CEILINGS]
    for i, n in enumerate((1, 8, 64, 512)):
        case = Case("example", n, 512, 8, 32, 1, "float32", "step")
        own = machine_slower * 10.0 * n * (slower if i == 3 else 1.0)
        rows += [_row("ours", case, own), _row("ours:kv", case, own)]
        rows.append(_row("ours:input", case, 2 * own))
        rows.append(_row("continual-inference", case, machine_slower * 50.0 * n))
        rows.append(_row("ring + SDPA math", case, machine_slower * 30.0 * n))
        absent = {**_row("transformers", case, 1.0), "status": "absent", "reason": "not there"}
        rows.append(absent)
    return rows


@pytest.fixture
def data(tmp_path):
    records.append(tmp_path / "a-processor", _fixture())
    return report.load(tmp_path)


def test_tables_are_made_from_the_rows(data):
    step = report.table("cpu-step", data)
    assert "*A processor, 2 cores, AVX2, torch 2.13.0; commit abc*" in step
    line = "| example: E=512, H=8, L=32, float32 | 8 | 80 (78.4–81.6) | 2 % | 5× |  | 3× "
    assert line + "| ring + SDPA math (wall) |" in step
    summary = report.table("cpu-summary", data)
    assert "| step, float32: continual-inference | 4 | 5× | 5× | 5× |" in summary
    assert "| step, float32 | 4 | 5× (5×) |  | 3× (3×) |" in report.table("cpu-brief", data)
    assert "| transformers: not there | absent | 4 |" in report.table("cpu-missing", data)
    assert "| ours:kv | noise |" in report.table("cpu-dispatch", data)
    assert report.table("gpu-step", data) == "No results yet."


def test_rows_of_another_name_for_a_device_stand_beside_those_of_the_new_one(data, tmp_path):
    about = ABOUT | {"device": "A processor (family 26 model 2), 2 cores"}
    records.append(tmp_path / machine.slug(about), [r | {"machine": about} for r in _fixture()])
    step = report.table("cpu-step", report.load(tmp_path))
    captions = [line for line in step.splitlines() if line.startswith("*")]
    assert [line.split(", 2 cores")[0] for line in captions] == [
        "*A processor",
        "*A processor (family 26 model 2)",
    ]


def test_tables_go_between_their_markers_and_nowhere_else(data):
    text = "before\n<!-- bench:cpu-step -->\nold\n<!-- /bench:cpu-step -->\nafter\n"
    rendered = report.render(text, data)
    assert rendered.startswith("before\n<!-- bench:cpu-step -->\n*A processor")
    assert rendered.endswith("\n<!-- /bench:cpu-step -->\nafter\n")
    assert "old" not in rendered
    assert report.render(rendered, data) == rendered
    assert report.render("no markers", data) == "no markers"


def test_unknown_tables_are_refused(data):
    with pytest.raises(KeyError):
        report.render("<!-- bench:cpu-stepp -->\n<!-- /bench:cpu-stepp -->", data)


def test_plots_are_the_same_for_the_same_data(data, tmp_path):
    plots = pytest.importorskip("bench.plots")
    first = plots.draw(data["cpu"][0], tmp_path / "one", "cpu")
    second = plots.draw(data["cpu"][0], tmp_path / "two", "cpu")
    names = {"over-streams", "over-window", "roofline", "speed-up", "crossover"}
    assert {path.name for path in first} == {f"cpu-{name}.svg" for name in names}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_committed_tables_are_those_of_the_committed_results():
    data = report.load()
    for path in report.FILES:
        text = path.read_text() if path.exists() else ""
        assert report.render(text, data) == text, f"python -m bench.report rewrites {path.name}"


def test_every_opening_marker_is_closed():
    for path in report.FILES:
        text = path.read_text() if path.exists() else ""
        opened = re.findall(r"<!-- bench:([\w-]+) -->", text)
        assert opened == re.findall(r"<!-- /bench:([\w-]+) -->", text)


def test_graph_times_are_not_compared_with_eager_ones():
    case = TINY["step"]
    rows = [_row("ours", case, 5.0, timer="graph"), _row("ours", case, 20.0, timer="eager")]
    rows.append(_row("continual-inference", case, 100.0, timer="eager"))
    ratio = ratios.Results(rows).ratio(case, "continual-inference")
    assert (ratio.value, ratio.timer) == (5.0, "eager")
    rows.append(_row("continual-inference", case, 40.0, timer="graph"))
    ratio = ratios.Results(rows).ratio(case, "continual-inference")
    assert (ratio.value, ratio.timer) == (8.0, "graph")
    assert ratio.noise == pytest.approx(math.hypot(0.02, 0.02))


def test_times_of_two_runs_are_not_divided_by_each_other():
    """One of them may have had the machine to itself."""
    case, end = TINY["step"], {"kind": "ceiling", "machine": ABOUT, **CEILINGS[0]._asdict()}
    both = [_row("ours", case, 120.0), _row("torch", case, 120.0)]
    rows = [end, *both, end, _row("ours", case, 50.0), _row("continual", case, 100.0)]
    results = ratios.Results(rows)
    assert results.row(case, "ours", "wall")["median_us"] == 50.0
    assert results.ratio(case, "torch").value == 1.0
    assert results.ratio(case, "continual").value == 2.0
    assert results.ratio(case, "torch", "continual") is None
    assert results.best_rival(case)[0] == "torch"
    again = ratios.Results([*rows, end, _row("ours", case, 40.0), _row("torch", case, 120.0)])
    assert again.ratio(case, "torch").value == 3.0


@pytest.mark.parametrize("changed", [{"sources": "new"}, {"versions": {}}, {"threads": 1}], ids=str)
def test_what_was_measured_under_other_conditions_does_not_count(changed):
    case = TINY["step"]
    old = [_row("ours", case, 120.0), _row("torch", case, 120.0)]
    new = [{**_row("ours", case, 50.0), "machine": ABOUT | changed}]
    results = ratios.Results([*old, *new])
    assert results.implementations("step") == ["ours"]
    assert results.rivals("step") == []


# -- regressions -----------------------------------------------------------------------------------


def _verdicts(new: list[records.Row]) -> list[tuple[int, str]]:
    found = compare.changes(ratios.Results(_fixture()), ratios.Results(new))
    return [(c.case.batch_size, c.implementation) for c in found if c.is_slower(0.05)]


def test_a_planted_slowdown_is_found_and_named():
    assert _verdicts(_fixture(slower=1.3)) == [(512, "ours"), (512, "ours:kv"), (512, "ours:input")]


def test_a_slower_machine_is_no_regression():
    assert _verdicts(_fixture(machine_slower=1.7)) == []
    slow = _fixture(slower=1.3, machine_slower=1.7)
    assert {n for n, _ in _verdicts(slow)} == {512}


def test_a_change_within_the_noise_is_no_regression():
    noisy = [
        {**r, "p20_us": 0.6 * r["median_us"], "p80_us": 1.4 * r["median_us"]}
        if r["kind"] == "time"
        else r
        for r in _fixture(slower=1.3)
    ]
    assert _verdicts(noisy) == []


def test_devices_of_two_kinds_are_not_compared(tmp_path, capsys):
    about = ABOUT | {"device": "Another"}
    records.append(tmp_path / "old", _fixture())
    records.append(tmp_path / "new", [row | {"machine": about} for row in _fixture()])
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert "two devices: A processor, 2 cores and Another" in capsys.readouterr().err


def test_the_comparison_fails_on_a_slowdown(tmp_path, capsys):
    for name, rows in (("old", _fixture()), ("new", _fixture(slower=2.0))):
        records.append(tmp_path / name, rows)
    compare.main([str(tmp_path / "old"), str(tmp_path / "old")])
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / "old"), str(tmp_path / "new")])
    assert "SLOWER  2.00x the time" in capsys.readouterr().out
    compare.main([str(tmp_path / "new"), str(tmp_path / "old")])
    said = capsys.readouterr().out
    assert "faster  0.50x the time" in said
    assert "0 slower, 3 faster" in said


def test_a_comparison_of_nothing_is_no_success(tmp_path, capsys):
    records.append(tmp_path / "old", _fixture())
    with pytest.raises(SystemExit) as ended:
        compare.main([str(tmp_path / "old"), str(tmp_path / "nowhere")])
    assert ended.value.code == 1
    assert "0 times compared" in capsys.readouterr().out


# -- the paper's figures ---------------------------------------------------------------------------


def test_counts_agree_with_the_published_figures():
    counted = paper.rows()
    assert counted["OadTR-b1, every token anew"].weights == pytest.approx(673.0e6, rel=0.002)
    assert sum(counted["CoOadTR-b1, one new token"]) == pytest.approx(10.6e6, rel=0.005)
    assert counted["OadTR-b2, every token anew"].weights == pytest.approx(1075.7e6, rel=0.002)


def test_attention_count_agrees_with_the_modules_flops_up_to_biases_and_scaling():
    encoder = paper.Encoder()
    alone = sum(paper.rows(encoder)["its attention alone"])
    extra = paper.module_flops(encoder) - alone
    assert extra == 4 * encoder.embed_dim + 2 * encoder.embed_dim


# -- the driver for GPU machines -------------------------------------------------------------------


def test_a_stage_that_hangs_or_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    python = [sys.executable, "-c"]
    planned = [
        gpu.Stage("hangs", [*python, "import time; time.sleep(60)"], 0.5),
        gpu.Stage("fails", [*python, "raise SystemExit('broken here')"], 30),
        gpu.Stage("works", [*python, f"import sys; assert int({gpu.LEFT!r} != sys.argv[-1])",
                            gpu.LEFT], 30),
    ]  # fmt: skip
    monkeypatch.setattr(gpu, "stages", lambda *args: planned)
    records.append(tmp_path, _fixture())
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--stages", "hangs,fails,works"])
    said = capsys.readouterr().out
    assert "hangs: stopped after" in said
    assert "broken here" in said
    assert "works: passed" in said
    assert "3.00x ring + SDPA math (wall)" in said
    assert [o["name"] for o in json.loads((tmp_path / "stages.json").read_text())] == [
        "hangs",
        "fails",
        "works",
    ]


# -- the floor of a step ---------------------------------------------------------------------------


def test_floor_is_the_projections_and_the_rings_at_the_measured_bandwidth(monkeypatch, capsys):
    monkeypatch.setattr(floor, "POINTS", floor.POINTS[:1])
    monkeypatch.setattr(floor, "microseconds", lambda case, budget: (30.0, 90.0, 10.0))
    monkeypatch.setattr(floor, "read_bandwidth", lambda size, device: Ceiling("", "", 2.0, "GB/s"))
    threads = torch.get_num_threads()
    floor.main(["--threads", "1"])
    torch.set_num_threads(threads)
    ring = 4 * 2 * 128 * 32 / 2.0 / 1e3  # microseconds at 2 GB/s
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[4].split("|")[1:-1]]
    assert cells == [
        "1",
        "1, 128, 4, 32",
        "30",
        "90",
        "3",
        f"{10 + ring:.3g}",
        f"{30 / (10 + ring):.3g}",
    ]


def test_step_reference_and_projections_are_all_timed():
    case = grid.case_of(grid.NARROW, 2, "step", "float32")
    step, reference, projections = floor.microseconds(case, 0.01)
    assert 0 < step < reference
    assert 0 < projections < reference
