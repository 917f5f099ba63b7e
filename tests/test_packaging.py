"""What is built and installed, and what the README and docstrings tell people to type."""

import ast
import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import continual_mha

ROOT = Path(__file__).parent.parent
PARTS = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"]
PARTS += ["CITATION.cff", "continual_mha", "triton_kernels", "csrc"]
BUILD = "from setuptools import build_meta; import sys; build_meta.build_{}(sys.argv[1])"


def copy_of_the_tree(target: Path) -> Path:
    """The sources without anything that was built from them."""
    target.mkdir()
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, target / part, symlinks=True, ignore=built)
        else:
            shutil.copy(ROOT / part, target / part)
    return target


def build(kind: str, source: Path, target: Path, tools: Path) -> Path:
    """A wheel or an sdist of ``source``, on a machine whose only programs are in ``tools``."""
    ours = "CONTINUAL_MHA_"
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment |= {"PATH": str(tools), "CC": "no-compiler", "CXX": "no-compiler"}
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind), target],
        cwd=source,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [built] = target.iterdir()
    return built


def names_in(wheel: Path) -> set[str]:
    """The files of ``wheel``."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("tree") / "source")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """A wheel built where there is no compiler."""
    pytest.importorskip("setuptools", minversion="77")
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("none"))


def test_wheel_holds_the_package_and_nothing_at_the_top_level_beside_it(wheel):
    information = f"continual_mha-{continual_mha.__version__}.dist-info"
    assert {name.split("/")[0] for name in names_in(wheel)} == {"continual_mha", information}


def test_wheel_holds_every_module_and_the_type_marker(wheel):
    sources = [
        path for part in ("continual_mha", "triton_kernels") for path in (ROOT / part).glob("*.py")
    ]
    expected = {
        path.relative_to(ROOT)
        .as_posix()
        .replace("triton_kernels/", "continual_mha/triton_kernels/")
        for path in sources
    }
    assert "continual_mha/triton_kernels/__init__.py" in expected
    assert expected | {"continual_mha/py.typed"} <= names_in(wheel)


def test_wheel_from_an_sdist_holds_the_same_files(tree, wheel, tmp_path):
    tools, sdists, wheels = tmp_path / "none", tmp_path / "sdists", tmp_path / "wheels"
    for folder in (tools, sdists, wheels):
        folder.mkdir()
    with tarfile.open(build("sdist", tree, sdists, tools)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [source] = (tmp_path / "unpacked").iterdir()
    assert names_in(build("wheel", source, wheels, tools)) == names_in(wheel)


def test_wheel_declares_what_it_needs_and_the_lock_pins_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        metadata = message_from_bytes(archive.read(name))
    assert metadata["Name"] == "continual-mha"
    assert metadata["Version"] == continual_mha.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra" not in need]
    assert sorted(re.match(r"[\w-]+", need)[0] for need in needed) == ["torch", "triton"]
    assert {"demo", "test", "bench", "lint"} <= set(metadata.get_all("Provides-Extra"))
    # the peers that are too large for the development environment are not in its lock
    locked = [need for need in metadata.get_all("Requires-Dist") if "peers" not in need]
    assert len(locked) == len(metadata.get_all("Requires-Dist")) - 1
    named = {re.match(r"[\w-]+", need)[0] for need in locked}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements-dev.lock").read_text(), re.M)
    assert named <= set(pinned)


@pytest.mark.parametrize("place", ["wheel", "tree"])
def test_package_runs_from_the_unpacked_wheel_and_from_the_bare_tree(place, wheel, tree, tmp_path):
    if place == "wheel":
        zipfile.ZipFile(wheel).extractall(tmp_path)
    path = tmp_path if place == "wheel" else tree
    lines = [
        "import importlib.util, pathlib, torch, continual_mha",
        f"assert pathlib.Path(continual_mha.__file__).is_relative_to({str(path)!r})",
        "assert importlib.util.find_spec('continual_mha.triton_kernels')",
        "mha = continual_mha.SingleOutputMultiheadAttention(8, 2, sequence_len=2)",
        "assert mha.forward_step(torch.ones(1, 8)) is None",
        "assert mha.forward_step(torch.ones(1, 8)).shape == (1, 8)",
    ]
    environment = {**os.environ, "PYTHONPATH": str(path)}
    subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT.anchor, env=environment, check=True
    )


def test_modules_import_from_their_own_group_of_the_map_or_from_those_below():
    rows = (ROOT / "docs" / "code.md").read_text().partition("|---|---|\n")[2].partition("\n\n")[0]
    known = {path.stem: path for path in (ROOT / "continual_mha").glob("*.py")}
    del known["__init__"]
    group = {
        name: number
        for number, row in enumerate(rows.splitlines())
        for name in re.findall(r"`(\w+)`", row.split("|")[2])
        if name in known
    }
    assert group.keys() == known.keys()
    for name, path in known.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(group[x] >= group[name] for x in found), f"{name} imports {found}"


def test_changelog_and_citation_name_the_version():
    assert f"\n## {continual_mha.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {continual_mha.__version__}\n" in citation
    assert "2201.06268" in citation


def test_the_readmes_example_runs_as_it_stands():
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    exec(example[1], {})


@pytest.mark.parametrize("module", ["attention", "pool"])
def test_examples_in_docstrings_give_what_they_say(module):
    found = doctest.testmod(importlib.import_module(f"continual_mha.{module}"))
    assert found.attempted
    assert not found.failed


def commands_in_readme() -> list[list[str]]:
    """The words of every command in the README's shell blocks."""
    blocks = re.findall(
        r"^```(?:sh|bash|shell|console)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [command for command in commands if command]


def test_every_make_target_in_the_readme_exists():
    if shutil.which("make") is None:
        pytest.skip("needs make")
    targets = {
        word for command in commands_in_readme() if command[0] == "make" for word in command[1:]
    }
    assert {"demo", "test"} <= targets
    for target in sorted(targets):
        subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )


def test_every_script_and_extra_in_the_readme_exists():
    declared = (ROOT / "pyproject.toml").read_text()
    for command in commands_in_readme():
        for word in command:
            assert not word.endswith(".py") or (ROOT / word).is_file()
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(command)):
            assert all(re.search(rf"^{name} = \[", declared, re.M) for name in extra.split(","))
