"""Synthetic tasks that need far context, after RULER's description (Hsieh et al., arXiv:2404.06654), in own words."""

from importlib import import_module
from pkgutil import iter_modules

from sparse_prune.evaluation.tasks.task import Example, Question, Task, build

TASKS: dict[str, Task] = {
    task.name: task
    for module in iter_modules(__path__)
    for task in getattr(import_module(f"{__name__}.{module.name}"), "FAMILY", ())
}
"""Every task by name. A new file with a tuple `FAMILY` of tasks is found by itself."""

__all__ = ["TASKS", "Example", "Question", "Task", "build"]
