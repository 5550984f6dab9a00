"""Every task that has a name, and the kind it is of. No torch: ``unmask --help`` and the configuration use it."""

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
"""The kind's name (`unmask.lab.tasks.registry`) by the task's."""
