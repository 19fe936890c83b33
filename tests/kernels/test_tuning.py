"""Configurations measured on a device are used, kept on disk, and never trusted blindly."""

import json
import logging

import pytest
import torch
from cases import inputs, random_pattern, run
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
from sparse_prune.kernels.triton import tuning  # noqa: E402
from sparse_prune.kernels.triton.attend import plan  # noqa: E402
from sparse_prune.kernels.triton.configs import KERNELS, candidates, launch_config  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATTERN = random_pattern(4, 64, 64, 64, True, 0.9)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tensors():
    return tuple(t.detach().to(DEVICE, torch.float16).requires_grad_() for t in inputs(1, 4, 2, 64, 64, 16))


def tune(times=None):
    """With a clock that finds the candidates slower and slower, except for the third one."""
    launches = []

    def measure(launch):
        launch()
        launches.append(launch)
        return 0.5 if len(launches) % 3 == 0 else float(len(launches))

    return tuning.tune(*tensors(), PATTERN, measure), launches


def test_the_fastest_candidate_is_taken_and_kept():
    before = plan(PATTERN, 16, torch.float16, DEVICE)[1]
    found, launches = tune()
    assert len(launches) >= 3 * len(KERNELS)
    for kernel in KERNELS:
        shipped = launch_config(kernel, 90, 16, torch.float16, (64, 64))
        assert found[kernel] in candidates(kernel, 90, 16, torch.float16, (64, 64))
        assert found[kernel] != shipped
    after = plan(PATTERN, 16, torch.float16, DEVICE)[1]
    assert after == [n for k in KERNELS for n in (*found[k].tile, found[k].num_warps, found[k].num_stages)]
    assert before != after
    again, launches = tune()
    assert again == found
    assert not launches


def test_the_tuned_kernels_compute_the_same():
    args = tensors()
    before = run(args, PATTERN, None, "triton")
    tune()
    for a, b in zip(before, run(args, PATTERN, None, "triton"), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_another_process_finds_them_on_disk(monkeypatch):
    found, _ = tune()
    monkeypatch.setattr(tuning, "_KNOWN", {})
    assert tuning.tuned("dq", PATTERN, 16, torch.float16, DEVICE) == found["dq"]
    assert tuning.tuned("dq", PATTERN, 16, torch.bfloat16, DEVICE) is None
    assert tuning.tuned("dq", random_pattern(4, 64, 64, 32, True), 16, torch.float16, DEVICE) is None
    assert tuning.tuned("dq", random_pattern(4, 640, 640, 64, True), 16, torch.float16, DEVICE) is None
    entries = json.loads(tuning.cache_file().read_text())["entries"]
    assert all(torch.__version__ in key for key in entries)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"entries": {"a": [7, 16, 4, 2]}}', '{"entries": {"a": "x"}}', "\x00"]
)
def test_a_broken_file_is_reported_and_written_anew(folder, text, caplog):
    folder.mkdir()
    (folder / "triton_tuning.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        found, _ = tune()
    assert json.loads((folder / "triton_tuning.json").read_text())["entries"].keys() >= {*()}
    assert tuning.tuned("dq", PATTERN, 16, torch.float16, DEVICE) == found["dq"]
    assert "a" not in json.loads((folder / "triton_tuning.json").read_text())["entries"]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_PRUNE_CACHE_DIR", str(tmp_path / "file"))
    found, _ = tune()
    assert "cannot be kept" in caplog.text
    assert tuning.tuned("dq", PATTERN, 16, torch.float16, DEVICE) == found["dq"]


def test_candidates_that_do_not_fit_the_device_are_passed_over():
    from triton.runtime.errors import OutOfResources

    def measure(launch):
        raise OutOfResources(2, 1, "shared memory")

    with pytest.raises(ValueError, match="No configuration of the forward kernel fits"):
        tuning.tune(*tensors(), PATTERN, measure)


@given(
    st.sampled_from(KERNELS),
    st.sampled_from([80, 90, 100]),
    st.integers(1, 256),
    st.sampled_from([torch.float16, torch.float32]),
    st.sampled_from([(16, 16), (48, 16), (64, 64), (128, 64), (128, 128)]),
)
def test_every_candidate_divides_the_block(kernel, capability, dim, dtype, block):
    found = candidates(kernel, capability, dim, dtype, block)
    assert found[0] == launch_config(kernel, capability, dim, dtype, block)
    assert len(set(found)) == len(found)
    assert all(not block[0] % c.tile[0] and not block[1] % c.tile[1] and min(c.tile) >= 16 for c in found)
