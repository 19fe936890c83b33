"""Configurations measured on a device are used, kept on disk, and never trusted blindly."""

import inspect
import json
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_prune.kernels import AttentionOptions
from support.cases import inputs, random_pattern, run

pytest.importorskip("triton")
from sparse_prune.kernels.triton import tuning  # noqa: E402
from sparse_prune.kernels.triton.attend import plan  # noqa: E402
from sparse_prune.kernels.triton.configs import (  # noqa: E402
    KERNELS,
    Call,
    LaunchConfig,
    Traits,
    candidates,
    device_class,
    launch_config,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATTERN = random_pattern(4, 64, 64, 64, True, 0.9)
CALL = Call(16, torch.float16, (64, 64))
MASKED = AttentionOptions(attn_mask=torch.ones(1, 1, 64, 64, dtype=torch.bool, device=DEVICE))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors():
    return tuple(t.detach().to(DEVICE, torch.float16).requires_grad_() for t in inputs(1, 4, 2, 64, 64, 16))


def planned():
    return plan(PATTERN, 16, torch.float16, DEVICE, Traits(), kv_heads=2, batch=1)


def tune(options=None):
    """With a clock that finds the candidates slower and slower, except for the third one."""
    launches = []

    def measure(launch):
        launch()
        launches.append(launch)
        return 0.5 if len(launches) % 3 == 0 else float(len(launches))

    return tuning.tune(*tensors(), PATTERN, options, measure), launches


def test_the_fastest_candidate_is_taken_and_kept():
    before = planned()[1]
    found, launches = tune()
    assert len(launches) >= 3 * len(KERNELS)
    for kernel in KERNELS:
        shipped = launch_config(kernel, 90, CALL)
        assert found[kernel] in candidates(kernel, 90, CALL)
        assert found[kernel] != shipped
    after = planned()[1]
    assert after == [n for k in KERNELS for n in found[k].numbers()]
    assert before != after
    again, launches = tune()
    assert again == found
    assert not launches


def test_a_limit_breaks_off_and_the_next_run_goes_on(monkeypatch, caplog):
    clock, launches = [0.0], []
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])

    def measure(launch):
        """A second each, and each faster than the one before."""
        clock[0] += 1.0
        launches.append(inspect.getclosurevars(launch).nonlocals["config"])
        return -float(len(launches))

    assert tuning.tune(*tensors(), PATTERN, measure=measure, seconds=0.0) == {}
    with caplog.at_level("INFO"):
        first = tuning.tune(*tensors(), PATTERN, measure=measure, seconds=10.0)
    assert len(launches) == 11  # the last one began within the limit
    tried = {kernel: candidates(kernel, 90, CALL) for kernel in KERNELS}
    assert first["forward"] == tried["forward"][3]
    assert f"forward: {len(tried['forward']) - 4} configurations are left for the next run to measure." in caplog.text
    assert tuning.tuned("forward", PATTERN, CALL, DEVICE) == first["forward"]
    launches.clear()
    monkeypatch.setattr(tuning, "_KNOWN", {})  # another process
    last = tuning.tune(*tensors(), PATTERN, measure=measure)
    assert launches[: len(tried["forward"]) - 3] == tried["forward"][3:]
    assert last == {kernel: tried[kernel][-1] for kernel in KERNELS}
    launches.clear()
    assert tuning.tune(*tensors(), PATTERN, measure=measure) == last
    assert not launches


def test_the_tuned_kernels_compute_the_same():
    args = tensors()
    before = run(args, PATTERN, None, "triton")
    tune()
    for a, b in zip(before, run(args, PATTERN, None, "triton"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_the_file_has_a_place_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    tuning._cache_file.cache_clear()
    assert tuning.cache_file().parent == tmp_path / "cache"
    monkeypatch.delenv("SPARSE_PRUNE_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tuning.tempfile, "gettempdir", lambda: str(tmp_path))
    assert tuning.cache_file() == tmp_path / ".cache" / "sparse_prune" / "triton_tuning.json"
    tuning._cache_file.cache_clear()


def test_another_process_finds_them_on_disk(monkeypatch):
    found, _ = tune()
    monkeypatch.setattr(tuning, "_KNOWN", {})
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) == found["dq"]
    others = ({"dtype": torch.bfloat16}, {"block_size": (32, 32)}, {"masks": 2}, {"softcap": True}, {"dropout": True})
    for other in others:
        assert tuning.tuned("dq", PATTERN, CALL._replace(**other), DEVICE) is None
    assert tuning.tuned("dq", random_pattern(4, 640, 640, 64, True), CALL, DEVICE) is None
    entries = json.loads(tuning.cache_file().read_text())["entries"]
    assert all(torch.__version__ in key for key in entries)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"entries": {"a": [7, 16, 4, 2, 1, 1]}}', '{"entries": {"a": "x"}}', "\x00"]
)
def test_a_broken_file_is_reported_and_written_anew(folder, text, caplog):
    folder.mkdir()
    (folder / "triton_tuning.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        found, _ = tune()
    assert ("cannot be read" in caplog.text) is ("[7, 16" not in text)  # an unsound entry is left out alone
    written = json.loads((folder / "triton_tuning.json").read_text())["entries"]
    assert sorted(entry[:-1] for entry in written.values()) == sorted(config.numbers() for config in found.values())
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) == found["dq"]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path / "file"))
    found, _ = tune()
    assert "cannot be written" in caplog.text
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) == found["dq"]


