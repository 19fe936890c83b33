"""A score of the backward pass says on two ranks what it says on one process with the batches of both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_prune import Influence
from support.tiny import TinyModule, batches, pruning, trainer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_influence_is_that_of_the_whole_batch(tmp_path, kind):
    callback = pruning(score=Influence())
    trainer(tmp_path, [callback], steps=1).fit(TinyModule(), batches(batch_size=4))
    command = [sys.executable, Path(__file__).with_name("score_run.py"), tmp_path, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{kind}{rank}.pt") for rank in (0, 1))
    for name, state in callback.pruner.layers.items():
        alone = state.scores.value()
        assert torch.equal(first[name], second[name])
        known = alone.isfinite()
        assert float((first[name] - alone)[known].abs().max()) < 1e-3 * float(alone[known].abs().max())
