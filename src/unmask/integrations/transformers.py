"""transformers' Trainer on a selection: clipping, checkpoints of O(B) bytes, exact resume, several processes.

Everything else (accumulation, precision, logging, evaluation, data order, RNG) is the Trainer's own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from unmask.errors import SelectionError
from unmask.selection import Selection
from unmask.state_file import read_state, write_state

STATE_FILE = "selection.safetensors"


class SelectiveTrainer(Trainer):
    """A Trainer whose model has a live selection.

    Args:
        selection: From `unmask.select` on the same model. ``optimizers`` must be built from ``selection.parameters()``.
        *args: As for ``transformers.Trainer``.
        **kwargs: As for ``transformers.Trainer``.

    Under torchrun the selection reduces the gradients: the model is not wrapped in DDP.

    Raises:
        SelectionError: The arguments ask for FSDP or DeepSpeed.

    Example:
        ``SelectiveTrainer(model=model, selection=selection, args=args, train_dataset=data, optimizers=(optimizer, None))``
    """

    def __init__(self, *args: Any, selection: Selection, **kwargs: Any) -> None:
        self.selection = selection
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Clips the norm of what the selection trains; the model's own parameters are frozen, and DDP has nothing to do."""
        super().create_accelerator_and_postprocess()
        asked = self.args.fsdp or self.args.deepspeed
        if asked or self.is_fsdp_enabled or self.is_deepspeed_enabled:  # accelerate's own configuration may ask too
            raise SelectionError(
                "TrainingArguments or accelerate's configuration ask for FSDP or DeepSpeed, which take the model apart after "
                "unmask.select(). Leave them out: under torchrun the selection reduces its own gradients. To shard a model, see "
                "docs/distributed.md."
            )
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        clip = self.accelerator.clip_grad_norm_

        def clip_selected(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            return clip(self.selection.parameters(), max_norm, norm_type)

        self.accelerator.clip_grad_norm_ = clip_selected

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, but draws no random number that training would draw: a resumed run may not evaluate again."""
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_state(self.selection.state_dict(), folder / STATE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.selection.load_state_dict(read_state(Path(resume_from_checkpoint, STATE_FILE)))

    def _load_best_model(self) -> None:
        self.selection.load_state_dict(read_state(Path(str(self.state.best_model_checkpoint), STATE_FILE)))
