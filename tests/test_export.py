import pytest
import torch
from safetensors.torch import save_file

from sparse_prune import BlockPattern
from sparse_prune.export import load_patterns, save_patterns


def patterns():
    return {
        "a": BlockPattern(torch.rand(2, 3, 5) < 0.5, (8, 4), False, 24, 20),
        "b": BlockPattern.dense(1, 9, 9, 4, True),
    }


def test_round_trip(tmp_path):
    saved = patterns()
    loaded = load_patterns(save_patterns(saved, tmp_path / "deep" / "p.safetensors"))
    assert loaded.keys() == saved.keys()
    for name, pattern in saved.items():
        assert torch.equal(loaded[name].keep, pattern.keep)
        for field in ("block_size", "causal", "q_len", "kv_len"):
            assert getattr(loaded[name], field) == getattr(pattern, field)


def test_truncated_foreign_missing_and_newer_files_are_refused(tmp_path):
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="pattern file"):
            load_patterns(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(ValueError, match="version"):
        load_patterns(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="format None"):
        load_patterns(path)
    with pytest.raises(FileNotFoundError):
        load_patterns(tmp_path / "none")


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = save_patterns(patterns(), tmp_path / "p.safetensors")
    whole = path.read_bytes()
    monkeypatch.setattr("sparse_prune.export.os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_patterns(patterns(), path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    with pytest.raises(ValueError, match="empty"):
        save_patterns({}, path)
