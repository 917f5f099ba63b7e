"""The load benchmark: its traffic, and one run of it from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from bench import grid, load


def test_traffic_is_reproducible_and_consistent():
    """Nobody joins twice, and only those who are there leave or are active."""
    first, second = load.Traffic(200, seed=3), load.Traffic(200, seed=3)
    there = first.first.clone()
    for _ in range(500):
        tick, again = first.next(), second.next()
        assert all(torch.equal(a, b) for a, b in zip(tick, again, strict=True))
        assert not (tick.joined & there).any()
        assert not (tick.left & ~there).any()
        there = (there & ~tick.left) | tick.joined
        assert not (tick.active & ~there).any()
    assert first.joined
    assert first.left
    assert 0.75 < first.taken / (500 * 200) < 0.95


@pytest.mark.parametrize("through", sorted(load.SERVERS))
def test_run_writes_a_row_that_says_what_it_served(through, tmp_path, monkeypatch):
    monkeypatch.setitem(load.FAMILIES, "detection", grid.Family("detection", 16, 2, 4))
    monkeypatch.setattr(load, "_room", lambda *args: 8)
    threads = torch.get_num_threads()
    arguments = ["--device", "cpu", "--family", "detection", "--through", through]
    try:
        load.main([*arguments, "--seconds", "0.4", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    [row] = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    assert row["kind"] == "load"
    assert row["through"] == through
    assert row["family"]["embed_dim"] == 16
    assert 1 <= row["slots"] <= 8
    assert row["ticks"] == 10
    assert row["late"] <= 10
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
    assert row["machine"]["commit"]


@pytest.mark.parametrize(("limit", "expected"), [(None, [60.0] * 4), (36.0, [3.0] * 4), (2.0, [])])
def test_runs_share_the_time_that_there_is(limit, expected, tmp_path, monkeypatch, capsys):
    """A third of a run's share is spent in real time, and the clock stands for the other two."""
    now, spent = [0.0], []

    def measure(family, through, device, dtype, seconds):
        spent.append(seconds)
        now[0] += 3 * seconds
        return load.Load(1, 1, 0, 1.0, 0, 0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(load, "measure", measure)
    monkeypatch.setattr(load.time, "monotonic", lambda: now[0])
    threads = torch.get_num_threads()
    arguments = ["--device", "cpu", "--out", str(tmp_path)]
    try:
        load.main(arguments if limit is None else [*arguments, "--limit", str(limit)])
    finally:
        torch.set_num_threads(threads)
    assert spent == pytest.approx(expected)
    assert capsys.readouterr().out.startswith("stopped") is (not expected)
