"""Lists every named task and its kind. ``unmask --help`` and the configuration read it, so it does not import torch."""

from __future__ import annotations

from collections.abc import Mapping

from unmask.lab.tasks.math.problems import ARITHMETIC
from unmask.lab.tasks.tags.ner import CUSTOM_NER, NER
from unmask.lab.tasks.text.glue import GLUE

TASKS: Mapping[str, str] = {
    **dict.fromkeys(sorted(GLUE), "sequence"),
    **dict.fromkeys((*sorted(NER), CUSTOM_NER), "token"),
    **dict.fromkeys(ARITHMETIC, "generation"),
}
"""The name of the task's kind (see `unmask.lab.tasks.registry`) by the name of the task."""
