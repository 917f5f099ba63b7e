"""What the native libraries are made of, and the wheel that carries them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from continual_mha import _native

ROOT = Path(__file__).parent.parent
# C functions that PyTorch keeps stable, and what every Linux with a C++ runtime has. Some builds of
# PyTorch hold copies of functions of std; the linker sees those first, and asks for no version.
STABLE = re.compile(r"aoti_torch_|torch_")
BASE = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ZNK?St|^(_ITM_\w+|__gmon_start__|__cxa_finalize)$"
)
LIBRARIES = [kind for kind in ("cpu", "cuda") if _native.library_path(kind).exists()]
needs_library = pytest.mark.skipif(
    "cpu" not in LIBRARIES, reason="the native library was not built"
)


def undefined_symbols(library: Path) -> list[str]:
    """Mangled names that the dynamic linker has to find elsewhere, with their versions."""
    listing = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", library], check=True, capture_output=True, text=True
    )
    return [line.split()[-1] for line in listing.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize("kind", LIBRARIES)
def test_library_needs_nothing_of_torch_but_its_stable_interface(kind: str) -> None:
    symbols = undefined_symbols(_native.library_path(kind))
    assert any(STABLE.match(symbol) for symbol in symbols)
    assert [s for s in symbols if not STABLE.match(s) and not BASE.search(s)] == []


@needs_library
def test_library_loads_only_torch_s_own_libraries_and_the_system_s() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listing = subprocess.run(
        ["readelf", "--dynamic", _native.library_path("cpu")],
        check=True,
        capture_output=True,
        text=True,
    )
    needed = set(re.findall(r"\(NEEDED\).*\[([\w+-]+)", listing.stdout))
    assert "libtorch_cpu" in needed
    system = {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert needed <= {"libtorch_cpu"} | system
    assert "RUNPATH" not in listing.stdout
    assert "RPATH" not in listing.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernels_for_a_matrix_unit_are_none_where_the_compiler_does_not_know_it() -> None:
    source = ROOT / "csrc" / "cpu" / "kernels_amx.cpp"
    command = ["g++", "-std=c++17", "-E", source]
    plain = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "kernels_amx() { return nullptr; }" in plain
    assert "tdpbf16ps" not in plain


def copy_of_the_tree(target: Path) -> Path:
    """The sources with the compiler's object files, so that nothing is compiled twice."""
    parts = ["continual_mha", "triton_kernels", "csrc", "build/objects"]
    for part in filter(lambda part: (ROOT / part).exists(), parts):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / part, target / part, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target / name)
    return target


