"""Triton on a driver that records: its binder, its launcher and its calls, all but the device.

``libcuda.c`` stands in for the driver's library. What Triton passes to it is what it would pass to
a GPU, so that the arguments of a launch can be read as the kernel would read them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton

from bench import aot

HERE = Path(__file__).resolve().parent
STREAM = 0x5EED  # the current stream's handle
_NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
_LISTENER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class Recorded(NamedTuple):
    """A launch as the driver got it; parameters in the order and the bytes of the machine code."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    pdl: bool
    parameters: tuple[bytes, ...]


def _build() -> Path:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    source = HERE / "libcuda.c"
    about = source.read_bytes() + str(_NVIDIA).encode()
    digest = hashlib.sha256(about).hexdigest()[:16]
    library = HERE.parent.parent / "build" / "recording_driver" / digest / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command += ["-isystem", str(_NVIDIA / "include"), "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(partial)], check=True)
        partial.replace(library)
    return library


@functools.cache
def _sizes_of(cubin: Path) -> list[int]:
    """Bytes of each parameter of the only kernel in ``cubin``, in their order."""
    about = aot.tool("cuobjdump", cubin.read_bytes(), "-elf")
    found = re.findall(r"EIATTR_KPARAM_INFO.*?Ordinal\s*:\s*(\w+).*?Size\s*:\s*(\w+)", about, re.S)
    sizes = {int(ordinal, 16): int(size, 16) for ordinal, size in found}
    return [sizes[i] for i in range(len(sizes))]


@contextmanager
def recording_driver() -> Iterator[list[Recorded]]:
    """Triton with this driver in place; collects the launches."""
    from triton.backends.nvidia import driver as nvidia

    path = _build()
    # By its name: Triton's modules are linked to it, and ask for it again.
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    launches: list[Recorded] = []
    cubins: dict[int, Path] = {}

    def loaded(module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        cubins[function] = next(Path(p) for n, p in files.items() if n.endswith(".cubin"))

    @_LISTENER
    def listen(
        function: int, grid: Any, block: Any, shared: int, stream: int, pdl: int, parameters: Any
    ) -> None:
        values = [
            ctypes.string_at(parameters[i], size)
            for i, size in enumerate(_sizes_of(cubins[function]))
        ]
        launches.append(
            Recorded(
                function, tuple(grid[:3]), tuple(block[:3]), shared, stream, bool(pdl),
                tuple(values),
            )
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.libcuda_path = str(path.parent)
        nvidia.libcuda_dirs.cache_clear()
        nvidia.library_dirs.cache_clear()
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        made = nvidia.CudaDriver()
        made.get_current_stream = lambda device: STREAM
        patch.setattr(triton.runtime.driver, "_active", made)
        triton.knobs.runtime.kernel_load_end_hook.add(loaded)
        library.listen(listen)
        try:
            yield launches
        finally:
            library.listen(None)
            triton.knobs.runtime.kernel_load_end_hook.remove(loaded)
            nvidia.libcuda_dirs.cache_clear()
            nvidia.library_dirs.cache_clear()
