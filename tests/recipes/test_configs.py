"""Every recipe's configurations as they are shipped, and terminals without an account."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from sparse_prune.callbacks import AttentionPruning, FallbackWandbLogger
from sparse_prune.commands.recipes import recipes
from sparse_prune.recipes.base.history import RunHistory
from sparse_prune.recipes.base.parser import RecipeParser
from sparse_prune.recipes.base.trainer import RecipeTrainer

SHIPPED = [(recipe.name, config) for recipe in recipes().values() for config in recipe.configs]


@pytest.mark.parametrize(("recipe", "config"), SHIPPED)
def test_a_shipped_configuration_parses_and_makes_a_trainer_below_its_folder(recipe, config, tmp_path, capsys):
    main = import_module(f"sparse_prune.recipes.{recipe}.cli").main
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", config, "--trainer.default_root_dir", str(tmp_path / "moved"), "--print_config"])
    assert done.value.code in (0, None)
    settings = yaml.safe_load(capsys.readouterr().out)["trainer"]
    parser = RecipeParser()
    parser.add_lightning_class_args(RecipeTrainer, "trainer")
    trainer = parser.instantiate_classes(parser.parse_object({"trainer": settings | {"accelerator": "cpu"}})).trainer
    kinds = [type(callback) for callback in trainer["callbacks"]]
    assert kinds[:2] == [RunHistory, AttentionPruning]
    for logger in trainer["logger"]:
        assert logger.save_dir == str(tmp_path / "moved")
        if isinstance(logger, FallbackWandbLogger):
            assert logger._wandb_init["settings"].init_timeout == 30.0
            assert logger._wandb_init["resume"] == "allow"
            assert "mode" not in logger._wandb_init
    made = RecipeTrainer(**trainer)
    assert made.default_root_dir == str(tmp_path / "moved")


@pytest.mark.slow
def test_a_terminal_without_an_account_is_asked_nothing(tmp_path):
    """And all that the run writes is where `default_root_dir` says."""
    command = [sys.executable, "-m", "sparse_prune", "recipes", "run", "vision", "--config", "quickstart"]
    changes = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "compare_dense": "false"}
    changes |= {"data.train_examples": 64, "data.val_examples": 4, "data.test_examples": 4}
    changes |= {"trainer.default_root_dir": tmp_path / "moved"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    (tmp_path / "here").mkdir()
    ours, theirs = pty.openpty()
    options = [f"--{name}={value}" for name, value in changes.items()]
    place = {"cwd": tmp_path / "here", "env": environment}
    process = subprocess.Popen([*command, *options], stdin=theirs, stdout=theirs, stderr=theirs, **place)
    os.close(theirs)
    text = _read(ours, process, seconds=120)
    assert process.poll() == 0, text[-3000:]
    assert "Enter your choice" not in text
    assert "No W&B account is configured" in text
    moved = tmp_path / "moved"
    assert re.search(rf"Report: {re.escape(str(moved))}/csv/version_0/report\.md", text)
    assert {path.name for path in moved.iterdir()} == {"csv", "wandb"}
    assert not list(Path(tmp_path / "here").iterdir())


def _read(terminal, process, seconds):
    """What a process writes to its terminal; it is ended where it waits for an answer."""
    text, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and b"Enter your choice" not in text:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                text += os.read(terminal, 4096)
            except OSError:  # the other side is closed
                process.wait(30)
                break
    if process.poll() is None:
        process.kill()
        process.wait()
    os.close(terminal)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]+", " ", text.decode(errors="replace"))


@pytest.mark.parametrize("given", [{}, {"mode": "offline", "resume": "never", "init_timeout": 5.0, "tags": ["a"]}])
def test_a_logger_of_a_yaml_file_is_the_same_as_one_of_python(given, tmp_path):
    known = {"project": "p", "save_dir": str(tmp_path), "id": "abc"} | given
    parser = ArgumentParser()
    parser.add_argument("--logger", type=FallbackWandbLogger)
    entry = {"class_path": "sparse_prune.callbacks.FallbackWandbLogger", "init_args": known}
    made = parser.instantiate_classes(parser.parse_object({"logger": entry})).logger._wandb_init
    own = FallbackWandbLogger(**known)._wandb_init
    for each in (made, own):
        each["settings"] = each["settings"].init_timeout
    assert made == own
    assert made["settings"] == given.get("init_timeout", 30.0)
    assert made["resume"] == given.get("resume", "allow")
