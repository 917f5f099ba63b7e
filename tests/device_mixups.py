"""Mistakes that a GPU alone refuses, for `test_separate_devices`: all but the last test fail."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("backend")
HOST = torch.device("cpu")


def test_generator_of_the_cpu():
    torch.randn(3, generator=torch.Generator())


def test_sum_of_two_devices():
    torch.ones(3) + torch.ones(3, device=HOST)


def test_number_of_the_gpu_beside_numbers_of_the_cpu():
    torch.ones(3, device=HOST) * torch.ones(3)[0]


def test_index_of_the_gpu():
    torch.ones(3, device=HOST)[torch.tensor([1])]


def test_views_of_two_devices():
    torch.ones(3, 2).T[0].add_(torch.ones(6, device=HOST).view(2, 3)[0].double())


def test_token_beside_a_model_that_was_moved():
    torch.nn.Linear(2, 2).cpu()(torch.ones(2))


def test_numpy_of_the_gpu():
    torch.ones(3).numpy()


def test_what_a_gpu_takes():
    here, there = torch.ones(3, device=HOST), torch.ones(3)
    sums = [there + here[0], there + here.to(there.device), there + here.cuda(), there.cpu() + here]
    assert [x.device.type for x in sums] == ["cuda", "cuda", "cuda", "cpu"]
    assert [x.is_cuda for x in sums] == [True, True, True, False]
    there[1:] = here[1:]
    there[here > 0] = 1.0
    there.copy_(here)
    sums[3].numpy()
    torch.nn.Linear(3, 3)(torch.randn(3, generator=torch.Generator("cuda")))
