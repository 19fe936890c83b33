"""A shipped sweep: what W&B's agent would start is a command line that the recipe takes."""

import itertools
from importlib.resources import files

import pytest
import yaml

from sparse_prune.recipes.causal_lm.cli import main

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


def test_the_sweep_is_what_wandb_takes():
    schema = pytest.importorskip("sweeps.config.schema", reason="W&B's own schema is in the package sweeps")
    assert [error.message for error in schema.validator.iter_errors(SWEEP)] == []
    assert list(schema.validator.iter_errors(SWEEP | {"method": "guess"}))
