"""Loaders that go on where a checkpoint left them."""

import pytest
import torch

from sparse_prune.recipes.base.loader import ResumableDataLoader


class Counted(torch.utils.data.Dataset):
    """Numbers, and which of them were made in this process."""

    def __init__(self):
        self.made = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.made.append(index)
        return torch.tensor(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_its_middle(workers):
    def loader(data):
        return ResumableDataLoader(data, batch_size=2, num_workers=workers, persistent_workers=workers > 0)

    whole = [batch.tolist() for batch in loader(Counted())]
    assert whole == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    broken = loader(Counted())
    batches = iter(broken)
    first = [next(batches).tolist() for _ in range(2)]
    state = broken.state_dict()  # workers have made more than was served
    data = Counted()
    other = loader(data)
    other.load_state_dict(state)
    assert first + [batch.tolist() for batch in other] == whole
    assert data.made == ([] if workers else [4, 5, 6, 7, 8, 9])  # what was served is not made again
    for _ in range(2):
        assert [batch.tolist() for batch in other] == whole
    # A checkpoint of a resumed epoch counts from its beginning.
    other.load_state_dict(state)
    next(iter(other))
    assert other.state_dict() == {"served": 3}
    assert [batch.tolist() for batch in broken] == whole  # an epoch that was left starts anew
