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
from sparse_prune.commands.report.animation import MOST_BYTES, MOST_FRAMES, blocks_per_cell, cells
from sparse_prune.commands.report.cli import main
from sparse_prune.commands.report.compare import describe as describe_runs
from sparse_prune.commands.report.heads import describe_heads
from sparse_prune.commands.report.logs import read_run
from sparse_prune.commands.report.page import describe, render
from sparse_prune.export.history import save_frame
from sparse_prune.machine import describe_machine
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
    data = data_of(render(read_run(folder)))
    main, more = ({chart["title"]: chart for chart in data[part]} for part in ("charts", "more"))
    assert list(main) == ["Loss", "Share of blocks pruned", "Sparsity per layer", "Step time"]
    assert {"Change per decision", "Tokens per second", "KV cache saved"} <= more.keys()
    assert data["swaps"] == sorted({row["settled"] for row in data["table"]})
    assert [line["name"] for line in main["Loss"]["lines"]] == [
        "dense twin, training",
        "pruned, training",
        "dense twin, validation",
        "pruned, validation",
    ]
    pruned = {line["name"]: line for line in main["Share of blocks pruned"]["lines"]}
    assert pruned["achieved"]["points"][-1] == [data["span"][1], pytest.approx(callback.pruner.total_sparsity)]
    assert pruned["requested"]["style"] != pruned["achieved"]["style"]
    assert data["sentence"].startswith(f"{callback.pruner.total_sparsity:.1%} of the attention blocks are pruned;")
    assert re.search(r"the held-out loss is \d+\.\d+% (higher|lower)", data["sentence"])
    for row, (name, pattern) in zip(data["table"], callback.pruner.patterns.items(), strict=True):
        assert row["layer"] == name
        assert row["heads"] == pytest.approx(pattern.head_sparsity.tolist(), abs=1e-4)
        assert row["state"] == "sparse"
        assert row["settled"] in data["swaps"]
    csv = read_run(folder).metrics
    for title, key in LINES.items():
        points = [list(point) for point in csv[key]]
        assert more[title]["lines"][0]["points"][: len(points)] == points, title
        assert len({value for _, value in csv[key]}) > 3, title
    kept = sum(state.mass_kept for state in callback.pruner.layers.values()) / 2
    assert data["also"][0].startswith(f"{kept:.1%} of the attention")
    assert data["also"][1].startswith(f"{savings(callback.pruner)['savings/kv_share']:.1%} of the KV cache")
    facts = dict(data["facts"])
    assert facts["Machine"] == describe_machine()["machine"]
    assert "torch " in facts["Versions"]
    assert facts["Schedule"].startswith("CubicSchedule of sparsity up to 0.4, steps 0 to 6")


def test_steps_count_the_same_everywhere(run):
    """Those of the logs, the pattern history and the callback: optimizer steps taken."""
    folder, callback = run
    logs = read_run(folder)
    assert {step for step, _ in logs.metrics["prune/requested"]} <= set(logs.steps)
    assert {event.step for event in callback.swap.events} == {
        step for key, points in logs.metrics.items() if key.startswith("swap/layer") for step, _ in points
    }


LINES = {
    "Attention kept": "mass/kept",
    "Threshold on scores": "prune/threshold",
    "Share saved": "savings/attention_flops_share",
    "Attention FLOPs saved per forward pass": "savings/attention_flops",
    "KV cache saved": "savings/kv_bytes",
}


def logged(folder, text, twin=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)
    if twin is not None:
        (folder / "dense").mkdir()
        (folder / "dense" / "metrics.csv").write_text(twin)
    return read_run(folder)


KEYS = "step,sparsity/total,swap/layer_00,time/step_seconds,test/loss,val/passkey_accuracy,final/sparsity"


def test_the_verdict_compares_with_the_dense_twin(tmp_path):
    rows = f"{KEYS}\n0,.5,,9,,,\n1,,1,9,,,\n2,,,2,,,\n3,,,2,2.02,.5,.5\n"
    twin = "step,time/step_seconds,test/loss,val/passkey_accuracy\n0,99,,\n1,3,,\n2,3,2.0,1\n"
    data = describe(logged(tmp_path, rows, twin))
    assert data["sentence"] == (
        "50.0% of the attention blocks are pruned; a step is 1.50x faster than the dense twin's, "
        "the held-out loss is 1.00% higher and 50% of the twin's passkey accuracy is kept."
    )
    assert [(figure["value"], figure["judgement"]) for figure in data["figures"]] == [
        ("1.50x faster", "good"),
        ("+1.00%", "fair"),  # 2.02 / 2 - 1 is a little more than 0.01
        ("50%", "bad"),
    ]
    (tmp_path / "hparams.yaml").write_text("passkey_prompts: 2\nodd: !!python/tuple [1, 2]\n")
    data = describe(read_run(tmp_path))
    assert "2 prompts, too few to tell more" in data["figures"][2]["note"]
    assert data["settings"]["odd"] == "1, 2"


