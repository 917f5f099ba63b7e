"""The native libraries, and nothing else: everything about the package stands in pyproject.toml.

They use LibTorch's stable ABI and no Python at all, so one build serves every torch from 2.10 on
and every Python. What cannot be built here is left out, and one line says why. The table of
environment variables is in README.md; CXX, CXXFLAGS and LDFLAGS count as everywhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
KINDS = ("cpu", "cuda")
STRICT = os.environ.get("CONTINUAL_MHA_WERROR", "0") == "1"
BUILD = {x: os.environ.get(f"CONTINUAL_MHA_BUILD_{x.upper()}") or "auto" for x in KINDS}
TORCH_ABI = "0x020a000000000000"  # 2.10
CUDA_ARCHS = ("80", "90", "100")
# Only these files hold instructions that not every machine of the platform has.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
X86_FLAGS = {
    "kernels_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "kernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "kernels_avx512": AVX512,
    "kernels_avx2": AVX2,
}


def find_torch() -> Path | None:
    """The installed package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def torch_versions(torch: Path) -> tuple[tuple[int, int], str | None]:
    """The release of torch, and the CUDA release it was built with, if any."""
    text = (torch / "version.py").read_text()
    release = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    cuda = re.search(r"^cuda(?:: [^=]*)? = '([\d.]+)'", text, re.M)
    return (int(release[1]), int(release[2])) if release else (0, 0), cuda and cuda[1]


def find_compiler() -> str | None:
    """The C++ compiler's path."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "clang++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def takes(flags: list[str]) -> bool:
    """Whether the C++ compiler knows these flags."""
    command = [find_compiler(), *flags, "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="", capture_output=True, text=True).returncode == 0


def find_nvcc() -> str | None:
    """nvcc's path: from CUDA_HOME, or wherever the shell finds it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def why_not_cpu() -> str | None:
    """What is missing to build csrc/cpu; None if nothing is."""
    return "CONTINUAL_MHA_BUILD_CPU is 0" if BUILD["cpu"] == "0" else why_neither()


def why_neither() -> str | None:
    """What is missing to build either; None if nothing is."""
    torch = find_torch()
    if sys.platform == "win32":
        return "it has not been written for Windows"
    if torch is None:
        return "no torch here; install it and add --no-build-isolation"
    if torch_versions(torch)[0] < (2, 10):
        return "torch is older than 2.10"
    if find_compiler() is None:
        return "no C++ compiler found"
    return None


def why_not_cuda() -> str | None:
    """What is missing to build csrc/cuda; None if nothing is."""
    reason = why_neither()
    if BUILD["cuda"] == "0":
        return "CONTINUAL_MHA_BUILD_CUDA is 0"
    if reason is not None:
        return reason
    nvcc = find_nvcc()
    if nvcc is None:
        return "no nvcc found"
    built_with = torch_versions(find_torch())[1]
    if BUILD["cuda"] == "auto" and built_with is None:
        return "torch has no CUDA; CONTINUAL_MHA_BUILD_CUDA=1 builds it all the same"
    try:
        release = run([nvcc, "--version"]).split("release ")[-1].split(",")[0]
        archs = cuda_archs(nvcc)
    except CompileError as error:
        return f"nvcc does not run: {cause_of(error)}"
    if not archs:
        return f"nvcc is {release}, and compiles for none of {', '.join(CUDA_ARCHS)}"
    if built_with is not None and release.split(".")[0] != built_with.split(".")[0]:
        return f"nvcc is {release}, but torch was built with CUDA {built_with}"
    return None


def run(command: list[str]) -> str:
    """Standard output of ``command``; an error with all that it said if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CompileError(f"{shlex.join(command)}\n{error}") from error
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stdout}")
    return done.stdout


def cause_of(error: CompileError) -> str:
    """Why a command of ``run`` failed: the first line of its output that names an error."""
    lines = str(error).splitlines()[1:]
    return next((line for line in lines if "error" in line.lower()), (lines or ["no word"])[-1])


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to build for; machine code for each, and PTX of the last, the newest."""
    wanted = os.environ.get("CONTINUAL_MHA_CUDA_ARCHS")
    if wanted:
        named = dict.fromkeys(part.strip() for part in wanted.replace(".", "").split(";"))
        return sorted(filter(None, named), key=lambda arch: int("0" + re.sub(r"\D", "", arch)))
    known = run([nvcc, "--list-gpu-arch"]).split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]


class Compiler:
    """Compiles and links one library."""

    def __init__(self) -> None:
        self.torch = find_torch()
        self.define = f"-DTORCH_TARGET_VERSION={TORCH_ABI}"
        self.cxxflags = shlex.split(os.environ.get("CXXFLAGS", ""))
        self.ldflags = shlex.split(os.environ.get("LDFLAGS", ""))

    def compile(self, source: str) -> list[str]:
        """The command that compiles ``source``, without its output and without its name."""
        raise NotImplementedError

    def link(self, objects: list[str], library: str) -> list[str]:
        """The command that links ``library``."""
        raise NotImplementedError


