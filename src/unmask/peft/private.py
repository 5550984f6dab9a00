"""Imports the parts of PEFT that PEFT does not document as public; the other modules take them from here.

They were tried with PEFT 0.20 and 0.21. Besides the names below, unmask relies on these private parts:

- `unmask.peft.config.peft_type` adds a member to the closed enum ``PeftType``.
- `SelectiveModel` overrides the methods of ``BaseTuner`` that PEFT calls: ``_pre_injection_hook``, ``_create_and_replace``,
  ``_enable_adapter_layers``, ``_check_merge_allowed``, ``_get_adapter_state_dict`` and
  ``_remap_adapter_state_dict_for_load``; and it sets ``_upload_modified_files`` and ``_ddp_params_and_buffers_to_ignore`` of
  the `PeftModel`.
- `SelectiveLayer` sets ``_active_adapter`` and ``_disable_adapters`` of ``BaseTunerLayer``.
"""

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules

__all__ = [
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "_ExcludedModule",
    "_maybe_include_all_linear_layers",
    "check_target_module_exists",
    "set_additional_trainable_modules",
]