def test_an_unfinished_run_says_so(tmp_path):
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 24}\n")
    data = describe(logged(tmp_path, "step,sparsity/total,train/loss\n0,0.25,2.5\n"))
    assert data["sentence"] == (
        "Unfinished, step 1 of 24: 25.0% of the attention blocks are pruned; nothing was compared with a dense twin."
    )
    assert {figure["judgement"] for figure in data["figures"]} == {"unknown"}
    assert data["span"] == [1, 1]


def test_prefixed_loggers_are_read(tmp_path):
    logs = logged(tmp_path, "step,mine-sparsity/total,mine-train/loss\n0,0.25,2.5\n")
    assert logs.metrics == {"sparsity/total": [(1, 0.25)], "train/loss": [(1, 2.5)]}


def test_what_a_recipe_logs_of_the_twin_is_the_twins(tmp_path):
    logs = logged(tmp_path, "step,sparsity/total,dense/val/loss\n0,0.25,2.5\n")
    assert logs.dense == {"val/loss": [(1, 2.5)]}
    assert list(logs.metrics) == ["sparsity/total"]


def test_files_of_wandbs_client_are_read(tmp_path):
    wandb = pytest.importorskip("wandb")
    home = tmp_path / "wandb_home"
    home.mkdir()
    with wandb.init(mode="offline", dir=home, project="p", config={"pruning/machine": "a machine"}) as made:
        for step in range(3):
            made.log({"sparsity/total": 0.1 * step, "trainer/global_step": step, "note": "x" * 40_000})
        made.summary.update({"final/sparsity": 0.2})
    wandb.teardown()  # W&B's process writes on; and the environment is read anew by the next test
    logs = read_run(home)
    assert logs.metrics["sparsity/total"] == [(1, 0.0), (2, pytest.approx(0.1)), (3, pytest.approx(0.2))]
    assert logs.metrics["final/sparsity"][-1][1] == 0.2
    assert logs.settings["pruning/machine"] == "a machine"
    # As far as a file was written: a run that is under way, or was killed.
    (file,) = home.rglob("run-*.wandb")
    file.write_bytes(file.read_bytes()[:100_000])
    assert read_run(home).metrics["sparsity/total"] == [(1, 0.0)]
    file.write_bytes(b"no")
    with pytest.raises(ValueError, match="must be a file of W&B's client"):
        read_run(home)


def test_heads_tell_reach_and_the_rule_that_kept_them():
    keep = torch.eye(4, dtype=torch.bool)[None].repeat(2, 1, 1)
    keep[:, :, 0] = True
    keep[1, 3, 1] = keep[1, 2, 1] = True
    told = describe_heads(BlockPattern(keep, (8, 8), True, 32, 32), SINK_AND_DIAGONAL)
    assert told["heads"] == [0.3, 0.1]
    assert told["reach"] == [0, 0]
    assert told["sink"] == [round(4 / 7, 3), round(4 / 9, 3)]
    assert told["recent"] == [round(3 / 7, 3), round(3 / 9, 3)]
    everything = BlockPattern.dense(1, 5, 5, 1, True)
    assert describe_heads(everything, {})["reach"] == [2]
    assert describe_heads(everything, SINK_AND_DIAGONAL)["reach"] == [1]


SINK_AND_DIAGONAL = {"pruning/constraints/sink_blocks": "1", "pruning/constraints/recent_blocks": "1"}


