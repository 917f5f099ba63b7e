"""The distributed example: two replicas in processes of their own, of which one is killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import continual_mha as co

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ray = pytest.importorskip("ray", reason="needs ray: pip install 'continual-mha[distributed]'")

from examples import ray_pools  # noqa: E402  (imports ray)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def _cluster():
    """Ray on this machine, its workers importing this tree."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


def tokens(tick, number):
    generator = torch.Generator().manual_seed(1000 * tick + number)
    return torch.randn(ray_pools.EMBED_DIM, generator=generator)


@pytest.mark.usefixtures("_cluster")
@pytest.mark.timeout(300)
def test_streams_survive_the_loss_of_a_replica():
    """Killed between exports, twice: every output is that of one pool which lost nothing."""
    pool = co.StreamPool(ray_pools.Model(), 6, (ray_pools.EMBED_DIM,))
    router = ray_pools.Router(ray_pools.Model, 2, 3, (ray_pools.EMBED_DIM,), export_every=10)
    numbers = [router.open() for _ in range(5)]
    local = {number: pool.open() for number in numbers}
    assert {stream.replica for stream in router._streams.values()} == {0, 1}
    answered = 0
    for tick in range(60):
        if tick in (7, 45):  # before the first export, and after
            ray.kill(router.replicas[tick % 2])
        if tick == 20:
            router.close(numbers[0])
            pool.close(local.pop(numbers[0]))
            late = router.open()
            local[late] = pool.open()
        due = [n for n in local if (n + tick) % 4]
        if tick % 9 == 0:  # refused, and nothing taken
            for bad in (torch.zeros(1), torch.zeros(ray_pools.EMBED_DIM, dtype=torch.float64)):
                with pytest.raises(ValueError, match=r"a token must be torch.float32 of the shape"):
                    router.tick({n: tokens(tick, n) for n in due[1:]} | {due[0]: bad})
        for n in due:
            pool.push(local[n], tokens(tick, n))
        expected = pool.tick()
        outputs = router.tick({n: tokens(tick, n) for n in due})
        assert outputs.keys() == {n for n in due if local[n] in expected}
        for n, row in outputs.items():
            torch.testing.assert_close(row, expected[local[n]], rtol=1e-4, atol=1e-5)
            answered += 1
    assert router.losses == 2
    assert answered > 50
    assert router.progress().count("\n") == 1
    router.open()
    with pytest.raises(co.PoolFull):
        router.open()
