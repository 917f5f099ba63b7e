"""The dispatcher's choices beside everything that it could have chosen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pretended_cuda import PretendedCuda
from recording_driver import recording_driver

from bench import ahead, choices, grid, lost, machine, measure, records, report, timing
from bench.grid import Case
from bench.ratios import Results
from continual_mha import inputs, reference
from continual_mha.triton_kernels import launch as launcher
from continual_mha.triton_kernels import plan

CASES = list(grid.cases("cuda", "standard", ("step",), ("bfloat16",)))
TINY = Case("tiny", 3, 32, 2, 24, 1, "float32", "step")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


def row(way, median, case=TINY, formulation="kv", **changes):
    about = {"kind": "way", "case": case._asdict(), "formulation": formulation, "error": 0.0}
    return (
        about
        | {"status": "ok", "timer": "graph", "plan": way._asdict(), "median_us": median}
        | changes
    )


# -- what there is to choose -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("formulation", choices.FORMULATIONS)
def test_ways_begin_with_the_tables_choice_and_take_every_path_that_a_table_names(
    formulation, case
):
    ways = choices.ways(case, formulation)
    assert ways[0] == choices.plan_of(case, formulation)
    assert len(set(ways)) == len(ways) > 1
    for way in ways:
        slots = way.block_l if formulation == "kv" else way.block_s
        assert slots & (slots - 1) == 0
        assert way.splits * 16 <= max(case.sequence_len, 16)


def test_every_path_is_tried_somewhere():
    for formulation, rules in (("kv", plan.STEP_RULES), ("input", plan.INPUT_RULES)):
        tried = {way.path for case in CASES for way in choices.ways(case, formulation)}
        assert tried == {rule.path for rule in rules}


def test_our_own_projections_are_tried_beside_torchs_where_the_tables_change_over():
    for n in (64, 128):
        (case,) = [x for x in CASES if (x.family, x.batch_size) == (grid.EXAMPLE.name, n)]
        assert {"chain", "gemm"} <= {way.path for way in choices.ways(case, "kv")}


def test_tiles_under_way_and_registers_of_a_step_over_inputs_are_tried():
    case = Case("wide", 512, 1024, 8, 64, 1, "bfloat16", "step")
    ways = choices.ways(case, "input")
    usual = ways[0]
    assert (usual.path, usual.stages, usual.registers) == ("gemm", 3, 128)
    deep = [usual._replace(stages=n, registers=most) for n in (2, 3, 4) for most in (None, 128)]
    assert set(deep) <= set(ways)
    assert [way.stages for way in ways if way.stages < 2] == []
    lines = {choices.Choice(case, "input", None, row(way, 1.0, case, "input")).line for way in deep}
    assert len(lines) == len(deep)


# -- what the rows say -----------------------------------------------------------------------------


def test_loss_is_what_the_tables_choice_takes_over_the_fastest_right_way():
    usual, other, third = choices.ways(TINY, "kv")[:3]
    rows = [row(usual, 12.0), row(other, 10.0), row(third, 11.0), row(third, 1.0, timer="cold")]
    rows.append({**row(third, 1.0), "status": "wrong"})
    (found,) = choices.choices(rows)
    assert found.loss == pytest.approx(1.2)
    assert found.best["plan"] == other._asdict()
    assert found.line.endswith("1.20x")
    (unmeasured,) = choices.choices(rows[1:])
    assert unmeasured.loss == float("inf")
    assert "not measured" in unmeasured.line


def test_newest_time_of_a_way_counts():
    usual, other = choices.ways(TINY, "kv")[:2]
    (found,) = choices.choices(
        [row(usual, 30.0), row(other, 10.0), row(usual, 10.0), row(other, 9.0)]
    )
    assert found.loss == pytest.approx(10 / 9)


def test_times_of_other_sources_do_not_count():
    usual, other = choices.ways(TINY, "kv")[:2]
    old, new = ({"machine": {"sources": name}} for name in ("old", "new"))
    rows = [row(other, 10.0) | old, row(usual, 20.0) | new, row(other, 25.0) | new]
    (found,) = choices.choices(rows)
    assert found.loss == pytest.approx(1.0)


def test_report_says_how_many_choices_lose(tmp_path, capsys):
    usual, other = choices.ways(TINY, "kv")[:2]
    records.append(tmp_path, [row(usual, 12.0), row(other, 10.0)], records.CHOICES)
    choices.main(["--report", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(TINY.label)
    assert lines[-1].startswith("1 of 1 choices")


MEASURED = list(choices.RESULTS.glob(f"*/{records.CHOICES}"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_tables_choose_no_way_that_is_much_slower_than_the_fastest_measured_one(path):
    found = choices.choices(records.read(path.parent, records.CHOICES))
    assert found
    measured = [choice for choice in found if choice.chosen is not None]
    assert [choice.line for choice in measured if choice.loss > choices.TOLERATED] == []


def timed(name, median, timer="graph"):
    times = {"median_us": median, "p20_us": median, "p80_us": median}
    about = {"kind": "time", "case": TINY._asdict(), "implementation": name, "status": "ok"}
    return about | {"timer": timer} | times


def test_automatic_choice_loses_to_those_by_name_that_are_over_a_twentieth_faster():
    rows = [timed("ours", 10.5), timed("ours:cuda", 10.0), timed("ours:input", 9.9)]
    rows += [timed("another", 1.0), timed("ours:cuda", 1.0, "host")]
    assert choices.losses(Results(rows)) == [f"{TINY.label}: 1.06 times ours:input (graph)"]


@pytest.mark.parametrize("results", report.load()["gpu"])
def test_automatic_choice_is_not_much_slower_than_another_on_a_gpu(results):
    assert choices.losses(results) == []


# -- measuring -------------------------------------------------------------------------------------


@no_gpu
@pytest.mark.skipif(launcher.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("formulation", choices.FORMULATIONS)
def test_what_is_compiled_ahead_is_what_the_launch_takes(formulation, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launcher, "_compiled", {})
    way = choices.plan_of(TINY, formulation)
    n, e, h, length = TINY.batch_size, TINY.embed_dim, TINY.num_heads, TINY.sequence_len
    mha = torch.nn.MultiheadAttention(e, h).requires_grad_(False)
    sizes = [(n, length, e)] if formulation == "input" else 2 * [(n, h, length, e // h)]
    rings = tuple(torch.zeros(size) for size in sizes)
    with recording_driver() as launched:
        choices.compile_way(TINY, formulation, way)
        compiled = set(tmp_path.rglob("*.cubin"))
        assert compiled
        assert not launched
        position = torch.zeros(n, dtype=torch.int64)
        choices._step(formulation, mha, torch.zeros(n, e), rings, position, way)
    assert launched
    assert set(tmp_path.rglob("*.cubin")) == compiled


@pytest.fixture
def pretended(monkeypatch):
    """A pretended GPU, on which plain PyTorch stands in for the kernels, whatever the plan."""
    for name, module in (("ring_step_", reference), ("input_step_", inputs)):
        step = getattr(module, name)
        monkeypatch.setattr(choices.kernels, name, lambda *args, plan, step=step: step(*args))
    monkeypatch.setattr(timing, "_LEAST_FLUSHED", 1 << 12)
    monkeypatch.setattr(ahead, "compile_all", lambda *args: [])
    monkeypatch.setattr(grid, "cases", lambda *args: iter([TINY]))
    machine.describe.cache_clear()
    with PretendedCuda().in_place():
        yield
    machine.describe.cache_clear()


@no_gpu
def test_every_way_is_measured_from_the_same_state(pretended, tmp_path, capsys):
    choices.main(["--out", str(tmp_path), "--budget", "0.001"])
    rows = records.read(tmp_path, records.CHOICES)
    assert {row.get("status", "ok") for row in rows} == {"ok"}
    for formulation in choices.FORMULATIONS:
        measured = [row for row in rows if row.get("formulation") == formulation]
        for timer in choices.TIMERS:
            plans = [row["plan"] for row in measured if row["timer"] == timer]
            assert plans == [way._asdict() for way in choices.ways(TINY, formulation)]
    assert " of 2 choices" in capsys.readouterr().out.splitlines()[-1]
    choices.main(["--out", str(tmp_path), "--resume"])  # nothing is left
    assert records.read(tmp_path, records.CHOICES) == rows


@no_gpu
def test_ways_that_fail_or_are_wrong_are_not_timed_and_spoil_no_other(
    pretended, tmp_path, monkeypatch
):
    step = choices.kernels.ring_step_

    def partly(*args, plan):
        if plan.path == "chain":
            raise RuntimeError("out of resource: shared memory")
        return step(*args, plan=plan) * (1.01 if plan.path == "fused" else 1.0)

    monkeypatch.setattr(choices.kernels, "ring_step_", partly)
    choices.main(["--out", str(tmp_path), "--budget", "0.001"])
    rows = [r for r in records.read(tmp_path, records.CHOICES) if r.get("formulation") == "kv"]
    found = {(row["plan"]["path"], row["status"]) for row in rows}
    assert found == {("chain", "failed"), ("fused", "wrong"), ("gemm", "ok"), ("group", "ok")}
    assert "shared memory" in next(row["reason"] for row in rows if row["status"] == "failed")
    (choice,) = [c for c in choices.choices(rows) if c.formulation == "kv"]
    assert choice.chosen is None


@no_gpu
def test_way_that_loses_the_device_is_left_out_when_the_run_goes_on(
    pretended, tmp_path, monkeypatch
):
    step, synchronize = choices.kernels.ring_step_, torch.cuda.synchronize
    broken, exits = [], []

    def on_what_is_left(call):
        if broken and not exits:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return call()

    def breaking(*args, plan):
        if plan.path == "chain" and not exits:
            broken.append(plan._asdict())
        return on_what_is_left(partial(step, *args, plan=plan))

    def leave():
        exits.append(None)
        raise SystemExit(lost.LOST)

    monkeypatch.setattr(choices.kernels, "ring_step_", breaking)
    monkeypatch.setattr(torch.cuda, "synchronize", partial(on_what_is_left, synchronize))
    monkeypatch.setattr(measure, "leave", leave)
    arguments = ["--out", str(tmp_path), "--budget", "0.001", "--resume"]
    with pytest.raises(SystemExit):
        choices.main(arguments)
    first = records.read(tmp_path, records.CHOICES)
    assert first[-1]["reason"].startswith(lost.REASON)
    assert first[-1]["plan"] == broken[0]
    assert {row["status"] for row in first[:-1]} == {"ok"}
    choices.main(arguments)
    later = records.read(tmp_path, records.CHOICES)[len(first) :]
    assert later[-1]["kind"] == "case"
    measured = [row["plan"] for row in later[:-1] if row["formulation"] == "kv"]
    assert broken[0] not in measured
    assert {plan["path"] for plan in measured} == {"chain", "fused", "gemm", "group"}
