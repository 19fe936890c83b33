"""A shipped sweep: what W&B's agent would start is a command line that the recipe takes."""

import itertools
import json
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from sparse_prune.recipes.causal_lm.cli import main
from support.wandb_server import wandb_server

SWEEP = yaml.safe_load((files("sparse_prune.recipes.causal_lm") / "sweeps" / "sparsity.yaml").read_text())


def test_every_run_of_the_sweep_is_taken_by_the_recipe_and_prunes_as_it_says(capsys):
    command, names = SWEEP["command"], list(SWEEP["parameters"])
    assert command[:4] == ["sparse-prune", "recipes", "run", "causal_lm"]
    assert command[-1] == "${args}"
    grid = list(itertools.product(*(SWEEP["parameters"][name]["values"] for name in names)))
    assert len(grid) >= 6
    for values in grid:
        given = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
        with pytest.raises(SystemExit) as done:
            main(["fit", *command[4:-1], *given, "--print_config"])
        assert done.value.code in (0, None)
        pruning = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][-1]["init_args"]
        schedule, score = (yaml.safe_load(value) for value in values)
        assert pruning["sparsity"]["class_path"] == schedule["class_path"]
        assert pruning["sparsity"]["init_args"]["final"] == schedule["init_args"]["final"]
        assert (pruning["score"] or {}).get("class_path") == (score or {}).get("class_path")


@pytest.mark.slow
def test_an_agent_runs_a_point_of_the_sweep(tiny_model, tmp_path):
    """W&B's own agent, told by a server on this machine to run the last point, cut short, of a tiny model."""
    small = {
        "model.model": tiny_model,
        "model.passkey_prompts": 1,
        "data.context_length": 256,
        "data.train_sequences": 4,
        "data.val_sequences": 1,
        "data.test_sequences": 1,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 4,
        "trainer.default_root_dir": tmp_path / "run",
        "trainer.callbacks.init_args.block_size": 32,
        "compare_dense": "false",
        "export": "false",
    }
    point = {name: part["values"][-1] for name, part in SWEEP["parameters"].items()}
    cut = [f"--{name}={value}" for name, value in small.items()]
    with wandb_server() as server:
        server.sweep = SWEEP | {"command": [*SWEEP["command"][:-1], *cut, SWEEP["command"][-1]]}
        given = {name: {"value": value} for name, value in point.items()}
        server.commands = [{"type": "run", "run_id": "point", "program": "", "args": given}]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
        environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "wandb", "agent", "--count", "1", "me/sparse_prune/SWEEP"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert list(server.runs) == ["point"], done.stdout + done.stderr
        run, steps = server.run("point"), server.history("point")
    assert run["sweep"] == "SWEEP"
    config = {key: value["value"] for key, value in json.loads(run["config"]).items() if key != "_wandb"}
    assert {name: config[name] for name in point} == point
    pruning = [config[f"pruning/{name}"] for name in ("sparsity", "sparsity/final", "score")]
    assert pruning == ["LinearSchedule", 0.7, "Influence()"]
    assert max(row["sparsity/total"] for row in steps if "sparsity/total" in row) > 0.1
    assert run["summary"]["final/sparsity"] > 0.1


def test_the_sweep_is_what_wandb_takes():
    schema = pytest.importorskip("sweeps.config.schema", reason="W&B's own schema is in the package sweeps")
    assert [error.message for error in schema.validator.iter_errors(SWEEP)] == []
    assert list(schema.validator.iter_errors(SWEEP | {"method": "guess"}))
