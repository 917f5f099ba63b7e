"""What the CUDA compiler makes of ``csrc/cuda``, read without a GPU."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUILDS = ROOT / "build" / "cuda_compile"
TORCH = Path(torch.__file__).parent
ARCHS = (80, 90, 100)
DTYPES = ("float", "Half", "BFloat16")
# kThreads * registers may not exceed the 64 Ki of a multiprocessor; a step wants two blocks there,
# as does attention over a clip below sm_100, an outer product three.
MAX_REGISTERS = {"ring_step_kernel": 128, "attend_shared": 128, "outer_product_kernel": 80}


@dataclass(frozen=True)
class Kernel:
    """One kernel of one target, with the bytes of memory that it uses."""

    name: str  # as c++filt would, roughly: ring_step_kernel<float, 1, 0>
    arch: int
    registers: int
    stack: int
    local: int
    static_shared: int

    @property
    def is_empty(self) -> bool:
        """Clusters exist from sm_90 on, where counters serve teams of one stream only."""
        if not self.name.startswith("ring_step"):
            return False
        cluster, single = self.name.endswith("1>"), ", 1, " in self.name
        return self.arch < 90 if cluster else self.arch >= 90 and not single


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        pytest.skip("no nvcc: set CUDA_HOME or put it on the PATH")
    return nvcc


def find_cuobjdump() -> str:
    """The toolkit's, or the one that Triton brings."""
    beside = Path(find_nvcc()).resolve().parent / "cuobjdump"
    found = shutil.which("cuobjdump") or (str(beside) if beside.exists() else None)
    if found is None:
        triton = pytest.importorskip("triton", reason="neither cuobjdump nor Triton's copy of it")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not os.access(found, os.X_OK):
        pytest.skip("no cuobjdump")
    return found


FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-isystem", str(TORCH / "include")]


@functools.cache
def library() -> Path:
    """As an installation builds it, of its objects where those are still there."""

    def build(folder: Path, nvcc: str) -> None:
        pytest.importorskip("setuptools", minversion="77")
        wanted = {"CPU": "0", "CUDA": "1"}
        env = {**os.environ, **{f"CONTINUAL_MHA_BUILD_{x}": y for x, y in wanted.items()}}
        env["CONTINUAL_MHA_WERROR"] = "1"
        env["CONTINUAL_MHA_CUDA_ARCHS"] = ";".join(map(str, ARCHS))
        env["PATH"] = f"{Path(nvcc).parent}:{env['PATH']}"
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)]
        command += ["--build-temp", str(folder / "temp")]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    [built] = _once("", build).glob("**/continual_mha_cuda.so")
    return built


@functools.cache
def ptx(arch: int) -> dict[str, str]:
    """Of each source its kernels as PTX, which says from where in it each instruction comes."""

    def compile_into(folder: Path, nvcc: str) -> None:
        for source in SOURCES.glob("*.cu"):
            target = folder / f"{source.stem}.ptx"
            command = [nvcc, *FLAGS, "-ptx", "-lineinfo", f"-arch=compute_{arch}", str(source)]
            subprocess.run([*command, "-o", str(target)], check=True, capture_output=True)

    return {path.stem: path.read_text() for path in _once(f"-ptx{arch}", compile_into).iterdir()}


def _once(kind: str, compile_into: Callable[[Path, str], None]) -> Path:
    """A folder named by the hash of all that it depends on, so that a second run compiles nothing.

    Nor does a second process, which waits for the first.
    """
    nvcc = find_nvcc()
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True).stdout
    inputs = [*sorted(SOURCES.iterdir()), ROOT / "csrc" / "common.h", ROOT / "setup.py"]
    inputs.append(Path(__file__))
    content = [version, torch.__version__.encode(), *(path.read_bytes() for path in inputs)]
    folder = BUILDS / (hashlib.sha256(b"".join(content)).hexdigest()[:16] + kind)
    BUILDS.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            compile_into(partial, nvcc)
            partial.rename(folder)
    return folder


def demangle(symbol: str) -> str:
    """``..16ring_step_kernelIN3c108BFloat16ELi4ELNS0_5MergeE1EEE..`` to a readable name."""
    kernel = re.search(r"\d+([a-z_]+_kernel)I", symbol)
    assert kernel is not None, symbol
    dtype = re.search(r"_kernelI(?:N3c10)?\d*(f|Half|BFloat16)", symbol)
    assert dtype is not None, symbol
    numbers = re.findall(r"(?:Li|MergeE)(\d+)E", symbol)
    arguments = ["float" if dtype[1] == "f" else dtype[1], *numbers]
    return f"{kernel[1]}<{', '.join(arguments)}>"


