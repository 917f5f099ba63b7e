"""What all tests share: the backend that runs, its device, and where randomness starts."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch

import continual_mha
from continual_mha import _native

with suppress(ImportError):  # where it is missing, only the files that use it are lost
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "default",
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("default")

ON_GPU = torch.cuda.is_available()
PTX = int(os.environ.get("CONTINUAL_MHA_PTX", "0"))  # the compute capability, such as 90
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOADED = continual_mha.backends.available()
# What can run these tests here at full length; Triton's interpreter takes only those marked small.
NATIVE = [name for name in LOADED if name in ("cpu", "torch") or ON_GPU]
SMALL = [name for name in LOADED if name in NATIVE or (name == "triton" and (INTERPRETED or PTX))]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backends", help="which of them, with commas; by default all that run here")
    parser.addoption(
        "--all-cases", action="store_true", help="also those that by default others stand for"
    )
    parser.addoption("--one-in", type=int, default=1, help="of so many cases of every test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "small: light enough for Triton's interpreter")
    config.addinivalue_line(
        "markers", "in_turn(*chips): each case of the test for one of these compute capabilities"
    )
    config.addinivalue_line("markers", "sampled(n): one in n cases of the test")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        small = metafunc.definition.get_closest_marker("small") is not None
        asked = metafunc.config.getoption("--backends")
        names = [
            name
            for name in (SMALL if small else NATIVE)
            if asked is None or name in asked.split(",")
        ]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unless all cases were asked for, or some by name, leave out those that others stand for.

    Of a case for several chips there runs that whose turn it is, and of tests with many cases a
    sample, the same in every run; of what a GPU runs itself there runs every one.
    """
    if config.getoption("--all-cases") or any("[" in arg for arg in config.args):
        return
    chips: dict[str, dict[int, pytest.Item]] = {}  # of each case
    for item in items:
        if item.get_closest_marker("in_turn"):
            case = dict(item.callspec.params)
            capability = case.pop("capability")
            chips.setdefault(f"{item.originalname} {case}", {})[capability] = item
    left_out = set()
    for case, of_case in chips.items():
        turns = next(iter(of_case.values())).get_closest_marker("in_turn").args
        turn = turns[_drawn(case) % len(turns)]
        if turn in of_case:
            left_out.update(item for chip, item in of_case.items() if chip != turn)
    cases: dict[str, list[pytest.Item]] = {}  # of each test
    for item in items:
        if item not in left_out:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for of_test in cases.values():
        sampled = None if ON_GPU else of_test[0].get_closest_marker("sampled")
        one_of = max(config.getoption("--one-in"), *(sampled.args if sampled else ()), 1)
        left_out.update(set(of_test) - set(_sample(of_test, one_of)))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _sample(items: list[pytest.Item], one_of: int) -> list[pytest.Item]:
    """One of so many cases of a test, and as many more as it takes to have every word in them."""
    items = sorted(items, key=lambda item: _drawn(item.nodeid))
    words = {item: _words(item) for item in items}
    missing = set().union(*words.values())
    chosen: list[pytest.Item] = []
    while missing:
        chosen.append(max(items, key=lambda item: len(words[item] & missing)))
        missing -= words[chosen[-1]]
    others = [item for item in items if item not in chosen]
    return chosen + others[: max(0, -(-len(items) // one_of) - len(chosen))]


def _words(item: pytest.Item) -> set[str]:
    """What a case is named by, but for plain numbers."""
    case = item.nodeid.partition("[")[2].rstrip("]")
    return {word for word in case.split("-") if any(map(str.isalpha, word))}


def _drawn(name: str) -> int:
    """A number that names differ in which differ little."""
    return zlib.crc32(name.encode())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A kernel that went astray leaves no device to the tests after it, nor to this process."""
    if not ON_GPU:
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:  # which is started anew
            os._exit(1)
        pytest.exit(f"the CUDA device is lost: {error}", returncode=1)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every operator that this backend covers runs on it, and any other on plain PyTorch.

    `test_backends_run_the_plain_calls` keeps a backend from declining everything."""
    name: str = request.param
    monkeypatch.setattr(continual_mha.backends, "order", lambda device_type: (name, "torch"))
    on_gpu = ON_GPU and name in ("triton", "cuda")
    with torch.device("cuda") if on_gpu else nullcontext():
        yield name


@pytest.fixture
def products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of numpy's matrix products, which Triton's interpreter takes, has its bits anywhere.

    On some processors its library computes the last rows of a matrix in another way.
    """
    numpy = pytest.importorskip("numpy")

    def matmul(a: Any, b: Any, dtype: Any) -> Any:
        products = a.astype(dtype)[..., :, :, None] * b.astype(dtype)[..., None, :, :]
        return products.sum(axis=-2)

    monkeypatch.setattr(numpy, "matmul", matmul)


@pytest.fixture(autouse=True, scope="session")
def _replaced_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces the functions of its language at the start of a launch alone.

    It does so at each call of a function within a kernel once more, which takes a third of its time
    and changes nothing.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    tl, replace = interpreter.tl, interpreter._patch_lang
    replaced: set[Any] = set()  # modules, until the launch ends

    def once(fn: Any) -> Any:
        modules = {x for x in fn.__globals__.values() if x is tl or x is tl.core}
        if modules <= replaced:
            return None
        scope = replace(fn)
        restore = scope.restore

        def end() -> None:
            replaced.clear()
            restore()

        scope.restore = end
        replaced.update(modules)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield


@pytest.fixture(autouse=True)
def _as_ptx() -> Iterator[None]:
    """Every launch of a Triton kernel runs as PTX, if that was asked for."""
    if not PTX:
        yield
        return
    from ptx_launches import as_ptx

    with as_ptx(PTX):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["amx", "avx512_bf16", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with the CPU library's kernels of each instruction set in turn."""
    before = _native.cpu_isa()
    if not _native.use_cpu_isa(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert _native.use_cpu_isa(before)


@pytest.fixture
def fp32_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch is told to multiply fp32 on CUDA tensors in this way."""
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield
    torch.backends.cuda.matmul.fp32_precision = "none"