def test_what_another_process_measures_is_seen_at_the_next_call():
    """Under DDP the first rank measures for all: the others have looked before, and look again."""
    before, other = planned()[1], LaunchConfig((16, 32), 4, 2)
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) is None
    writer = (
        "import json, sys; from pathlib import Path; path = Path(sys.argv[1]); path.parent.mkdir(exist_ok=True);"
        "path.write_text(json.dumps({'entries': {sys.argv[2]: [16, 32, 4, 2, 1, 99]}}))"
    )
    key = tuning._key("dq", PATTERN, CALL, DEVICE)
    subprocess.run([sys.executable, "-c", writer, tuning.cache_file(), key], check=True)
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) == other
    after = planned()[1]
    assert after == [*before[:5], 16, 32, 4, 2, 1, *before[10:]]
    found, launches = tune()
    assert found["dq"] == other
    assert launches


def test_a_plan_is_made_once(monkeypatch):
    """Names of devices, paths and keys cost as much as a launch: they are not put together at every call."""
    first = planned()
    monkeypatch.setattr(tuning, "_key", lambda *a: pytest.fail("planned again"))
    again = planned()
    assert again[1] == first[1]
    assert all(a is b for a, b in zip(first[0], again[0], strict=True))
    assert again[0] is not first[0]


def test_calls_are_tuned_with_their_own_masks():
    """A mask takes shared memory: what won without one need not fit with it."""
    given = []

    def measure(launch):
        given.append(inspect.getclosurevars(launch).nonlocals["options"])
        return 1.0

    found = tuning.tune(*tensors(), PATTERN, MASKED, measure)
    assert all(options is MASKED for options in given)
    assert tuning.tuned("dq", PATTERN, CALL, DEVICE) is None
    assert tuning.tuned("dq", PATTERN, CALL._replace(masks=2), DEVICE) == found["dq"]


def test_candidates_that_do_not_fit_the_device_are_passed_over():
    from triton.runtime.errors import OutOfResources

    def measure(launch):
        raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(ValueError, match="must fit a configuration of the forward kernel"):
        tuning.tune(*tensors(), PATTERN, measure=measure)


def test_a_candidate_that_the_compiler_fails_on_is_left_out(caplog):
    """But not the shipped one: a kernel that never compiles must not look tuned."""
    calls, broken = [], 1

    def measure(launch):
        calls.append(launch)
        if len(calls) == broken:
            raise RuntimeError("PassManager::run failed")
        return float(len(calls))

    with pytest.raises(RuntimeError, match="PassManager"):
        tuning.tune(*tensors(), PATTERN, measure=measure)
    calls, broken = [], 2
    found = tuning.tune(*tensors(), PATTERN, measure=measure)
    assert found["forward"] == launch_config("forward", 90, CALL)
    assert "RuntimeError: PassManager" in caplog.text


@given(
    st.sampled_from(KERNELS),
    st.sampled_from([75, 80, 86, 90, 100, 120]),
    st.builds(
        Call,
        st.integers(1, 256),
        st.sampled_from([torch.float16, torch.float32]),
        st.sampled_from([(16, 16), (48, 16), (64, 64), (128, 64), (128, 128)]),
        st.integers(0, 15),
        st.booleans(),
        st.booleans(),
    ),
)
def test_every_candidate_divides_the_block(kernel, capability, call):
    found = candidates(kernel, capability, call)
    assert found[0] == launch_config(kernel, capability, call)
    assert len(set(found)) == len(found)
    sides = call.block_size
    assert all(not sides[0] % c.tile[0] and not sides[1] % c.tile[1] and min(c.tile) >= 16 for c in found)


def test_a_device_takes_the_entries_of_its_memory():
    """8.6, 8.9 and 12.x have 99 KiB: what an A100 or an H100 takes does not fit them."""
    assert [device_class(n) for n in (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)] == [
        89, 80, 89, 80, 89, 90, 90, 90, 90, 89, 89,
    ]  # fmt: skip
