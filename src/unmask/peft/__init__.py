"""Adds selective fine-tuning to PEFT: ``peft.get_peft_model(base, unmask.peft.SelectiveConfig(budget=...))``.

The import of this package registers the method ``UNMASK`` with PEFT. `peft.PeftModel.from_pretrained` needs the import, too.
"""

# These parts of PEFT are not documented as public. They were tried with PEFT 0.20 and 0.21.
# - All that is imported from ``peft.tuners.tuners_utils`` and ``peft.utils.other``.
# - The closed enum ``PeftType``, to which `unmask.peft.config.peft_type` adds a member.
# - The methods of ``BaseTuner`` that `SelectiveModel` overrides and PEFT calls, and the two attributes of the `PeftModel` that it
#   sets: ``_upload_modified_files`` and ``_ddp_params_and_buffers_to_ignore``.
# - ``_active_adapter`` and ``_disable_adapters`` of ``BaseTunerLayer``.

from unmask.errors import need

need("peft", "hf")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.utils import register_peft_method  # noqa: E402

from unmask.peft.config import NAME, PREFIX, SelectiveConfig, peft_type  # noqa: E402
from unmask.peft.model import SelectiveModel  # noqa: E402
from unmask.peft.verbs import clip_grad_norm_, delta, push_to_hub, status  # noqa: E402

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name=NAME.lower(), config_cls=SelectiveConfig, model_cls=SelectiveModel, prefix=PREFIX)

__all__ = ["SelectiveConfig", "SelectiveModel", "clip_grad_norm_", "delta", "push_to_hub", "status"]
