"""The load benchmark: its traffic, and one run of it from end to end."""

from __future__ import annotations

import gc
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


@pytest.mark.parametrize("most", [1, 5, 40, 10_000])
@pytest.mark.parametrize("fitting", [1, 2, 7, 100, 5000])
def test_search_finds_about_how_many_streams_fit(fitting, most, monkeypatch):
    """A tick of so many takes 80 % of its time; of none that is tried there is no room for."""
    tried = []

    def serve(server, slots, ticks, real_time):
        tried.append(slots)
        assert (server, ticks, real_time) == (slots, 15, False)
        p50_ms = 32.0 * slots / (fitting + 0.5)
        return load.Load(slots, ticks, 0, 1.0, 0, 0, p50_ms, p50_ms, p50_ms)

    monkeypatch.setattr(load, "serve", serve)
    found, best = load.find(lambda slots: slots, most, 15), min(fitting, most)
    assert best - max(1, best // 15) < found <= best
    assert max(tried, default=0) <= most
    assert len(tried) < 25


def test_rings_take_half_of_the_memory(monkeypatch):
    monkeypatch.setattr(load.machine, "free_memory", lambda device: 10_000)
    family, cpu = grid.Family("small", 16, 2, 4), torch.device("cpu")
    assert load._room(family, cpu, torch.float32) == 5_000 // (2 * 4 * 16 * 4)
    assert load._room(family, cpu, torch.bfloat16) == 5_000 // (2 * 4 * 16 * 2)
    assert load._room(grid.LONG_4096, cpu, torch.float32) == 1


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
    assert gc.get_freeze_count() == 0
    monkeypatch.setattr(load, "find", lambda *args, **kwargs: 8)
    monkeypatch.setitem(load.SERVERS, "module", lambda module, slots: serve(slots))
    monkeypatch.setattr(load, "LATE", 0.1)
    found = load.measure(load.FAMILIES["speech"], "module", torch.device("cpu"), torch.float32, 1)
    assert (found.slots, found.late, tried[2:]) == (7, 0, [8, 7])
    assert "8 streams: 3 late in 3 ticks" in capsys.readouterr().out
    assert load.serve(serve(8), 8, 10, True).ticks == 2  # of which one may be late


def test_a_single_stream_that_is_late_is_the_result(monkeypatch):
    monkeypatch.setattr(load.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(load, "find", lambda *args, **kwargs: 1)
    monkeypatch.setitem(load.SERVERS, "module", lambda module, slots: _Server(slots, 0.05))
    found = load.measure(load.FAMILIES["speech"], "module", torch.device("cpu"), torch.float32, 1)
    assert (found.slots, found.late) == (1, 1)


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
