"""Adds selective fine-tuning to PEFT: ``peft.get_peft_model(base, unmask.peft.SelectiveConfig(budget=...))``.

The import of this package registers the method ``UNMASK`` with PEFT. `peft.PeftModel.from_pretrained` needs the import, too.
"""

from unmask.errors import need

need("peft", "hf")

from unmask.peft.config import SelectiveConfig, register  # noqa: E402
from unmask.peft.model import SelectiveModel  # noqa: E402
from unmask.peft.verbs import clip_grad_norm_, delta, push_to_hub, status  # noqa: E402

register(SelectiveConfig, SelectiveModel)

__all__ = ["SelectiveConfig", "SelectiveModel", "clip_grad_norm_", "delta", "push_to_hub", "status"]
