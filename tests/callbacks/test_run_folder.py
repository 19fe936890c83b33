import pytest
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from sparse_prune.callbacks.run_folder import filled_folders, run_folder
from support.tiny import TinyModule, batches, pruning, trainer


class Kept(Logger):
    """Like MLflow's: one folder for all runs, which have names and versions."""

    def __init__(self, save_dir, version):
        super().__init__()
        self._save_dir, self._version = save_dir, version

    @property
    def save_dir(self):
        return self._save_dir

    @property
    def name(self):
        return "experiment"

    @property
    def version(self):
        return self._version

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        pass


def folder(path, logger):
    return run_folder(trainer(path, [], logger=logger))


def test_a_run_of_wandb_has_a_folder_of_its_own(tmp_path):
    pytest.importorskip("wandb")
    logger = WandbLogger(project="test", id="abc", save_dir=tmp_path, offline=True)
    assert folder(tmp_path, logger) == tmp_path / "test" / "abc"


def test_a_run_of_any_other_logger_has_one_too(tmp_path):
    assert folder(tmp_path, Kept(tmp_path / "runs", "abc")) == tmp_path / "runs" / "experiment" / "abc"
    assert folder(tmp_path, Kept(tmp_path / "runs", 3)) == tmp_path / "runs" / "experiment" / "version_3"
    assert folder(tmp_path, Kept(None, "abc")) == tmp_path / "experiment" / "abc"


def test_loggers_that_have_a_folder_per_run_keep_it(tmp_path):
    assert folder(tmp_path, TensorBoardLogger(tmp_path, name="board", version=2)) == tmp_path / "board" / "version_2"
    assert folder(tmp_path, False) == tmp_path


def test_folders_that_a_run_will_fill_are_known_before_it(tmp_path):
    loggers = [Kept(tmp_path / "runs", "abc"), CSVLogger(tmp_path, name="csv", version=""), Kept(None, "abc")]
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "kept"), ModelCheckpoint(monitor="loss")]
    found = filled_folders(trainer(tmp_path, callbacks, logger=loggers, enable_checkpointing=True))
    assert found == [tmp_path / "runs", tmp_path / "csv", tmp_path / "kept"]
    assert filled_folders(trainer(tmp_path, [], logger=False)) == [tmp_path]


def test_files_go_with_the_metrics_that_the_report_reads(tmp_path):
    csv = CSVLogger(tmp_path, name="csv", version="")
    assert folder(tmp_path, [Kept(tmp_path, "abc"), csv, CSVLogger(tmp_path, name="second")]) == tmp_path / "csv"


def test_a_second_run_leaves_the_first_one_alone(tmp_path):
    for version in ("first", "second"):
        trainer(tmp_path, [pruning()], steps=2, logger=Kept(tmp_path, version)).fit(TinyModule(), batches())
    for version in ("first", "second"):
        home = tmp_path / "experiment" / version
        assert (home / "attention_pattern.safetensors").is_file()
        assert len(list((home / "pattern_history").iterdir())) == 2
