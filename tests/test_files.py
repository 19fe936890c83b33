import os
import re
import signal
from pathlib import Path

import pytest

from sparse_prune import files, fixed_patterns
from sparse_prune.commands.report.cli import main
from sparse_prune.export import save_patterns
from sparse_prune.export.history import save_frame
from sparse_prune.kernels.triton import tuning

ROOT = Path(__file__).parents[1]
FOLDERS = ("sparse_prune", "callbacks", "recipes", "benchmarks")
PATTERNS = {"layer": fixed_patterns.random_pattern(1, 8, 2, density=0.5)}


def killed(write):
    """A process that writes ends in the middle of it."""
    child = os.fork()
    if not child:
        files.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        write()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def write_report(folder):
    (folder / "metrics.csv").write_text("step,train/loss\n1,2.0\n")
    main([str(folder)])


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda folder: save_patterns(PATTERNS, folder / "a.safetensors"), "a.safetensors"),
        (lambda folder: save_frame(PATTERNS, folder, 3), "pattern_history/step_00000003.npz"),
        (lambda folder: tuning._write(folder / "triton_tuning.json", {}), "triton_tuning.json"),
        (write_report, "report.html"),
    ],
)
def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path, write, name):
    home = (tmp_path / name).parent
    killed(lambda: write(tmp_path))
    assert any(path.suffix == ".partial" for path in home.iterdir())
    write(tmp_path)
    assert (tmp_path / name).is_file()
    assert not [path for path in home.iterdir() if path.suffix == ".partial"]


def test_a_failed_write_leaves_the_previous_file_and_nothing_else(tmp_path):
    target = tmp_path / "new" / "file"
    for text in ("first", "second"):
        with files.whole_file(target) as path:
            path.write_text(text)
    failing = files.whole_file(target)
    failing.__enter__().write_text("half")
    assert not failing.__exit__(OSError, OSError("full"), None)
    assert target.read_text() == "second"
    assert os.listdir(target.parent) == ["file"]


def test_what_cannot_be_removed_stops_no_write(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    (tmp_path / f".file.{files.platform.node()}.{os.getpid()}.partial").touch()
    monkeypatch.setattr(Path, "unlink", refuse)
    with files.whole_file(tmp_path / "file") as path:
        path.write_text("whole")
    assert os.listdir(tmp_path) == ["file"]


def test_no_other_code_lets_a_file_take_the_place_of_another():
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    found = {str(file.relative_to(ROOT)) for file in files if re.search(r"os\.replace|mkstemp", file.read_text())}
    assert found == {"sparse_prune/files.py"}
