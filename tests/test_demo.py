"""The demo, run as a user runs it but briefly."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "activity_stream.py"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What a short run printed, and the picture it saved."""
    for package in ("aeon", "continual", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    picture = tmp_path_factory.mktemp("demo") / "pictures" / "stream.png"
    run = subprocess.run(
        [sys.executable, EXAMPLE, "--steps", "60", "--rounds", "2", "--out", picture],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
    )
    return run.stdout, picture


def number_before(text: str, printed: str) -> float:
    """The number that opens the only line of ``printed`` in which ``text`` stands."""
    [line] = [line for line in printed.splitlines() if text in line and re.match(r"\s*\d", line)]
    return float(re.match(r"\s*([-+.e\d]+)", line)[1])


def test_streamed_attention_equals_the_sliding_window(demo):
    printed, _ = demo
    assert number_before("where outputs reach", printed) < 1e-4


def test_model_recognises_activities_in_clips_and_in_the_stream(demo):
    printed, _ = demo
    assert number_before("last window of each of the 40", printed) >= 80
    assert number_before("hold one activity only", printed) >= 80
    assert number_before("all 3961 windows", printed) >= 65


def test_all_three_implementations_are_timed(demo):
    printed, _ = demo
    for name in ("continual_mha", "continual-inference", "torch.nn.MultiheadAttention"):
        assert number_before(name, printed) > 0


def test_picture_is_saved_where_asked(demo):
    _, picture = demo
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_recordings_are_told_with_what_to_install(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "aeon").mkdir()
    (tmp_path / "aeon" / "__init__.py").touch()
    command = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['demo']; "
    command += f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert run.returncode == 1
    assert "cannot load the BasicMotions recordings" in run.stderr
    assert "pip install 'continual-mha[demo]'" in run.stderr
    assert "Traceback" not in run.stderr
