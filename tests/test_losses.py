import pytest

from sparse_prune.losses import find_loss, loss_keys


@pytest.mark.parametrize(
    ("stage", "logged", "key"),
    [
        ("training", {"train/loss", "train_loss"}, "train/loss"),
        ("training", {"train_loss", "val_loss"}, "train_loss"),
        ("training", {"train_loss_epoch", "train_loss_step"}, "train_loss_step"),
        ("training", {"training/loss"}, "training/loss"),
        ("training", {"loss", "my_loss"}, "loss"),
        ("validation", {"loss", "val_loss_step", "val_loss_epoch"}, "val_loss_epoch"),
        ("validation", {"valid/loss"}, "valid/loss"),
        ("validation", {"validation_loss"}, "validation_loss"),
        ("validation", {"train_loss", "val_accuracy"}, None),
        ("test", {"test_loss", "val_loss"}, "test_loss"),
        ("test", {}, None),
    ],
)
def test_a_loss_is_found_under_the_names_of_the_rule(stage, logged, key):
    assert find_loss(stage, logged) == key


def test_no_key_belongs_to_two_stages():
    keys = [key for stage in ("training", "validation", "test") for key in loss_keys(stage)]
    assert len(set(keys)) == len(keys)
