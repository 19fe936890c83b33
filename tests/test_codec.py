"""What files and checkpoints hold is small and complete, and what they held before is still read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparse_prune import BlockPattern
from sparse_prune.codec import compress, decode, decompress, encode
from sparse_prune.export import load_patterns, read_pattern_file, save_patterns
from sparse_prune.export.history import load_frame, save_frame
from support.fed import feed, pruner

BEFORE = Path(__file__).parent / "files_of_before"
"""Written by the code of before: pruning state by that of commits a0c4729 (version 2) and b9b2e16 (version 3), pattern
file and frame by that of b9b2e16; all of the pruner that `unbroken` leaves after step 5."""
BLOCKS = 6


@given(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.bool, torch.float32, torch.float64]), st.data())
@settings(deadline=None)
def test_what_is_compressed_comes_back_to_the_bit(shape, dtype, data):
    seed = data.draw(st.integers(0, 2**31))
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tensor = (drawn.clamp(min=0) * 1e-300).to(dtype) if dtype != torch.bool else drawn > 0
    back = decompress(compress(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert decompress(tensor) is tensor


def test_bits_and_numbers_are_all_that_is_compressed():
    numbers = torch.rand(3, 8, 8).add(1.0).tril()
    compressed = compress(numbers)
    assert compressed["bits"].nbytes == 3 * 8 * 8 // 8
    assert compressed["values"].nbytes == 3 * 36 * 4
    assert compress(numbers > 0).keys() == {"shape", "bits"}


@given(
    heads=st.integers(1, 3),
    q_len=st.integers(1, 40),
    more=st.integers(0, 20),
    block=st.sampled_from([(4, 4), (8, 4), (4, 16)]),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_patterns_come_back_in_their_order_at_a_bit_per_block(heads, q_len, more, block, causal, seed):
    dense = BlockPattern.dense(heads, q_len, q_len + more, block, causal)
    keep = torch.rand(dense.keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    learned = BlockPattern(keep, block, causal, q_len, q_len + more)
    encoded = encode({"layers.10": learned, "layers.2": dense})
    found = decode(encoded)
    assert list(found) == ["layers.10", "layers.2"]
    assert found["layers.10"].equals(learned)
    assert found["layers.2"].equals(dense)
    assert encoded["layers.10:bits"].nbytes == -(-keep.numel() // 8)


def test_checkpoint_pattern_file_and_frame_hold_a_pattern_alike(tmp_path):
    made = unbroken(until=5)
    state = made.state_dict()["layers"]["b"]["patterns"]
    expected = encode({"b": made.patterns["b"]})
    assert torch.equal(state["in_force:bits"], expected["b:bits"])
    assert torch.equal(state["in_force:shape"], expected["b:shape"])
    path = save_patterns(made.patterns, tmp_path / "patterns.safetensors")
    stored, frame = load_file(path), np.load(save_frame(made.patterns, tmp_path, 5))
    for key, tensor in expected.items():
        assert torch.equal(stored[key], tensor)
        assert (frame[key] == tensor.numpy()).all()


def unbroken(until):
    """A pruner after some steps: layer "a" settles at step 4 and gets its connections back, "b" still moves."""
    made = pruner()
    made.layers["a"].tracker.patience = 1
    for step in range(1, until + 1):
        feed(made, step, BLOCKS).update(step)
        if step == 4:
            made.revert("a")
    return made


@pytest.mark.parametrize("version", [2, 3])
def test_pruning_state_of_before_goes_on(version):
    whole, again = unbroken(until=5), pruner()
    again.load_state_dict(torch.load(BEFORE / f"pruner_version_{version}.pt"))  # probed for step 6, not decided
    assert again.layers["a"].unused_pattern.equals(whole.layers["a"].unused_pattern)
    assert again.update(6) == feed(whole, 6, BLOCKS).update(6)
    assert feed(again, 7, BLOCKS).update(7) == feed(whole, 7, BLOCKS).update(7)
    assert all(again.patterns[name].equals(pattern) for name, pattern in whole.patterns.items())


def test_a_pattern_file_of_before_is_read():
    whole, path = unbroken(until=5), BEFORE / "patterns_version_2.safetensors"
    found, header = read_pattern_file(path)
    assert found.keys() == header["layers"].keys() == {"a", "b"}
    assert all(found[name].equals(pattern) for name, pattern in whole.patterns.items())
    assert load_patterns(path, unused=True)["a"].equals(whole.layers["a"].unused_pattern)


def test_a_frame_of_before_is_read_and_written_alike(tmp_path):
    shutil.copytree(BEFORE / "pattern_history", tmp_path / "pattern_history")
    found, whole = load_frame(tmp_path, 5), unbroken(until=5)
    assert found.keys() == whole.patterns.keys()
    assert all(found[name].equals(pattern) for name, pattern in whole.patterns.items())
    with np.load(tmp_path / "pattern_history" / "step_00000005.npz") as before:
        kept = dict(before.items())
    with np.load(save_frame(whole.patterns, tmp_path, 6)) as now:
        assert list(now.files) == list(kept)
        assert all((now[key] == array).all() and now[key].dtype == array.dtype for key, array in kept.items())
