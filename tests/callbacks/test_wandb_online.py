"""Online runs against a server on the loopback device, whole and disturbed."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
from lightning_utilities.core.imports import RequirementCache

from sparse_prune.callbacks import FallbackWandbLogger, wandb_logger
from support.logs import EXPECTED, read_leveldb_log
from support.wandb_server import wandb_server

pytest.importorskip("wandb")
pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "scenarios" / "wandb_run.py"
TOLD_AT_START = "the run is kept in"
TOLD_LATER = "takes no files and gets no more of them"


def run(folder, url=None, **options):
    """The process's output, its losses, and the seconds for which its training stood still."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_CONFIG_DIR": str(folder)}
    if url is not None:
        environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, SCRIPT, folder, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=folder)
    result = folder / f"result{options.get('part', '')}.json"
    losses, waited = json.loads(result.read_text()) if result.exists() else ([], 0.0)
    return done.stdout + done.stderr, losses, waited


def _run_folder(folder):
    """The run's own folder: the offline one, where an attempt to go online left one as well."""
    return max((folder / "wandb").glob("*run-*"), key=lambda path: path.name.startswith("offline"))


def sync(folder, url):
    found = _run_folder(folder)
    environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "HOME": str(folder)}
    command = [sys.executable, "-m", "wandb", "sync", "--include-online", str(found)]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120, cwd=folder)


def points(rows):
    """Numbers of a history as (key, step) -> value, without times, and without the end, W&B's summary of a run."""
    found, apart = {}, ("time/", "trainer/", "patterns/", "final/")
    for row in rows:
        step = row.get("trainer/global_step", row.get("step"))
        for key, value in row.items():
            if "/" in key and isinstance(value, float | int) and not key.startswith(apart):
                assert (key, int(step)) not in found, f"{key} twice at step {step}"
                found[key, int(step)] = float(value)
    return found


def csv_points(folder):
    with open(folder / "csv" / "metrics.csv") as file:
        return points([{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)])


def local_points(folder):
    """What the run's own file holds, whether or not it was uploaded."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    (file,) = _run_folder(folder).glob("run-*.wandb")
    for data in read_leveldb_log(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        rows += [items] if "trainer/global_step" in items else []
    return points(rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run: its folder, what the server got, its losses, and how long its training stood still."""
    folder = tmp_path_factory.mktemp("whole")
    with wandb_server() as server:
        output, losses, waited = run(folder, server.url, id="whole")
    assert losses, output
    return folder, server, losses, waited


def test_an_online_run_lands_whole(whole):
    folder, server, _, _ = whole
    assert list(server.runs) == ["whole"]
    found = points(server.history("whole"))
    assert found == pytest.approx(csv_points(folder))
    assert {key for key, _ in found} >= {key for key in EXPECTED if not key.startswith("time/")}
    summary = server.run("whole")["summary"]
    assert summary["final/sparsity"] == pytest.approx(summary["sparsity/total"])
    assert summary["final/sparse_layers"] == 2
    assert summary["patterns/heads"]["nrows"] == 8
    losses = [value for (key, _), value in found.items() if key == "val/loss"]
    assert summary["val/loss"] == pytest.approx({"min": min(losses), "last": losses[-1]})
    assert {"mean", "last"} == summary["time/tokens_per_second"].keys()
    pictures = [name for name in server.files if "media/images/patterns/atlas" in name]
    assert pictures
    assert all(server.files[name].startswith(b"\x89PNG") for name in pictures)
    versions = [a for a in server.artifacts if a["artifactTypeName"] == "attention-pattern"]
    aliases = [{alias["alias"] for alias in version["aliases"]} for version in versions]
    assert aliases[-1] == {"latest", "final"}
    number = server.artifacts.index(versions[-1])
    kept = (folder / "csv" / "attention_pattern.safetensors").read_bytes()
    assert server.files[f"artifacts/A{number}/attention_pattern.safetensors"] == kept


@pytest.mark.parametrize("mode", ["down", "hang", "500", "403"])
def test_no_server_at_the_start_means_offline(whole, tmp_path, mode):
    with wandb_server() as server:
        server.mode = mode
        url = "http://127.0.0.1:9" if mode == "down" else server.url
        output, losses, _ = run(tmp_path, url)
    assert losses == whole[2], output
    assert output.count(TOLD_AT_START) == 1
    assert "W&B cannot be reached" in output
    assert local_points(tmp_path) == pytest.approx(csv_points(tmp_path))


@pytest.mark.parametrize("mode", ["hang", "500", "403", "drop"])
def test_a_server_that_fails_in_mid_run_slows_and_loses_nothing(whole, tmp_path, mode):
    with wandb_server() as server:

        def disturb():
            while not (tmp_path / "paused").exists():
                time.sleep(0.02)
            server.mode = mode
            (tmp_path / "paused").unlink()

        Thread(target=disturb, daemon=True).start()
        output, losses, waited = run(tmp_path, server.url, id="broken", pause_at=4, upload_seconds=2.0, finish=4.0)
        assert losses == whole[2], output
        assert waited < whole[3] + 1.0
        assert output.count(TOLD_LATER) == 1
        assert local_points(tmp_path) == pytest.approx(csv_points(tmp_path))
    with wandb_server() as server:
        sync(tmp_path, server.url)
        assert points(server.history("broken")) == pytest.approx(csv_points(tmp_path))


def test_without_an_account_the_run_is_kept_and_can_be_uploaded(whole, tmp_path):
    output, losses, _ = run(tmp_path, id="later")
    assert losses == whole[2]
    assert output.count(TOLD_AT_START) == 1
    assert "No W&B account is configured" in output
    with wandb_server() as server:
        sync(tmp_path, server.url)
    assert points(server.history("later")) == pytest.approx(points(whole[1].history("whole")))


@pytest.mark.parametrize("stop_at", [7, 9])
def test_a_resumed_run_goes_on_without_doubled_steps(whole, tmp_path, stop_at):
    with wandb_server() as server:
        output, _, _ = run(tmp_path, server.url, id="resumed", save_every=6, stop_at=stop_at, part="1")
        first = points(server.history("resumed"))
        assert max(step for _, step in first) in (stop_at - 2, stop_at - 1), output
        checkpoint = str(next(tmp_path.glob("*step=6.ckpt")))
        output, losses, _ = run(tmp_path, server.url, id="resumed", save_every=6, resume=checkpoint, part="2")
    assert losses == whole[2][6:], output
    assert list(server.runs) == ["resumed"]
    assert points(server.history("resumed")) == pytest.approx(points(whole[1].history("whole")))


def test_two_processes_log_one_run(tmp_path):
    with wandb_server() as server:
        output, losses, _ = run(tmp_path, server.url, id="ddp", trainer={"strategy": "ddp", "devices": 2})
    assert losses, output
    assert list(server.runs) == ["ddp"]
    assert points(server.history("ddp")) == pytest.approx(csv_points(tmp_path))


def test_bad_timeouts_are_refused():
    with pytest.raises(ValueError, match="`init_timeout` must be a positive number of seconds, got 0"):
        FallbackWandbLogger(init_timeout=0)


def test_a_client_that_is_too_old_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(wandb_logger, "_CLIENT", RequirementCache("wandb>=1000"))
    with pytest.raises(ModuleNotFoundError, match="needs the client of W&B: .*'wandb>=1000' not met.*pip install"):
        FallbackWandbLogger()
