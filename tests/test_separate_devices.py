"""Tests that run on a GPU mix no tensors of two devices, as far as that can be told without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED, PTX

TESTS = Path(__file__).parent
MIXUPS = TESTS / "device_mixups.py"

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU"),
    pytest.mark.skipif(INTERPRETED or PTX, reason="it would say the same again"),
]


def test_chosen_tests_run_on_devices_that_do_not_mix_and_mistakes_are_found():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "separate_devices", "-p", "no:cacheprovider"]
    command += ["-q", "--backends", "triton", "-k", "triton and not autocast", "--one-in", "3"]
    files = [MIXUPS, TESTS / "test_repeat.py", TESTS / "test_state.py"]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "CONTINUAL_MHA_BACKEND": "auto"}
    said = subprocess.run(
        [*command, *map(str, files)], env=environment, capture_output=True, text=True
    ).stdout
    mistakes = re.findall(r"^def (test_\w+)", MIXUPS.read_text(), re.M)[:-1]
    assert sorted(re.findall(r"^FAILED \S+::(\w+)", said, re.M)) == sorted(mistakes), said[-4000:]
    [passed] = re.findall(r"(\d+) passed", said)
    assert int(passed) > 150
