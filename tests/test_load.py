"""The load benchmark: its traffic, and one run of it from end to end."""

from __future__ import annotations

import json

import pytest
import torch

import continual_mha as co
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
        load.main([*arguments, "--seconds", "1", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    [row] = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    assert row["kind"] == "load"
    assert row["through"] == through
    assert row["family"]["embed_dim"] == 16
    assert 1 <= row["slots"] <= 8
    assert row["ticks"] == 25  # in a second
    assert row["late"] <= 10
    assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"]
    assert row["machine"]["commit"]


class _Server:
    """Says that every tick lasted so many seconds, and notes how old its streams are."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.module = co.SingleOutputMultiheadAttention(16, 2, sequence_len=4)
        self.module.start_streams(slots)
        self.seconds, self.ages = seconds, []

    def tick(self, tick: load.Tick) -> float:
        self.ages.append(self.module.get_stream(0).position.item())
        return self.seconds


def test_streams_are_served_at_their_full_age():
    """Young ones have few slots to attend to: a short search would find room for too many."""
    server = _Server(3, 1e-6)
    load.serve(server, 3, 2, False)
    assert server.ages[0] == 0
    assert set(server.ages[1:]) == {4}


def test_a_run_that_has_failed_ends_at_once_and_fewer_streams_are_tried(monkeypatch, capsys):
    tried = []

    def serve(slots):
        tried.append(slots)
        return _Server(slots, 0.05 if slots > 7 else 0.01)

    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    assert load.serve(serve(8), 8, 1500, True).ticks == 2
    assert load.serve(serve(7), 7, 1500, True).ticks == 1500
    monkeypatch.setattr(load, "find", lambda *args, **kwargs: 8)
    monkeypatch.setitem(load.SERVERS, "module", lambda module, slots: serve(slots))
    monkeypatch.setattr(load, "LATE", 0.1)
    found = load.measure(load.FAMILIES["speech"], "module", torch.device("cpu"), torch.float32, 1)
    assert (found.slots, found.late, tried[2:]) == (7, 0, [8, 7])
    assert "8 streams: 3 late in 3 ticks" in capsys.readouterr().out


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
