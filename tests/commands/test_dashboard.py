import json
import os
import re
import subprocess
import sys

import pytest
from pytorch_lightning.loggers import CSVLogger

from sparse_prune.callbacks import KernelSwap, SparsityLogger
from sparse_prune.commands.dashboard.charts import AXIS, SECTIONS
from sparse_prune.commands.dashboard.cli import main, parse_target
from sparse_prune.losses import loss_keys
from support.tiny import TinyModule, batches, pruning, trainer
from support.wandb_server import wandb_server

pytest.importorskip("wandb_workspaces")
CHARTS = [chart for section in SECTIONS for chart in section.charts]
TWIN_LOSSES = {f"dense/{key}" for stage in ("training", "validation") for key in loss_keys(stage)}


@pytest.fixture
def specification(tmp_path):
    def make(*args):
        main([*args, "--output", str(tmp_path / "dashboard.json")])
        return json.loads((tmp_path / "dashboard.json").read_text())

    return make


def panels_of(spec):
    sections = spec["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel for section in sections for panel in section["panels"]]


def test_every_logged_number_has_a_chart_and_every_chart_a_number(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version="")
    callbacks = [pruning(), KernelSwap("gather"), SparsityLogger()]
    trainer(tmp_path, callbacks, logger=logger, val_check_interval=4, log_every_n_steps=1).fit(
        TinyModule(), batches(), batches(4)
    )
    header = (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0].split(",")
    logged = {key for key in header if key.split("/")[0] in ("prune", "sparsity", "settle", "mass", "swap", "savings")}
    logged |= {key for key in header if key.startswith("time/")}
    assert {"time/step_seconds_at_swap", "time/tokens_per_second_at_swap"} <= logged
    numbers = [chart for chart in CHARTS if chart.kind in ("lines", "number")]
    for key in logged:
        assert any(key in chart.keys or chart.pattern and re.fullmatch(chart.pattern, key) for chart in numbers), key
    for chart in numbers:
        losses = {
            *loss_keys("training"),
            *loss_keys("validation"),
            *TWIN_LOSSES,
            "dense/time/step_seconds",
        }  # of recipes
        keys = set(chart.keys) - losses
        assert keys <= logged, chart
        assert chart.pattern is None or any(re.fullmatch(chart.pattern, key) for key in logged), chart


def test_the_workspace_plots_over_optimizer_steps(specification):
    spec = specification("me/project")
    panels = panels_of(spec)
    assert len(panels) == 1 + len(CHARTS)
    lines = {panel["config"]["chartTitle"]: panel["config"] for panel in panels if "Line" in panel["viewType"]}
    assert {config["xAxis"] for config in lines.values()} == {AXIS}
    assert lines["Change per decision"]["metricRegex"] == r"(settle/change_layer_\d+|settle/min_delta)"
    assert lines["Change per decision"]["useMetricRegex"]
    assert lines["Threshold on scores"]["yLogScale"]
    assert (lines["Share of blocks pruned"]["yAxisMin"], lines["Share of blocks pruned"]["yAxisMax"]) == (0.0, 1.0)
    media = [panel["config"]["mediaKeys"] for panel in panels if panel["viewType"] == "Media Browser"]
    assert media == [["patterns/atlas"]]
    assert '"patterns/heads"' in json.dumps([panel for panel in panels if panel["viewType"] == "Weave"])


def test_a_run_is_shown_beside_its_baseline(specification):
    spec = specification("me/project/abc123", "--runs", "def456", "--baseline", "dense1")
    for part in (spec["workspace"], spec["report"]):
        assert '["abc123", "def456", "dense1"]' in json.dumps(part)
    whole = json.dumps(specification("me/project", "--baseline", "dense1"))
    assert '["dense1"]' not in whole.replace("pinnedRuns", "")


def test_swaps_are_points_on_the_curves_of_the_speed(specification):
    spec = specification("me/project/abc123", "--baseline", "dense1")
    lines = {panel["config"]["chartTitle"]: panel["config"] for panel in panels_of(spec) if "Line" in panel["viewType"]}
    for title, key in (("Step time", "time/step_seconds"), ("Tokens per second", "time/tokens_per_second")):
        (config,) = (config for name, config in lines.items() if name.startswith(f"{title} ("))
        assert config["metrics"][:2] == [key, f"{key}_at_swap"]
        assert config["metrics"][2:] in ([], ["dense/time/step_seconds"])
        assert config["overrideMarks"]["abc123:" + f"{key}_at_swap"] == "points"
        assert f"abc123:{key}" not in config["overrideMarks"]


def test_losses_of_the_dense_run_stand_in_the_same_charts(specification):
    spec = specification("me/project/abc123", "--baseline", "dense1")
    assert spec["workspace"]["spec"]["section"]["panelBankConfig"]
    charts = {p["config"]["chartTitle"]: p["config"] for p in panels_of(spec) if "Line" in p["viewType"]}
    # The twin of a recipe logs beside the run; a dense run of its own shows under the same keys.
    for title, stage in (("Training loss", "training"), ("Held-out loss", "validation")):
        keys = loss_keys(stage)
        assert charts[title]["metrics"] == [*keys, *(f"dense/{key}" for key in keys)]
    assert {"train/loss", "train_loss", "loss"} <= set(charts["Training loss"]["metrics"])
    assert {"val/loss", "val_loss"} <= set(charts["Held-out loss"]["metrics"])
    assert '["abc123", "dense1"]' in json.dumps(spec["workspace"])


def test_the_report_lays_panels_out_without_gaps_or_overlap(specification):
    grids = [
        block for block in specification("me/project")["report"]["spec"]["blocks"] if block["type"] == "panel-grid"
    ]
    assert len(grids) == 1 + len(SECTIONS)
    for grid in grids:
        taken = set()
        for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]:
            place = panel["layout"]
            cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
            assert not cells & taken
            assert max(x for x, _ in cells) < 24
            taken |= cells


