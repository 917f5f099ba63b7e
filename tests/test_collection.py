"""Which cases of the tests run by default."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import conftest
import pytest


def collected(
    items: list[Any], all_cases: bool = False, one_in: int = 1, args: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The cases that run, and those that are left out."""
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    asked = {"--all-cases": all_cases, "--one-in": one_in}
    config: Any = SimpleNamespace(getoption=asked.get, hook=hook, args=args)
    conftest.pytest_collection_modifyitems(config, items)
    return [item.nodeid for item in items], [item.nodeid for item in left_out]


class Item:
    def __init__(self, name: str, case: dict[str, Any], *marks: pytest.Mark) -> None:
        self.originalname, self.callspec = name, SimpleNamespace(params=case)
        self.nodeid = f"{name}[{'-'.join(map(str, case.values()))}]"
        self.marks = {mark.name: mark for mark in marks}

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.marks.get(name)


def cases(name: str, *marks: pytest.Mark, count: int = 9, chips: int = 1) -> list[Any]:
    of_each = [{"case": i, "capability": j} for i in range(count) for j in range(chips)]
    return [Item(name, case, *marks) for case in of_each]


def test_a_test_without_marks_runs_every_case() -> None:
    assert len(collected(cases("test_a"))[0]) == 9


def test_one_of_so_many_cases_runs_and_the_same_in_every_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "ON_GPU", False)
    third = pytest.mark.sampled(3).mark
    items = cases("test_a", third) + cases("test_b", third, count=1)
    run, left_out = collected(list(items))
    assert [sum(x.startswith(name) for x in run) for name in ("test_a", "test_b")] == [3, 1]
    assert len(left_out) == 6
    assert collected(items[::-1])[0] == run[::-1]
    monkeypatch.setattr(conftest, "ON_GPU", True)
    assert len(collected(list(items))[0]) == 10


def test_who_asks_for_fewer_cases_gets_them_of_every_test() -> None:
    items = cases("test_a") + cases("test_b", pytest.mark.sampled(2).mark)
    run, _ = collected(items, one_in=4)
    assert [sum(x.startswith(name) for x in run) for name in ("test_a", "test_b")] == [3, 3]


def test_each_case_runs_for_the_chip_whose_turn_it_is() -> None:
    run, left_out = collected(cases("test_a", pytest.mark.in_turn(0, 1).mark, chips=2))
    assert sorted(x[: x.index("-")] for x in run) == [f"test_a[{i}" for i in range(9)]
    assert {x[-2] for x in run} == {"0", "1"}
    assert len(left_out) == 9


def test_who_asks_for_all_cases_gets_them() -> None:
    marks = (pytest.mark.in_turn(0, 1).mark, pytest.mark.sampled(3).mark)
    assert len(collected(cases("test_a", *marks, chips=2), all_cases=True)[0]) == 18


def test_who_names_a_case_gets_it() -> None:
    items = cases("test_a", pytest.mark.sampled(3).mark)
    assert len(collected(items, args=["test_it.py::test_a[4-0]"])[0]) == 9


def test_a_sample_has_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conftest, "ON_GPU", False)
    kinds = [{"size": i, "kind": kind} for i in range(8) for kind in ("kv", "input")]
    rare = [{"size": 1, "kind": kind} for kind in ("delayed", "in 8 bits")]
    items = [Item("test_a", case, pytest.mark.sampled(6).mark) for case in kinds + rare]
    run, _ = collected(items)
    assert len(run) == 4
    assert {x[:-1].split("-")[1] for x in run} == {"kv", "input", "delayed", "in 8 bits"}
