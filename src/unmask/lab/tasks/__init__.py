"""Tasks: where examples come from and how predictions are scored. No torch, no transformers."""

from unmask.lab.tasks.tags.ner import NER, load_ner, load_tagged, load_tagged_evaluation
from unmask.lab.tasks.tags.tagged import Sentences, TagData, TagSpec
from unmask.lab.tasks.text.data import Examples, TaskData
from unmask.lab.tasks.text.files import load_evaluation, load_files
from unmask.lab.tasks.text.glue import GLUE, load_glue
from unmask.lab.tasks.text.metrics import compute
from unmask.lab.tasks.text.spec import HubSource, TaskSpec

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
