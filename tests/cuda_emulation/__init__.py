"""Builds libraries that run the CUDA kernels on the host: see ``emulated_device.h``."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).parent


def build(name: str) -> Path:
    """The library made of ``name``.cpp; made anew when a source changes."""
    library, errors = _build(name)
    assert not errors, errors
    return library


@functools.cache
def _build(name: str) -> tuple[Path, str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    # Fibers jump between stacks, which fortified longjmp takes for an error.
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wall", "-Werror"]
    flags += ["-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-isystem", str(TORCH / "include"), f"-I{HERE}"]
    flags += ["-include", str(HERE / "emulated_device.h"), f"-L{TORCH / 'lib'}"]
    if name == "emulate_host":
        flags += ["-fvisibility=hidden"]
    sources = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()]
    sources += [path for path in HERE.iterdir() if path.is_file()]
    content = [" ".join(flags).encode(), *(path.read_bytes() for path in sorted(sources))]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    library = ROOT / "build" / "cuda_emulation" / f"{name}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, str(HERE / f"{name}.cpp"), "-o", str(partial), "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return library, done.stderr
        partial.replace(library)
    return library, ""