def build_wheel(source: Path, target: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what building it said to whoever installs."""
    target.mkdir()
    code = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, target],
        cwd=source,
        env={**os.environ, "CONTINUAL_MHA_BUILD_CUDA": "0", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    [wheel] = target.iterdir()
    said = [line for line in done.stderr.splitlines() if line.startswith("continual_mha:")]
    return wheel, "\n".join(said)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    return copy_of_the_tree(tmp_path_factory.mktemp("native"))


@needs_library
def test_one_wheel_for_every_python_installs_and_runs_its_library(
    tree: Path, tmp_path: Path
) -> None:
    wheel, said = build_wheel(tree, tmp_path / "wheels")
    assert said == (
        "continual_mha: installs without some native libraries, and works without them "
        "(cuda: CONTINUAL_MHA_BUILD_CUDA is 0)"
    )
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        native = [name for name in archive.namelist() if name.endswith(".so")]
    assert native == ["continual_mha/lib/continual_mha_cpu.so"]

    folder = tmp_path / "fresh"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", "--disable-pip-version-check", wheel], check=True)
    # PyTorch is borrowed from here: behind the environment's own packages, and without ours.
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ran = subprocess.run(
        [python, ROOT / "examples" / "quickstart.py"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "CONTINUAL_MHA_BACKEND": "cpu"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cpu" in ran.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found"),
        ({"CONTINUAL_MHA_BUILD_CPU": "0"}, "CONTINUAL_MHA_BUILD_CPU is 0"),
    ],
    ids=["missing", "not wanted"],
)
def test_without_a_compiler_one_line_says_so_and_the_wheel_is_pure(
    environment: dict[str, str], reason: str, tree: Path, tmp_path: Path
) -> None:
    wheel, said = build_wheel(tree, tmp_path / "wheels", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("\n") == 0
    assert f"cpu: {reason}" in said


def test_a_compiler_that_fails_costs_the_library_and_not_the_installation(
    tree: Path, tmp_path: Path
) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "CONTINUAL_MHA_WERROR": "0"}
    wheel, said = build_wheel(tree, tmp_path / "wheels", **environment)
    assert "the cpu library failed to compile" in said
    with zipfile.ZipFile(wheel) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())


# Compilers that write empty files, and nvcc says of itself what is put in.
CXX = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then touch "$2"; fi
  shift
done
"""
NVCC = """#!/bin/sh
case "$*" in
  *{fails}*)
    echo compiling
    echo "fatal error: cuda_runtime.h: No such file or directory"
    exit 1 ;;
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --list-gpu-arch) echo compute_{target} ;;
esac
"""
MISSING = "fatal error: cuda_runtime.h: No such file or directory"
# name: (nvcc, what is said)
BROKEN_NVCC = {
    "headers are missing": (
        NVCC.format(fails="-isystem", target=90),
        f"the cuda library failed to compile, and is left out: {MISSING}",
    ),
    "it does not run": (NVCC.format(fails="", target=90), f"cuda: nvcc does not run: {MISSING}"),
    "it is no program": ("\0", "cuda: nvcc does not run: [Errno 8] Exec format error"),
    "it is too old": (
        NVCC.format(fails="-isystem", target=52),
        "cuda: nvcc is 13.0, and compiles for none of 80, 90, 100",
    ),
}


@pytest.fixture(params=BROKEN_NVCC)
def broken_nvcc(
    request: pytest.FixtureRequest, tree: Path, tmp_path: Path
) -> tuple[dict[str, str], str]:
    """An environment with torch as if built for CUDA and such an nvcc; and what is to be said."""
    text, said = BROKEN_NVCC[request.param]
    programs, torch = tmp_path / "bin", tmp_path / "packages" / "torch"
    programs.mkdir()
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.13.0'\ncuda: str = '13.0'\n")
    for name, content in (("c++", CXX), ("nvcc", text)):
        (programs / name).write_text(content)
        (programs / name).chmod(0o755)
    return {
        "PYTHONPATH": str(torch.parent),
        "CXX": str(programs / "c++"),
        "CUDA_HOME": str(tmp_path),
        "CONTINUAL_MHA_WERROR": "0",
    }, said


def test_nvcc_that_fails_costs_the_cuda_library_only(
    broken_nvcc: tuple[dict[str, str], str], tree: Path, tmp_path: Path
) -> None:
    environment, expected = broken_nvcc
    wheel, said = build_wheel(
        tree, tmp_path / "wheels", CONTINUAL_MHA_BUILD_CUDA="auto", **environment
    )
    assert said.count("\n") == 0
    assert expected in said
    with zipfile.ZipFile(wheel) as archive:
        native = [name for name in archive.namelist() if name.endswith(".so")]
    assert native == ["continual_mha/lib/continual_mha_cpu.so"]


def test_nvcc_that_fails_is_an_error_where_cuda_is_asked_for(
    broken_nvcc: tuple[dict[str, str], str], tree: Path, tmp_path: Path
) -> None:
    environment, expected = broken_nvcc
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_wheel(tree, tmp_path / "wheels", CONTINUAL_MHA_BUILD_CUDA="1", **environment)
    expected = expected.removeprefix("cuda: ").replace(", and is left out", "")
    assert expected in caught.value.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"CONTINUAL_MHA_BUILD_CUDA": "1", "CUDA_HOME": "", "CXX": sys.executable},
            "cannot build the cuda library: no nvcc found",
        ),
        (
            {"CONTINUAL_MHA_BUILD_CPU": "1", "CXX": "no-such-compiler"},
            "cannot build the cpu library: no C++ compiler found",
        ),
        (
            {"CONTINUAL_MHA_BUILD_CPU": "no"},
            "CONTINUAL_MHA_BUILD_CPU is 'no'; choose 0, 1 or auto",
        ),
    ],
)
def test_asking_for_what_cannot_be_built_is_an_error(
    environment: dict[str, str], reason: str, tree: Path, tmp_path: Path
) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        build_wheel(tree, tmp_path / "wheels", PATH=str(tmp_path), **environment)
    assert reason in caught.value.stderr


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++")
def test_clang_builds_the_library_without_a_warning(tree: Path, tmp_path: Path) -> None:
    wheel, _ = build_wheel(
        tree, tmp_path / "wheels", CXX="clang++", CXXFLAGS="-O0", CONTINUAL_MHA_WERROR="1"
    )
    with zipfile.ZipFile(wheel) as archive:
        assert "continual_mha/lib/continual_mha_cpu.so" in archive.namelist()
