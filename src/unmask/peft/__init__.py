"""Adds selective fine-tuning to PEFT: ``peft.get_peft_model(base, unmask.peft.SelectiveConfig(budget=...))``.

The import of this package registers the method ``UNMASK`` with PEFT. `peft.PeftModel.from_pretrained` needs the import, too.
"""

# PEFT does not document these parts as public. They were tried with PEFT 0.20 and 0.21.
# - From ``peft.tuners.tuners_utils``: ``BaseTuner``, ``BaseTunerLayer``, ``check_target_module_exists``, ``_ExcludedModule`` and
#   ``_maybe_include_all_linear_layers``; from ``peft.utils.other``: ``AuxiliaryTrainingWrapper`` and
#   ``set_additional_trainable_modules``.
# - The closed enum ``PeftType``, to which `unmask.peft.config.peft_type` adds a member.
# - The methods of ``BaseTuner`` that `SelectiveModel` overrides: ``_pre_injection_hook``, ``_create_and_replace``,
#   ``_enable_adapter_layers``, ``_check_merge_allowed``, ``_get_adapter_state_dict``, ``_remap_adapter_state_dict_for_load``.
# - ``_upload_modified_files`` and ``_ddp_params_and_buffers_to_ignore`` of the `PeftModel`, which `SelectiveModel` sets.
# - ``_active_adapter`` and ``_disable_adapters`` of ``BaseTunerLayer``, which `SelectiveLayer` sets.

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