@functools.cache
def kernels() -> tuple[Kernel, ...]:
    found = []
    for arch in ARCHS:
        usage = re.findall(
            r"Function (\w+_kernel\w*):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
            read_code("-res-usage", arch),
        )
        for symbol, *counts in usage:
            registers, stack, shared, local = map(int, counts)
            found.append(Kernel(demangle(symbol), arch, registers, stack, local, shared))
    return tuple(found)


@functools.cache
def machine_code(arch: int) -> dict[str, str]:
    """SASS by kernel name."""
    functions = re.split(r"^\s*Function : ", read_code("-sass", arch), flags=re.MULTILINE)[1:]
    return {demangle(text.split()[0]): text for text in functions if "_kernel" in text.split()[0]}


def read_code(what: str, arch: int) -> str:
    """What cuobjdump says of the library's code for one target."""
    command = [find_cuobjdump(), what, "-arch", f"sm_{arch}", str(library())]
    beside = str(Path(command[0]).parent)  # nvdisasm
    env = {**os.environ, "PATH": f"{beside}:{os.environ['PATH']}"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def used_ring_steps(arch: int) -> dict[str, str]:
    unused = {k.name for k in kernels() if k.arch == arch and k.is_empty}
    code = machine_code(arch).items()
    return {x: text for x, text in code if x.startswith("ring_step") and x not in unused}


def test_two_that_need_a_build_make_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BUILDS", tmp_path / "builds")
    calls = []

    def build(folder: Path, nvcc: str) -> None:
        calls.append(nvcc)
        time.sleep(0.05)
        (folder / "built").touch()

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: _once("", build), range(2)))
    assert made[0] == made[1]
    assert (made[0] / "built").exists()
    assert len(calls) == 1


def test_every_kernel_is_there_for_every_target() -> None:
    expected = {
        f"ring_step_kernel<{dtype}, {streams}, {merge}>"
        for dtype in DTYPES
        for streams in (1, 4)
        for merge in (0, 1)
    }
    for name in ("attend_shared_kernel", "attend_shared_backward_kernel", "outer_product_kernel"):
        expected |= {f"{name}<{dtype}>" for dtype in DTYPES}
    for arch in ARCHS:
        assert {k.name for k in kernels() if k.arch == arch} == expected


def test_no_kernel_spills_or_uses_local_memory() -> None:
    bad = [k for k in kernels() if k.stack or k.local]
    assert not bad, bad


def test_registers_and_static_shared_memory_stay_within_the_design() -> None:
    for kernel in kernels():
        limit = next(v for name, v in MAX_REGISTERS.items() if kernel.name.startswith(name))
        if kernel.name.startswith("attend_shared") and kernel.arch >= 100:
            limit = 255
        assert kernel.registers <= limit, kernel
        # all of it is dynamic, and planned by the host, but for what the system takes of a block
        assert kernel.static_shared == (1024 if kernel.arch >= 90 else 0), kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_step_reads_ring_and_weights_16_bytes_at_a_time(arch: int) -> None:
    code = used_ring_steps(arch)
    assert len(code) == (9 if arch >= 90 else 6)
    for name, text in code.items():
        ring = re.findall(r"LDGSTS\.E\.(\S*)", text)
        assert ring, name
        assert all(kind.startswith("BYPASS.") and "128" in kind for kind in ring), (name, set(ring))
        # The rows of a weight block are loaded before the first is used.
        assert len(re.findall(r"LDG\.E\.128\.CONSTANT", text)) >= 8, name


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_of_a_step_merge_through_a_cluster_or_a_counter(arch: int) -> None:
    for name, text in used_ring_steps(arch).items():
        uses_cluster = "UCGABAR_ARV" in text
        uses_counter = "ATOMG" in text
        assert (uses_cluster, uses_counter) == (name.endswith("1>"), name.endswith("0>")), name


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_adds_atomically_in_floating_point(arch: int) -> None:
    for name, text in machine_code(arch).items():
        assert not re.search(r"(ATOM|RED)\S*\.(F16|F32|BF16|F64)", text), name


def test_library_needs_only_the_stable_interface_of_torch() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    listing = subprocess.run(
        [nm, "-D", "--undefined-only", "-C", str(library())],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    undefined = {line.split()[-1].split("@")[0] for line in listing.splitlines() if line.strip()}
    assert "aoti_torch_get_current_cuda_stream" not in undefined  # not in torch without CUDA
    outside = [name for name in undefined if re.search(r"c10|at::|torch::|^cu[A-Z]|^cuda", name)]
    assert not outside, outside


def test_library_loads_and_registers_in_torch_without_cuda() -> None:
    script = f"""
import torch
import continual_mha
torch.ops.load_library({str(library())!r})
for name in ("cuda_ring_step_", "cuda_attend_shared", "cuda_attend_shared_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("continual_mha::" + name, "CUDA"), name
x = torch.zeros(1, 1, 4)
try:
    torch.ops.continual_mha.cuda_attend_shared(x, x, x, None, None)
except NotImplementedError:
    print("declined")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "declined"
