"""Tasks: where examples come from and how predictions are scored. No torch, no transformers."""

from unmask.tasks.data import Examples, TaskData, TaskSpec
from unmask.tasks.files import load_evaluation, load_files
from unmask.tasks.glue import GLUE, load_glue
from unmask.tasks.metrics import compute

__all__ = ["GLUE", "Examples", "TaskData", "TaskSpec", "compute", "load_evaluation", "load_files", "load_glue"]
