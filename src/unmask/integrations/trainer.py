"""Trains a selection with transformers' Trainer, or any subclass of it (TRL's too), in one process or in several.

`SelectiveCallback` takes over what a Trainer does with trainable parameters: the optimizer, clipping, checkpoints (of O(B)
bytes) and resuming. All else (accumulation, precision, logging, evaluation, data order, RNG) stays the Trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from unmask.errors import ConfigError, MethodError, ScheduleNotRunError, SelectionError
from unmask.gradients.wrappers import bare
from unmask.integrations.checkpoints import STATE_FILE
from unmask.integrations.support import (
    Attempt,
    check_run,
    clip_in,
    keep_unwrapped,
    new_optimizer,
    open_inputs,
    unwrapped,
)
from unmask.integrations.trainer_checkpoints import WholeCheckpoints, state_to_resume
from unmask.methods.method import Method
from unmask.selection.select import select
from unmask.selection.selection import Selection
from unmask.selection.state import read_state, write_state

Selective = Selection | Method | Callable[[int], Method]


class SelectiveCallback(WholeCheckpoints):
    """Makes a Trainer of any kind train a selection: ``trainer.add_callback(SelectiveCallback(trainer, method))``.

    The callback takes over:

    - The optimizer, unless the Trainer was given one: ``args.optim`` on ``selection.parameters()``. All selected weights are
      one parameter, so ``args.weight_decay`` holds for all of them.
    - ``args.max_grad_norm``: by the norm of what is trained, or of the whole gradient under ``clip_scope="all"``.
    - Checkpoints: they hold the selection's state (``selection.safetensors``), the optimizer's, the schedule's and the RNG's,
      and no weights. A resumed run is bitwise the uninterrupted one. Each is whole or not there; see `WholeCheckpoints`.
      ``trainer.save_model()`` still saves an ordinary model.
    - A second attempt in one run (``auto_find_batch_size``, or ``train()`` after an exception): it starts from the base weights.
    - The random numbers of evaluation: it draws none that training would draw, since a resumed run may not evaluate again.

    Args:
        trainer: The Trainer, built. The selection is made from its model.
        selective: The method to train by; or a function from T, the number of optimizer steps that the Trainer will make,
            to a method (``lambda steps: unmask.id3(320_000, steps)``), so that the schedule fits the run; or a live
            selection, if you built the optimizer yourself: ``Trainer(..., optimizers=(optimizer, None))``.
        **options: The options of `unmask.select` (``include``, ``exclude``, ``dense``, ``new``, ``accumulation``,
            ``gradients``, ``clip_scope``), unless a selection is given.

    Attributes:
        selection: The selection; None until ``train()`` makes it. It stays live until you release it.

    Raises:
        ConfigError: Options are given together with a selection; from ``train()``: an ``args.optim`` chooses its own parameters.
        SelectionError: From ``train()``: the model is not the selection's, or it has trained to the end already; or the
            checkpoint to resume from is damaged, mixed or of another run.
        WriteError: From ``train()``: a checkpoint cannot be written; the one before is kept.
        ScheduleNotRunError: From ``train()``: the callback was not added, the optimizer or the learning-rate schedule does not
            belong to the selection, the run is too short for the schedule, or a step did not advance it.
    """

    _replaced = (*WholeCheckpoints._replaced, "create_optimizer", "evaluate", "_save", "_load_best_model")

    def __init__(self, trainer: Trainer, selective: Selective, **options: Any) -> None:
        if isinstance(selective, Selection) and options:
            raise ConfigError(f"a selection is made already; give {', '.join(options)} to unmask.select.")
        # accelerate's own configuration may ask for FSDP or DeepSpeed, too
        asked = trainer.args.fsdp or trainer.args.deepspeed
        if asked or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise SelectionError(
                "TrainingArguments or accelerate's configuration ask for FSDP or DeepSpeed, which take the model apart after "
                "unmask.select(). Leave them out: under torchrun the selection reduces its own gradients. To shard a model, see "
                "docs/distributed.md."
            )
        super().__init__(trainer)
        self.selection: Selection | None = selective if isinstance(selective, Selection) else None
        self._selective, self._options = selective, options
        self._attempt: Attempt[dict[str, Any]] | None = None  # it holds the selection's state at its start
        self._builds: bool | None = None  # True if this callback makes the optimizer; None until that is known
        self._checkpointing = self._finished = self._opened = False
        self._step = self._advanced = self._skipped = 0
        keep_unwrapped(trainer)
        clip_in(trainer, lambda parameters: (self.live, ()))  # the model's own parameters are frozen

    @property
    def live(self) -> Selection:
        """The selection, once it is made.

        Raises:
            SelectionError: ``train()`` has not started yet.
        """
        if self.selection is None:
            raise SelectionError("the selection is made by trainer.train(); there is none yet.")
        return self.selection

    # A run, and its attempts.

    def _train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self not in self.trainer.callback_handler.callbacks:
            raise ScheduleNotRunError(
                "SelectiveCallback was built but not added: trainer.add_callback(SelectiveCallback(trainer, ...))."
            )
        if self._finished and not resume_from_checkpoint and self.trainer.model_init is None:
            raise SelectionError(
                f"this Trainer has trained to the end of its run ({self.live}); a further train() would start the schedule "
                "again, on trained weights. Take selection.delta() and build a new Trainer, or give resume_from_checkpoint=."
            )
        return super()._train(resume_from_checkpoint, *args, **kwargs)

    def _set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Begins an attempt, as soon as the Trainer knows how many steps it will make.

        It selects, or goes back to where the first attempt started; then it continues a checkpoint, if there is one.
        """
        values = super()._set_initial_training_values(*args, **kwargs)
        steps, model = int(values[-1]), cast(nn.Module, self.trainer.model)
        # A Trainer with model_init has made a new model for this attempt; the last model keeps its trained weights.
        if self._attempt is not None and (self.trainer.model_init is None or self.live.model is bare(model)):
            if self._builds:
                self.trainer.optimizer = None  # `_create_optimizer` builds a new one
            self.live.load_state_dict(self._attempt.undo())
            for parameter in self.live.parameters():
                parameter.grad = None
        if not isinstance(self._selective, Selection):
            if self.selection is not None:
                self.selection.release()
                self.selection = self._attempt = None
            given = self._selective
            method = given if isinstance(given, Method) else given(steps) if callable(given) else None
            if not isinstance(method, Method):
                raise MethodError(
                    f"SelectiveCallback was given {given!r}; give a method (unmask.id3(...)), a function from the number of "
                    "steps to a method, or a selection."
                )
            self.selection = select(model, method, **self._options)
        check_run(self.trainer, self.live, steps)
        self._attempt = Attempt(self.trainer, (), self.live.state_dict())
        if self.resumed is not None:
            self.live.load_state_dict(state_to_resume(self.resumed, self.live, steps))
        self._finished = False
        self._opened = open_inputs(self.trainer) or self._opened
        return values

    def _create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self._builds is None:
            self._builds = self.trainer.optimizer is None
        if self._builds:
            self.trainer.optimizer = new_optimizer(self.trainer, self.live)
        held = [p for group in unwrapped(self.trainer.optimizer).param_groups for p in group["params"]]
        if not any(p is self.live.pacing_parameter() for p in held):
            raise ScheduleNotRunError(
                "the Trainer's optimizer does not hold the selected weights (it was built before unmask.select, or from "
                "model.parameters()). Select first and build it from selection.parameters(), or give none: "
                "SelectiveCallback builds the one that args.optim names."
            )
        return self.trainer.optimizer

    # Checkpoints and evaluation.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._checkpointing = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._checkpointing = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self._checkpointing:  # the user has called save_model()
            self._originals["_save"](output_dir, state_dict)
        elif self.trainer.args.should_save:
            folder = Path(output_dir or str(self.trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_state(self.live.state_dict(), folder / STATE_FILE)
            torch.save(self.trainer.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Remembers the checkpoint, and refuses one that is not whole; `_set_initial_training_values` loads it.

        The Trainer loads weights before it knows its number of steps, and the method may depend on that number.
        """
        self.remember(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.live.load_state_dict(read_state(Path(str(self.trainer.state.best_model_checkpoint), STATE_FILE)))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return self._originals["evaluate"](*args, **kwargs)

    # The Trainer's events.

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._step, self._advanced, self._skipped = self.live.step, 0, 0
        driven = unwrapped(getattr(kwargs.get("lr_scheduler"), "optimizer", None))
        if driven is not None and driven is not unwrapped(kwargs.get("optimizer")):
            raise ScheduleNotRunError(
                "the learning-rate schedule drives another optimizer than the one that trains; build it from the optimizer "
                "given in Trainer(..., optimizers=(optimizer, schedule)), or give None for it."
            )

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.live.step > self._step:
            self._step, self._advanced = self.live.step, self._advanced + 1
        elif self.trainer.accelerator.scaler is None:
            raise ScheduleNotRunError(
                f"optimizer step {self.trainer.state.global_step} of the Trainer did not reach the selection, which is still "
                f"at step {self.live.step}: its optimizer is no torch.optim.Optimizer, or it did not step."
            )
        else:  # GradScaler skipped the step for an overflow
            self._skipped += 1
            for parameter in self.live.parameters():
                parameter.grad = None  # the Trainer's model.zero_grad() does not reach it

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._opened:
            cast(Any, self.trainer.model).disable_input_require_grads()
            self._opened = False
        self._finished = True
        if self._skipped and not self._advanced:
            raise ScheduleNotRunError(
                f"the run is over, and its schedule never advanced: each of its {self._skipped} steps was skipped for an "
                "overflow. Lower the loss scale or the learning rate, or train in bf16."
            )


class SelectiveTrainer(Trainer):
    """A Trainer that makes its `SelectiveCallback` itself.

    Under torchrun the selection reduces the gradients: the model is not wrapped in DDP.

    Args:
        selection: A selection (then build ``optimizers`` from ``selection.parameters()``), a method, or a function from the
            number of steps to a method; see `SelectiveCallback`.
        settings: JSON values that go into each checkpoint's manifest.
        *args: The arguments of ``transformers.Trainer``.
        **kwargs: Its keyword arguments.

    Raises:
        SelectionError: The arguments ask for FSDP or DeepSpeed.

    Example:
        ``SelectiveTrainer(model=model, selection=selection, args=args, train_dataset=data, optimizers=(optimizer, None))``
    """

    def __init__(
        self, *args: Any, selection: Selective, settings: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        model: Any = kwargs.get("model", args[0] if args else None)
        if isinstance(selection, Selection):
            model = selection.model
        # A Trainer accepts a quantised model only with adapters; the selection's sidecars pass for these meanwhile.
        passes = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
        if passes:
            model._hf_peft_config_loaded = True
        try:
            super().__init__(*args, **kwargs)
        finally:
            if passes:
                del model._hf_peft_config_loaded
        self._selective = SelectiveCallback(self, selection)
        self._selective.settings = settings or {}
        self.add_callback(self._selective)

    @property
    def selection(self) -> Selection:
        """The selection; ``train()`` makes it where a method was given."""
        return self._selective.live