def test_many_runs_begin_with_how_sparse_one_can_go(specification):
    many, one = specification("me/project"), specification("me/project/abc123")
    first = many["workspace"]["spec"]["section"]["panelBankConfig"]["sections"][0]
    assert first["name"] == "How sparse can I go?"
    (panel,) = first["panels"]
    assert panel["viewType"] == "Parallel Coordinates Plot"
    axes = [column["accessor"] for column in panel["config"]["columns"]]
    assert axes[0] == "config:pruning/sparsity.value"
    assert axes[-1].endswith("val/loss.last")
    assert "Parallel Coordinates Plot" in json.dumps(many["report"])
    assert "Parallel Coordinates Plot" not in json.dumps(one)


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ("me/project", ()),
        ("me/project/abc123", ("abc123",)),
        ("https://host.example/me/project/runs/abc123?nw=x", ("abc123",)),
        ("https://host.example/me/project/workspace", ()),
    ],
)
def test_targets(given, runs):
    target = parse_target(given, [], None)
    assert (target.entity, target.project, target.runs) == ("me", "project", runs)


def test_the_file_is_made_with_its_folder_or_the_command_ends_in_one_line(tmp_path, capsys):
    main(["me/project", "--output", str(tmp_path / "new" / "views.json")])
    assert json.loads((tmp_path / "new" / "views.json").read_text()).keys() == {"workspace", "report"}
    with pytest.raises(SystemExit):
        main(["me/project", "--output", str(tmp_path)])
    assert f"`output` must be a file that can be written, got '{tmp_path}': " in capsys.readouterr().err


@pytest.mark.parametrize("given", ["project", "", "a/b/c/d"])
def test_an_unclear_target_is_refused(given, capsys):
    with pytest.raises(SystemExit):
        main([given, "--output", "never.json"])
    assert "`target` must be ENTITY/PROJECT" in capsys.readouterr().err


@pytest.fixture
def command(tmp_path):
    def run(url, *args):
        environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        code = [sys.executable, "-m", "sparse_prune", "dashboard", *args]
        return subprocess.run(code, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_it_saves_a_workspace_and_a_report(command):
    with wandb_server() as server:
        done = command(server.url, "me/project/abc123", "--name", "Mine")
    assert done.returncode == 0, done.stderr
    assert [view["type"] for view in server.views] == ["project-view", "runs"]
    for view in server.views:
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "project", "Mine")
        assert "abc123" in view["spec"]
    assert [line.split("/me/project")[0] for line in done.stdout.split()] == [server.url] * 2


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_in_one_line(command):
    done = command("http://127.0.0.1:9", "me/project")
    assert done.returncode == 1
    assert "Workspace not saved" in done.stderr
    assert "Traceback" not in done.stderr
