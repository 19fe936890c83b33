"""A run's page: right numbers, nothing fetched, drawn by a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from sparse_prune import BlockPattern
from sparse_prune.__main__ import main as sparse_prune
from sparse_prune.callbacks import KernelSwap, SparsityLogger
from sparse_prune.commands.report import animation
from sparse_prune.commands.report.animation import MOST_BYTES, MOST_FRAMES, blocks_per_cell, packed
from sparse_prune.commands.report.cli import main
from sparse_prune.commands.report.logs import read_run
from sparse_prune.commands.report.page import describe, render
from sparse_prune.export.history import save_frame
from sparse_prune.metrics import savings
from sparse_prune.recipes.base.history import RunHistory
from support.tiny import TinyModule, batches, load_frames, pruning, trainer

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
    assert {
        "Loss",
        "Share of blocks pruned",
        "Sparsity per layer",
        "Change per decision",
        "Step time",
        "Tokens per second",
    } <= charts.keys()
    assert {"Attention FLOPs saved per forward pass", "KV cache saved"} <= charts.keys()
    assert data["swaps"] == sorted({row["settled"] for row in data["table"]["rows"]})
    assert {line["name"] for line in charts["Loss"]["lines"]} >= {"pruned, validation", "dense, validation"}
    assert [line["name"] for line in charts["Loss"]["lines"]][:2] == ["dense, training", "pruned, training"]
    assert charts["Share of blocks pruned"]["lines"][1]["points"][-1][1] == pytest.approx(
        callback.pruner.total_sparsity
    )
    assert data["facts"][0][1] == f"{callback.pruner.total_sparsity:.1%}"
    assert re.search(r"val/loss, [+-]\d", data["facts"][1][2])
    rows = data["table"]["rows"]
    assert [row["layer"] for row in rows] == list(callback.pruner.layers)
    for row, pattern in zip(rows, callback.pruner.patterns.values(), strict=True):
        assert row["heads"] == pytest.approx(pattern.head_sparsity.tolist(), abs=1e-4)
        assert row["state"] == "sparse"
        assert row["settled"] in data["swaps"]
    assert len(data["frames"]) >= 8
    assert {chart["title"]: chart["lines"][0]["points"][-1][1] for chart in data["charts"]}["Attention kept"] < 0.99
    csv = read_run(folder).metrics
    for title, key in LINES.items():
        assert charts[title]["lines"][0]["points"] == [list(point) for point in csv[key]], title
        assert len({value for _, value in csv[key]}) > 3, title
    for title, key in (("Sparsity per layer", "sparsity/layer_01"), ("Change per decision", "settle/change_layer_01")):
        assert charts[title]["lines"][1] == {"name": "layer 01", "points": [list(p) for p in csv[key]], "style": "thin"}
    kept = sum(state.mass_kept for state in callback.pruner.layers.values()) / 2
    facts = {label: value for label, value, _ in data["facts"]}
    assert facts["Attention kept"] == f"{kept:.1%}"
    assert facts["KV cache"] == f"−{savings(callback.pruner)['savings/kv_share']:.0%}"


LINES = {
    "Attention kept": "mass/kept",
    "Threshold on scores": "prune/threshold",
    "Share saved": "savings/attention_flops_share",
    "Attention FLOPs saved per forward pass": "savings/attention_flops",
    "KV cache saved": "savings/kv_bytes",
}


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


def unpacked(layer):
    """Levels of cells, (heads, rows, cols), as the page reads them."""
    shape = (layer["heads"], layer["rows"], layer["cols"], layer["depth"])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(layer["keep"]), np.uint8), count=int(np.prod(shape)))
    return (bits.reshape(shape) * 2 ** np.arange(layer["depth"])[::-1]).sum(-1)


def test_frames_hold_the_blocks(run):
    folder, _ = run
    data = data_of(render(read_run(folder)))
    frames = load_frames(folder / "csv")
    assert data["merged"] == 1
    assert [frame["step"] for frame in data["frames"]] == list(frames)
    for frame in data["frames"]:
        for layer, pattern in zip(frame["layers"], frames[frame["step"]].values(), strict=True):
            assert (unpacked(layer) == pattern.keep.numpy()).all()


def test_merged_cells_tell_how_many_of_their_blocks_are_kept():
    keep = torch.tensor([[[1, 0, 0], [1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0], [1, 0, 1]]], dtype=torch.bool)
    layer = packed(BlockPattern(keep, (8, 8), True, 24, 24), 2)
    # All three of three, none of two, none impossible; one of three, one of two.
    assert unpacked(layer).tolist() == [[[3, 0], [0, 3]], [[1, 0], [2, 3]]]
    possible = np.unpackbits(np.frombuffer(base64.b64decode(layer["possible"]), np.uint8), count=4)
    assert possible.tolist() == [1, 0, 1, 1]


def test_a_large_model_makes_a_page_of_a_few_megabytes():
    large = {str(n): BlockPattern.dense(32, 128, 128, 1, True) for n in range(2)}
    frames = MOST_FRAMES * 16  # as many cells as 32 layers have
    merged = blocks_per_cell(large, frames)
    size = frames * sum(len(packed(pattern, merged)["keep"]) for pattern in large.values())
    assert merged > 1
    assert MOST_BYTES / 3 < size <= 1.1 * MOST_BYTES
    assert blocks_per_cell(large, 1) == 1


def test_long_histories_are_thinned_out(tmp_path, monkeypatch):
    monkeypatch.setattr(animation, "MOST_BYTES", 10**9)
    (tmp_path / "metrics.csv").write_text("step,sparsity/total\n1,0.5\n")
    for step in range(1, 2 * MOST_FRAMES + 20):
        save_frame({"a": BlockPattern.dense(1, 8, 8, 8, True)}, tmp_path, step)
    frames = describe(read_run(tmp_path))["frames"]
    assert len(frames) == MOST_FRAMES
    assert (frames[0]["step"], frames[-1]["step"]) == (1, 2 * MOST_FRAMES + 19)
    # Those that are not shown are not read.
    (tmp_path / "pattern_history" / "step_00000002.npz").write_bytes(b"")
    assert describe(read_run(tmp_path))["frames"] == frames


def test_a_page_without_frames_says_where_they_were_looked_for(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,sparsity/total\n1,0.5\n")
    main([str(tmp_path)])
    assert f"No frames of a pattern history in {tmp_path / 'pattern_history'}" in capsys.readouterr().err


def test_a_damaged_frame_is_named(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("step,sparsity/total\n1,0.5\n")
    save_frame({"a": BlockPattern.dense(1, 8, 8, 8, True)}, tmp_path, 1).write_bytes(b"no")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "step_00000001.npz must be a frame" in capsys.readouterr().err


def test_losses_of_other_names_are_found(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss_step,train_loss_epoch,val_loss\n1,3.0,,\n2,2.0,2.5,2.2\n")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "metrics.csv").write_text("step,train_loss_step,val_loss\n1,2.9,\n2,1.9,2.0\n")
    data = describe(read_run(tmp_path))
    lines = {line["name"]: line["points"] for line in data["charts"][0]["lines"]}
    assert lines == {
        "dense, training": [(1, 2.9), (2, 1.9)],
        "pruned, training": [(1, 3.0), (2, 2.0)],
        "pruned, validation": [(2, 2.2)],
        "dense, validation": [(2, 2.0)],
    }
    assert data["facts"] == [["Loss", "2.2000", "val_loss, +10.00% against the dense twin"]]


def test_layers_are_in_order_from_a_hundred_on(tmp_path):
    keys = [f"sparsity/layer_{n:02d}" for n in range(102)]
    (tmp_path / "metrics.csv").write_text(f"step,{','.join(keys)}\n1,{','.join(['0.5'] * 102)}\n")
    (chart,) = describe(read_run(tmp_path))["charts"]
    assert [line["name"] for line in chart["lines"]] == [f"layer {n:02d}" for n in range(102)]


def test_the_command_writes_beside_the_logs(run, capsys):
    sparse_prune(["report", str(run[0])])
    path = run[0] / "csv" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text() == render(read_run(run[0] / "csv"))


def test_a_page_that_cannot_be_written_ends_in_one_line(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(run[0]), "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"`output` must be a file that can be written, got '{tmp_path}': " in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    main([str(run[0]), "--output=~/new/page.html"])
    assert (tmp_path / "new" / "page.html").is_file()


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
