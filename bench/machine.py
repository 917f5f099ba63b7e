"""On what, and of what, a measurement was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import continual_mha

from . import ROOT

_CPUINFO = Path("/proc/cpuinfo")
_GENERATION = {  # its fields on x86, and on Arm
    "cpu family": "family",
    "model": "model",
    "CPU implementer": "implementer",
    "CPU part": "part",
}
_SOURCES = ("continual_mha/*.py", "triton_kernels/*.py", "csrc/*.h", "csrc/*/*")
_PACKAGES = ("triton", "continual-inference", "transformers", "flash-attn", "flashinfer-python")


def cpu_name() -> str:
    """The processor's model name, and what tells generations of that name apart."""
    try:
        first = _CPUINFO.read_text().split("\n\n", 1)[0]
    except OSError:
        return platform.processor() or platform.machine()
    about = dict(re.findall(r"^(.+?)\s*: (.*)$", first, re.M))
    name = about.get("model name", platform.machine())
    known = [f"{word} {about[field]}" for field, word in _GENERATION.items() if field in about]
    return f"{name} ({' '.join(known)})" if known else name


def cpu_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The commit that is checked out, with ``+`` where the sources differ from it.

    A copy of a tree has no git to ask; whoever copies it may name its commit in ``COMMIT``.
    """
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if found is None:
        return os.environ.get("COMMIT", "unknown")
    folders = ("continual_mha", "triton_kernels", "csrc")
    return found + ("+" if _output("git", "status", "--porcelain", "--", *folders) else "")


def source_digest() -> str:
    """A digest of the package's sources, which also tells trees without git apart."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "continual_mha": continual_mha.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else None


@cache
def describe(device_type: str) -> dict[str, Any]:
    """Device, driver, versions and commit, for every row; no name of a host or a user."""
    common = {
        "device_type": device_type,
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": commit(),
        "sources": source_digest(),
    }
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            **common,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
        }
    return {
        "device": f"{cpu_name()}, {cpu_cores()} cores",
        **common,
        "driver": None,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def slug(machine: dict[str, Any]) -> str:
    """A folder name for a kind of device."""
    return re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
