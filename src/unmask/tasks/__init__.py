"""Tasks: where examples come from and how predictions are scored. No torch, no transformers."""

from unmask.tasks.data import Examples, TaskData
from unmask.tasks.files import load_evaluation, load_files
from unmask.tasks.glue import GLUE, load_glue
from unmask.tasks.metrics import compute
from unmask.tasks.ner import NER, load_ner, load_tagged, load_tagged_evaluation
from unmask.tasks.spec import HubSource, TaskSpec
from unmask.tasks.tagged import Sentences, TagData, TagSpec

__all__ = [
    "GLUE",
    "NER",
    "Examples",
    "HubSource",
    "Sentences",
    "TagData",
    "TagSpec",
    "TaskData",
    "TaskSpec",
    "compute",
    "load_evaluation",
    "load_files",
    "load_glue",
    "load_ner",
    "load_tagged",
    "load_tagged_evaluation",
]