class CpuCompiler(Compiler):
    """g++ or clang++."""

    def flags(self, source: str) -> list[str]:
        """What a file may be compiled for; the one for AMX does without where compilers do."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return []
        flags = X86_FLAGS.get(Path(source).stem, [])
        return flags if Path(source).stem != "kernels_amx" or takes(flags) else []

    def compile(self, source: str) -> list[str]:
        command = [find_compiler(), "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread"]
        command += ["-Wall", "-Wextra", *(["-Werror"] if STRICT else []), self.define]
        command += ["-isystem", str(self.torch / "include")]
        return [*command, *self.flags(source), *self.cxxflags, "-c"]

    def link(self, objects: list[str], library: str) -> list[str]:
        sanitized = any(flag.startswith("-fsanitize") for flag in self.cxxflags)
        # A symbol that torch lacks is found here, not by the user; a sanitizer's come with python.
        checks = [] if sanitized or sys.platform == "darwin" else ["-Wl,-z,defs"]
        command = [find_compiler(), "-shared", "-pthread", "-o", library, *objects, *checks]
        return [*command, f"-L{self.torch / 'lib'}", "-ltorch_cpu", *self.cxxflags, *self.ldflags]


class CudaCompiler(Compiler):
    """nvcc. CPU-only torch serves as well: only the declarations are needed."""

    def compile(self, source: str) -> list[str]:
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc)
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        command = [nvcc, "-std=c++17", "-O3", "-DUSE_CUDA", self.define, *targets]
        command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings"] if STRICT else []
        return [*command, "-isystem", str(self.torch / "include"), "-c"]

    def link(self, objects: list[str], library: str) -> list[str]:
        # libtorch brings in libtorch_cuda where there is one, for symbols looked up at run time.
        command = [find_nvcc(), "-shared", "-cudart", "static", "-o", library, *objects]
        libraries = ["-ltorch_cpu", "-Xlinker", "--no-as-needed", "-ltorch"]
        return [*command, f"-L{self.torch / 'lib'}", *libraries]


COMPILERS = {"cpu": CpuCompiler, "cuda": CudaCompiler}


class BuildNative(build_ext):
    """Plain shared libraries; ``python setup.py build_ext --inplace`` leaves them in the tree."""

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python in the name."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what has changed since the last build, and link."""
        kind = ext.name.rsplit("_", 1)[1]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # an old one must not stand in for one that fails
        try:
            compiler = COMPILERS[kind]()
            jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
            # those that take longest first, so that no job waits for one of them at the end
            sources = sorted(ext.sources, key=lambda s: not re.search(r"kernels|\.cu$", s))
            with ThreadPoolExecutor(jobs) as pool:
                objects = list(pool.map(lambda s: self._object(compiler, s), sources))
            run(compiler.link(objects, str(library)))
        except CompileError as error:
            left_out = ", and is left out" if ext.optional else ""
            say(f"the {kind} library failed to compile{left_out}: {cause_of(error)}")
            raise

    def _object(self, compiler: Compiler, source: str) -> str:
        command = compiler.compile(source)
        digest = hashlib.sha256(shlex.join(command).encode()).hexdigest()[:8]
        # Not in build_temp, which an editable installation throws away.
        target = ROOT / "build" / "objects" / digest / f"{Path(source).name}.o"
        folder = (ROOT / source).parent
        inputs = [
            ROOT / source,
            *folder.parent.glob("*.h"),
            *folder.glob("*.h"),
            *folder.glob("*.cuh"),
        ]
        newest = max(path.stat().st_mtime for path in inputs)
        if not target.exists() or target.stat().st_mtime < newest:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.announce(run([*command, source, "-o", str(target)]), level=1)
        return str(target)

    def copy_extensions_to_source(self) -> None:
        """As setuptools does, into a folder that may not exist yet."""
        (ROOT / "continual_mha" / "lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        """What was built; an optional library may have failed."""
        return [path for path in super().get_outputs() if os.path.exists(path)]


def say(line: str) -> None:
    """One line for whoever installs."""
    print(f"continual_mha: {line}", file=sys.stderr)


def extensions() -> list[Extension]:
    """The libraries that can be built here."""
    for kind, asked in BUILD.items():
        if asked not in ("0", "1", "auto"):
            name = f"CONTINUAL_MHA_BUILD_{kind.upper()}"
            raise SystemExit(f"continual_mha: {name} is {asked!r}; choose 0, 1 or auto")
    found = []
    reasons = {"cpu": why_not_cpu(), "cuda": why_not_cuda()}
    for kind, reason in reasons.items():
        sources = sorted(
            path.relative_to(ROOT).as_posix()
            for suffix in ("cpp", "cu")
            for path in (ROOT / "csrc" / kind).glob(f"*.{suffix}")
        )
        needed = STRICT or BUILD[kind] == "1"
        if reason is None and sources:
            name = f"continual_mha.lib.continual_mha_{kind}"
            found.append(Extension(name, sources, optional=not needed))
        elif BUILD[kind] == "1":
            raise SystemExit(f"continual_mha: cannot build the {kind} library: {reason}")
    missing = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items() if reason)
    if missing and {"bdist_wheel", "editable_wheel", "build", "build_ext"} & set(sys.argv):
        say(f"installs without some native libraries, and works without them ({missing})")
    return found


libraries = extensions()
setup(
    packages=["continual_mha", "continual_mha.triton_kernels"],
    package_dir={"continual_mha.triton_kernels": "triton_kernels"},
    ext_modules=libraries,
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if libraries else {},
)
