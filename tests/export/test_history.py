"""Frames of the history have the layout that they always had."""

import numpy as np

from sparse_prune.export.history import load_frame, save_frame
from sparse_prune.fixed_patterns import random_pattern


def test_a_frame_keeps_its_layout(tmp_path):
    pattern = random_pattern(3, 53, 16, density=0.5)
    bits, shape = np.packbits(pattern.keep.numpy()), np.array([3, 4, 4, 16, 16, 1, 53, 53])
    with np.load(save_frame({"layer": pattern}, tmp_path, 7)) as stored:
        assert stored["layer:bits"].dtype == np.uint8
        assert (stored["layer:bits"] == bits).all()
        assert (stored["layer:shape"] == shape).all()
    # As the first version of this library wrote it.
    np.savez_compressed(tmp_path / "pattern_history" / "step_00000008.npz", **{"a:bits": bits, "a:shape": shape})
    assert load_frame(tmp_path, 8)["a"].equals(pattern)
