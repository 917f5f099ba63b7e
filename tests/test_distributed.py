"""In the wrappers of `torch.distributed`: two processes, each with streams of its own."""

from __future__ import annotations

import copy
import inspect
import os

import pytest
import torch
from oracles import EMBED, LENGTH, build
from torch import distributed, nn
from torch.multiprocessing import spawn

RANKS = 2

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


def data_parallel(model):
    wrapper = nn.parallel.DistributedDataParallel
    names = ("forward_sync_buffers", "broadcast_buffers")  # as it is called now and was before
    known = [name for name in names if name in inspect.signature(wrapper).parameters]
    return wrapper(model, **{known[0]: False})


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def clip(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, LENGTH, EMBED, generator=generator)


def answer(model, attention, mode, x):
    attention.clean_state()
    attention.call_mode = mode
    if mode != "forward_step":
        return model(x)
    for token in x[:, :-1].unbind(1):
        attention(token)
    return model(x[:, -1])


def train(rank, wrap):
    """The gradient of a wrapped model is the mean of those over the data of all ranks."""
    torch.manual_seed(0)
    plain = nn.Sequential(build(forward_returns_attn_mask=False), nn.Linear(EMBED, 3))
    model = copy.deepcopy(plain)
    wrapped = wrap(model)
    for mode in ("forward", "forward_steps", "forward_step"):
        plain.zero_grad()
        wrapped.zero_grad()
        for other in range(RANKS):
            loss = answer(plain, plain[0], mode, clip(other)).square().mean()
            (loss / RANKS).backward()
        answer(wrapped, model[0], mode, clip(rank)).square().mean().backward()
        for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
            grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
            torch.testing.assert_close(grad, expected.grad)


def stream(rank, wrap):
    """Every process goes on with its own streams, also where there are other buffers."""
    expected = build()
    model = nn.Sequential(copy.deepcopy(expected))
    model.register_buffer("other", torch.ones(1))
    model[0].call_mode = "forward_step"
    wrapped = wrap(model)
    for token in clip(rank).repeat(1, 2, 1).unbind(1):
        torch.testing.assert_close(wrapped(token), expected.forward_step(token))


def run(rank, meeting):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=RANKS)
    for wrap in (data_parallel, sharded):
        train(rank, wrap)
        stream(rank, wrap)
    distributed.barrier()
    os._exit(0)  # threads of torch's abort some processes on their way out


def test_wrapped_modules_train_and_keep_streams_of_their_own(tmp_path):
    spawn(run, (tmp_path / "meeting",), nprocs=RANKS)
