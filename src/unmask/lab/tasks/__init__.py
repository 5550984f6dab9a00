"""Tasks: they load examples, and score predictions. Loading needs neither torch nor transformers."""

from unmask.lab.tasks.hub import HubSource
from unmask.lab.tasks.tags.ner import NER, load_ner, load_tagged, load_tagged_evaluation
from unmask.lab.tasks.tags.spec import Sentences, TagData, TagSpec
from unmask.lab.tasks.text.files import load_evaluation, load_files
from unmask.lab.tasks.text.glue import GLUE, load_glue
from unmask.lab.tasks.text.metrics import compute
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec

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
