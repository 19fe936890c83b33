"""`sparse-prune recipes`: list, copy, run."""

import subprocess
import sys
from importlib import import_module

import pytest

from sparse_prune.__main__ import main
from sparse_prune.commands import recipes as cli
from sparse_prune.commands.recipes import copy, recipes
from sparse_prune.recipes.vision.cli import main as vision


def test_every_recipe_is_listed_with_its_configurations(capsys):
    main(["recipes"])
    printed = capsys.readouterr().out
    assert list(recipes()) == ["causal_lm", "long_range", "text_classification", "vision"]
    for recipe in recipes().values():
        assert f"{recipe.name}\n  {recipe.description}" in printed
        assert recipe.description.endswith(".")
        assert "quickstart" in recipe.configs
        for name in recipe.configs:
            assert name in printed


def test_a_copy_is_what_runs(tmp_path, capsys):
    main(["recipes", "copy", "long_range", str(tmp_path / "mine")])
    assert "python -m mine fit --config quickstart" in capsys.readouterr().out
    module = tmp_path / "mine" / "module.py"
    assert "sparse_prune.recipes.long_range" not in module.read_text()
    module.write_text(module.read_text().replace("classes = 10", "classes = 10; print('edited')"))
    (tmp_path / "mine" / "quickstart.yaml").write_text(
        (tmp_path / "mine" / "quickstart.yaml").read_text().replace("max_steps: 300", "max_steps: 1")
    )
    command = [sys.executable, "-m", "mine", "fit", "--config", "quickstart", "--compare_dense", "false"]
    sizes = [
        "--data.train_examples",
        "16",
        "--data.val_examples",
        "4",
        "--data.test_examples",
        "4",
        "--trainer.logger",
        "false",
    ]
    done = subprocess.run([*command, *sizes], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "edited" in done.stdout
    assert "Report: " in done.stdout


def test_a_copy_lists_its_configurations(tmp_path, monkeypatch, capsys):
    copy(recipes()["vision"], tmp_path / "my_vision")
    (tmp_path / "my_vision" / "vit_gpu.yaml").rename(tmp_path / "my_vision" / "mine.yaml")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as done:
        import_module("my_vision.cli").main(["fit", "--config", "typo"])
    assert done.value.code == 2
    printed = capsys.readouterr().err
    assert "python -m my_vision fit: error: `--config` must be a file or one of mine, quickstart, got 'typo'" in printed


def test_a_copy_overwrites_nothing(tmp_path, capsys):
    recipe = recipes()["vision"]
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="must not exist yet"):
        copy(recipe, tmp_path / "there")
    with pytest.raises(ValueError, match="not of the standard library, got 'json'"):
        copy(recipe, tmp_path / "json")
    with pytest.raises(ValueError, match="an importable name that is not of the standard library, got 'my-recipe'"):
        copy(recipe, tmp_path / "my-recipe")
    with pytest.raises(SystemExit):
        main(["recipes", "copy", "vision", str(tmp_path / "there")])
    assert "must not exist yet" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--config", "quickstart"], ["--config=quickstart"], ["-c", "quickstart"]])
def test_shipped_configurations_are_found_by_name(flags, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr(sys, "argv", ["vision", "fit", *flags])
    over = tmp_path / "over.yaml"
    over.write_text("trainer: {max_steps: 7}\n")
    for command in (vision, lambda args: cli.main(["run", "vision", *args[1:]])):
        with pytest.raises(SystemExit) as done:
            command(["fit", *flags, "--config", str(over), "--print_config"])
        assert done.value.code in (0, None)
        printed = capsys.readouterr().out
        assert "max_steps: 7" in printed
        assert "default_root_dir: runs/vision" in printed
    assert not [warning for warning in recwarn if "LightningCLI" in str(warning.message)]


def test_run_hands_over_to_the_recipe(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["run", "vision", "--config", "quickstart", "--trainer.max_steps", "7", "--print_config"])
    assert done.value.code in (0, None)
    assert "max_steps: 7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["run", "nothing", "--config", "quickstart"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run", "causal_lm", "-c", "quickstart", "--config", "nope"])
    assert (
        "causal_lm: error: `--config` must be a file or one of quickstart, small_cache_8k, smollm2_8k_gpu, got 'nope'"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        cli.main(["list", "--what"])
    assert "unrecognized arguments: --what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--trainer.max_stepz", "3"],
            "arguments: --trainer.max_stepz 3. Did you mean --trainer.max_steps?",
        ),
        (["--model.width", "abc"], "`model.width`: Expected an int. Got value: abc."),
        (["--trainer.callbacks.init_args.nothing", "3"], "KernelSwap': Option 'nothing' is not accepted"),
        (["--data.data", "nowhere"], "`data` must be 'digits', hub:NAME, or an existing folder, got 'nowhere'."),
        (["--model.model", "/nowhere"], "`model` must be an existing folder, got '/nowhere'."),
        (["--trainer.accelerator", "gpu", "--trainer.devices", "99"], "No supported gpu backend found"),
    ],
)
def test_what_is_refused_takes_one_line_with_the_remedy(options, told, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as done:
        main(["recipes", "run", "vision", "--config", "quickstart", *options])
    assert done.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("sparse-prune recipes run vision: error: ")
    assert told in line
    assert line.endswith((" --help shows the settings.", " --debug shows where it came from."))
    assert len(line) < 500


def test_debug_shows_where_an_error_came_from():
    with pytest.raises(FileNotFoundError, match="got 'nowhere'"):
        main(["recipes", "run", "vision", "--config", "quickstart", "--data.data", "nowhere", "--debug"])


def test_help_of_a_recipe_shows_its_settings(capsys):
    with pytest.raises(SystemExit) as done:
        main(["recipes", "run", "vision", "--help"])
    assert done.value.code in (0, None)
    printed = capsys.readouterr().out
    for setting in ("--model.patch_size", "--data.image_size", "--compare_dense", "--trainer.max_steps"):
        assert setting in printed
    main(["recipes", "run", "--help"])
    assert "NAME" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["recipes", "run", "vision"])
    assert "--config must be a file or one of quickstart, vit_gpu" in capsys.readouterr().err
