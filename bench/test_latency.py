"""Latency of one step as the host sees it: ``pytest bench --benchmark-only``.

``pytest-benchmark`` keeps its own history (``--benchmark-autosave``, ``--benchmark-compare``);
``python -m bench`` is what tables and plots are made from.
"""

from __future__ import annotations

import pytest
import torch

from bench.grid import AUDIO, DETECTION, EXAMPLE, Case
from bench.peers import Peer, all_peers
from bench.problem import TOLERANCE, Problem

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEERS = [peer for peer in all_peers(DEVICE) if "step" in peer.modes]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("family", [EXAMPLE, AUDIO, DETECTION], ids=lambda family: family.name)
def test_one_step_of_one_stream(benchmark, family, peer: Peer):
    case = Case(family.name, 1, *family[1:], 1, "float32", "step")
    reason = peer.why_absent(case)
    if reason is not None:
        pytest.skip(reason)
    problem = Problem(case, DEVICE)
    ready = peer.setup(problem)
    with ready.context():
        assert problem.error(ready.run()) <= TOLERANCE[case.dtype]
        benchmark(ready.run)
