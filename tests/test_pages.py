"""Rings of many bytes lie in large pages, where the system gives them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from oracles import build

from continual_mha import pages

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """What Linux notes of the mapping that an address is in."""
    within = False
    for line in SMAPS.read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            begin, end = (int(bound, 16) for bound in bounds.groups())
            within = begin <= address < end
        elif within and line.startswith("VmFlags:"):
            return line.split()[1:]
    pytest.skip("this system does not tell of its pages")


def asks_for_large_pages(x: torch.Tensor) -> bool:
    return "hg" in flags_at(x.data_ptr() + x.nbytes // 2)


@pytest.mark.skipif(not SMAPS.exists(), reason="not on Linux")
@pytest.mark.parametrize("formulation", ["kv", "input"])
def test_rings_of_many_bytes_ask_for_large_pages(formulation: str) -> None:
    module = build(embed_dim=256, num_heads=2, sequence_len=512, formulation=formulation)
    with torch.no_grad():
        module.forward_step(torch.ones(32, 256))
    ring = module._ring_k if formulation == "kv" else module._ring_x
    assert ring.nbytes == 16 << 20
    assert asks_for_large_pages(ring)
    nobody_asked = torch.frombuffer(mmap.mmap(-1, 16 << 20), dtype=torch.uint8)
    assert not asks_for_large_pages(nobody_asked)


def test_what_is_made_is_zero_whatever_was_there() -> None:
    for count in (0, 1, 3 << 20, (2 << 20) + 5):
        torch.full((count,), 7.0)  # and forgotten, so that its memory may come again
        x = pages.zeros((count,), torch.float32, torch.device("cpu"))
        assert x.shape == (count,)
        assert not x.any()
    assert pages.zeros((9 << 20,), torch.int8, torch.device("meta")).is_meta