def test_several_runs_stand_on_one_page(tmp_path, capsys):
    for name, share in (("a", 0.3), ("b", 0.7)):
        logged(tmp_path / name, f"step,sparsity/total,val/loss,final/sparsity\n0,{share},{1 + share},{share}\n")
    main([str(tmp_path / "a"), str(tmp_path / "b")])
    page = tmp_path / "a" / "comparison.html"
    assert capsys.readouterr().out.strip() == str(page)
    data = data_of(page.read_text())
    assert [(row["name"], row["sparsity"], row["loss"]) for row in data["rows"]] == [("a", 0.3, 1.3), ("b", 0.7, 1.7)]
    assert {figure["value"] for row in data["rows"] for figure in row["figures"]} == {"not compared"}
    points = data["charts"][0]["points"]
    assert [(point["run"], point["x"], point["y"]) for point in points] == [(0, 0.3, 1.3), (1, 0.7, 1.7)]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["one/csv/version_0", "two/csv/version_0"], ["one", "two"]),
        (["csv/version_0", "csv/version_1"], ["version_0", "version_1"]),
        (["run", "more/run"], ["run", "more/run"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(tmp_path, folders, names):
    for folder in folders:
        logged(tmp_path / folder, "step,sparsity/total\n0,0.5\n")
    data = describe_runs([read_run(tmp_path / folder) for folder in folders])
    assert [row["name"] for row in data["rows"]] == names


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
    layer = cells(BlockPattern(keep, (8, 8), True, 24, 24), 2)
    # All three of three, none of two, none impossible; one of three, one of two.
    assert unpacked(layer).tolist() == [[[3, 0], [0, 3]], [[1, 0], [2, 3]]]
    possible = np.unpackbits(np.frombuffer(base64.b64decode(layer["possible"]), np.uint8), count=4)
    assert possible.tolist() == [1, 0, 1, 1]


def test_a_large_model_makes_a_page_of_a_few_megabytes():
    large = {str(n): BlockPattern.dense(32, 128, 128, 1, True) for n in range(2)}
    frames = MOST_FRAMES * 16  # as many cells as 32 layers have
    merged = blocks_per_cell(large, frames)
    size = frames * sum(len(cells(pattern, merged)["keep"]) for pattern in large.values())
    assert merged > 1
    assert MOST_BYTES / 3 < size <= 1.1 * MOST_BYTES
    assert blocks_per_cell(large, 1) == 2  # 32 heads of 128 blocks are more than a screen shows
    assert blocks_per_cell({"0": BlockPattern.dense(8, 128, 128, 1, True)}, 1) == 1


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
        "dense twin, training": [(2, 2.9), (3, 1.9)],
        "pruned, training": [(2, 3.0), (3, 2.0)],
        "pruned, validation": [(3, 2.2)],
        "dense twin, validation": [(3, 2.0)],
    }
    assert data["figures"][1]["value"] == "+10.00%"
    assert data["figures"][1]["note"].startswith("val_loss, 2.2000 against 2.0000")


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
    assert data["charts"][0]["lines"][0]["points"] == [(2, 2.5), (5, 2.0)]
    assert data["frames"] == data["table"] == []
    assert "no dense twin" in data["figures"][1]["note"]


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
    assert "data-ready=" in done.stdout, done.stderr[-2000:]
    assert done.stdout.count("<figure>") >= 6
    assert done.stdout.count('<tr id="layer-') == 2
    assert re.search(r"<span>step \d+</span>", done.stdout)
    shot = tmp_path / "shot.png"
    subprocess.run([*headless, f"--screenshot={shot}", "--window-size=1240,1900", page], check=True, timeout=120)
    from matplotlib.image import imread

    picture = torch.from_numpy(imread(shot))[..., :3]
    blue = ((picture - torch.tensor([29, 78, 137]) / 255).abs().amax(-1) < 0.02).float().mean()
    assert blue > 0.001  # kept blocks and lines


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The page of a run with eighty layers of sixty-four heads."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "metrics.csv").write_text("step,sparsity/total\n0,0.5\n1,0.6\n")
    keep = torch.rand(64, 32, 32, generator=torch.Generator().manual_seed(0)).tril() > 0.5
    for step in (1, 2):
        patterns = {f"layer {n}": BlockPattern(keep, (64, 64), True, 2048, 2048) for n in range(80)}
        save_frame(patterns, folder, step)
    main([str(folder), "--output", str(folder / "page.html")])
    return folder / "page.html"


def dom(page, *options):
    headless = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom", *options]
    command = [*headless, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="needs Chromium")
def test_a_page_of_eighty_layers_and_sixty_four_heads_is_there_in_two_seconds(large):
    drawn = dom(large)
    assert drawn.count('<tr id="layer-') == 80
    assert int(re.search(r'data-ready="(\d+)"', drawn)[1]) < 2000


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None and os.environ.get("CI") != "true", reason="needs Chromium")
def test_paper_holds_all_layers_that_a_narrow_screen_scrolls(large):
    """As wide as A4, with the rules for paper on the screen: nothing is cut off, nothing that is folded shows."""
    measure = """<script>
const scroll = document.querySelector("canvas").parentElement;
document.body.dataset.hidden = scroll.scrollWidth - scroll.clientWidth;
document.body.dataset.folded = [...document.querySelectorAll("details")].filter(d => d.offsetHeight).length;
</script></body>"""
    found = {}
    for media in ("print", "screen"):
        page = large.with_name(f"{media}.html")
        text = large.read_text().replace("</body>", measure)
        page.write_text(text.replace("@media print", "@media all") if media == "print" else text)
        drawn = dom(page, "--window-size=718,1000")
        found[media] = [int(re.search(rf'data-{name}="(\d+)"', drawn)[1]) for name in ("hidden", "folded")]
        assert ("Scroll sideways to see all 80 layers." in drawn) == (media == "screen")
    assert found["print"] == [0, 0]
    assert found["screen"][0] > 100
    assert found["screen"][1] >= 1


def test_the_history_of_a_recipe_tells_which_steps_were_probed(tmp_path):
    history = RunHistory()
    trainer(tmp_path, [history, pruning(every_n_steps=2)], steps=4).fit(TinyModule(), batches())
    assert [record.probed for record in history.records] == [True, False, True, False]
