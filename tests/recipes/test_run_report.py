"""A run's page: right numbers, nothing fetched, drawn by a real browser."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from sparse_prune.callbacks import KernelSwap, SparsityLogger
from sparse_prune.callbacks.pattern_history import save_frame
from sparse_prune.recipes.finetune.history import RunHistory
from sparse_prune.recipes.run_report.cli import main
from sparse_prune.recipes.run_report.logs import read_run
from sparse_prune.recipes.run_report.page import MOST_FRAMES, describe, render
from tiny import TinyModule, batches, pruning, trainer

from sparse_prune import BlockPattern
from sparse_prune.__main__ import main as sparse_prune

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = pruning()
    logger = CSVLogger(folder, name="csv", version="")
    callbacks = [callback, KernelSwap("gather"), SparsityLogger(every_n_decisions=1)]
    trainer(folder, callbacks, logger=logger, val_check_interval=4).fit(TinyModule(), batches(), batches(4))
    twin = CSVLogger(folder / "csv", name="dense", version="")
    trainer(folder, [], logger=twin, val_check_interval=4).fit(TinyModule(), batches(), batches(4))
    return folder, callback


def data_of(page):
    return json.loads(re.search(r"const data = (.*);\n", page)[1])


def test_the_page_holds_the_run(run):
    folder, callback = run
    page = render(read_run(folder))
    data = data_of(page)
    charts = {chart["title"]: chart for chart in data["charts"]}
    assert {"Loss", "Sparsity", "Sparsity per layer", "Change per layer", "Step time", "Speed"} <= charts.keys()
    assert {"Attention FLOPs saved", "KV cache saved"} <= charts.keys()
    assert data["swaps"] == sorted({row["settled"] for row in data["table"]["rows"]})
    assert {line["name"] for line in charts["Loss"]["lines"]} >= {"pruned, validation", "dense, validation"}
    assert [line["name"] for line in charts["Loss"]["lines"]][:2] == ["dense, training", "pruned, training"]
    assert charts["Sparsity"]["lines"][1]["points"][-1][1] == pytest.approx(callback.pruner.total_sparsity)
    assert data["facts"][0][1] == f"{callback.pruner.total_sparsity:.1%}"
    assert re.search(r"val/loss, [+-]\d", data["facts"][1][2])
    rows = data["table"]["rows"]
    assert [row["layer"] for row in rows] == list(callback.pruner.layers)
    for row, pattern in zip(rows, callback.pruner.patterns.values(), strict=True):
        assert row["heads"] == pytest.approx(pattern.head_sparsity.tolist(), abs=1e-4)
        assert row["state"] == "sparse"
        assert row["settled"] in data["swaps"]
    assert len(data["frames"]) >= 8


def test_nothing_is_fetched_and_nothing_is_executed_from_the_data(run, tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)><!--</script>"
    shutil.copytree(run[0] / "csv", folder)
    page = render(read_run(folder))
    assert not re.search(
        r"(?:src|href)=|url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", page.replace("src=x", "")
    )
    assert page.count("</script>") == 1
    assert "<img" not in page
    assert "<!--" not in page
    assert data_of(page)["name"] == str(folder)


def test_long_histories_are_thinned_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,sparsity/total\n1,0.5\n")
    for step in range(1, 2 * MOST_FRAMES + 20):
        save_frame({"a": BlockPattern.dense(1, 8, 8, 8, True)}, tmp_path, step)
    frames = describe(read_run(tmp_path))["frames"]
    assert len(frames) == MOST_FRAMES
    assert (frames[0]["step"], frames[-1]["step"]) == (1, 2 * MOST_FRAMES + 19)


def test_the_command_writes_beside_the_logs(run, capsys):
    sparse_prune(["report", str(run[0])])
    path = run[0] / "csv" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text() == render(read_run(run[0] / "csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "metrics.csv inside.*CSVLogger"),
        ("a,b\n1,2\n", "must hold a step"),
        ("step,x\n1,oops\n", "in line 2"),
    ],
)
def test_what_is_not_a_run_is_refused(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_patterns_or_twin_still_has_a_page(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss,epoch\n1,2.5,0\n2,,0\n3,nan,0\n4,2.0,1\n")
    data = describe(read_run(tmp_path))
    assert data["charts"][0]["lines"][0]["points"] == [(1, 2.5), (4, 2.0)]
    assert data["frames"] == data["table"]["rows"] == []
    assert "no dense twin" in data["facts"][0][2]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="needs Chromium")
def test_a_browser_draws_it(run, tmp_path):
    main([str(run[0]), "--output", str(tmp_path / "page.html")])
    assert BROWSER, "CI must install Chromium: see .ci/run"
    headless = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    headless += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    headless += ["--virtual-time-budget=3000", "--host-resolver-rules=MAP * ~NOTFOUND"]
    headless += [f"--user-data-dir={tmp_path / 'profile'}"]
    page = (tmp_path / "page.html").as_uri()
    done = subprocess.run([*headless, "--dump-dom", page], capture_output=True, text=True, timeout=120)
    assert 'data-ready="yes"' in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("<figure>") >= 6
    assert done.stdout.count("<tr>") == 1 + 2
    assert re.search(r'<span id="step">step \d+</span>', done.stdout)
    shot = tmp_path / "shot.png"
    subprocess.run([*headless, f"--screenshot={shot}", "--window-size=1240,1900", page], check=True, timeout=120)
    from matplotlib.image import imread

    picture = torch.from_numpy(imread(shot))[..., :3]
    blue = ((picture - torch.tensor([29, 78, 137]) / 255).abs().amax(-1) < 0.02).float().mean()
    assert blue > 0.001  # kept blocks and lines


def test_the_history_of_a_recipe_tells_which_steps_were_probed(tmp_path):
    history = RunHistory()
    trainer(tmp_path, [history, pruning(every_n_steps=2)], steps=4).fit(TinyModule(), batches())
    assert [record.probed for record in history.records] == [True, False, True, False]
