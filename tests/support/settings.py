"""The configuration of a small run, as a recipe's command line takes it."""


def pruning_callbacks(block, final, patience=1):
    """What every recipe's Trainer holds: history, pruning at every step, the swap to a named backend."""
    schedule = {"class_path": "sparse_prune.CubicSchedule", "init_args": {"final": final, "end_step": 3}}
    pruning = {"sparsity": schedule, "block_size": block, "every_n_steps": 1, "min_delta": 0.5, "patience": patience}
    return [
        {"class_path": "sparse_prune.recipes.base.history.RunHistory"},
        {"class_path": "sparse_prune.callbacks.AttentionPruning", "init_args": pruning},
        {"class_path": "sparse_prune.callbacks.KernelSwap", "init_args": {"backend": "gather"}},
    ]


def run_settings(folder, model, data, callbacks, steps=8, **more):
    """Model, data and a Trainer that logs to CSV below `folder`; `more` stands beside them."""
    csv = {"save_dir": str(folder), "name": "", "version": ""}
    trainer = {
        "accelerator": "cpu",
        "max_steps": steps,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": str(folder),
        "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": csv},
        "callbacks": callbacks,
    }
    return {"seed_everything": 0, "model": model, "data": data, "trainer": trainer, **more}
