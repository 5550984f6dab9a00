"""Tasks: where examples come from and how predictions are scored. No torch, no transformers."""

from unmask.tasks.data import Examples, TaskData
from unmask.tasks.files import load_evaluation, load_files
from unmask.tasks.glue import GLUE, load_glue
from unmask.tasks.metrics import compute
from unmask.tasks.spec import HubSource, TaskSpec

__all__ = [
    "GLUE",
    "Examples",
    "HubSource",
    "TaskData",
    "TaskSpec",
    "compute",
    "load_evaluation",
    "load_files",
    "load_glue",
]
