"""transformers' Trainer, and any subclass of it (TRL's too), on a selection, in one process or several.

`SelectiveCallback` takes over what a Trainer does with trainable parameters: the optimizer, clipping, checkpoints (of O(B)
bytes), resuming. Everything else (accumulation, precision, logging, evaluation, data order, RNG) is the Trainer's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from unmask.errors import ConfigError, MethodError, ScheduleNotRunError, SelectionError
from unmask.integrations.checkpoints import STATE_FILE, Checkpoint, differences
from unmask.integrations.trainer_checkpoints import WholeCheckpoints
from unmask.integrations.trainer_checks import check_run, check_schedule
from unmask.integrations.trainer_optimizer import GivenOptimizer, new_optimizer
from unmask.methods.method import Method
from unmask.selection.clipping import clip_grad_norm_
from unmask.selection.select import select
from unmask.selection.selection import Selection
from unmask.selection.state import read_state, write_state

Selective = Selection | Method | Callable[[int], Method]


class SelectiveCallback(TrainerCallback):
    """Makes a Trainer of any kind train a selection: ``trainer.add_callback(SelectiveCallback(trainer, method))``.

    What it takes over:

    - The optimizer, unless the Trainer was given one: ``args.optim`` on ``selection.parameters()``. All selected weights are
      one parameter, so ``args.weight_decay`` holds for all of them.
    - ``args.max_grad_norm``: by the norm of what is trained, or of the whole gradient under ``clip_scope="all"``.
    - Checkpoints: the selection's state (``selection.safetensors``), the optimizer's, the schedule's and the RNG's, and no
      weights. A resumed run is bitwise the uninterrupted one. ``trainer.save_model()`` still saves an ordinary model.
      A checkpoint is whole or not there: ``manifest.json``, written last, names its files; older ones are removed after that.
      ``train(resume_from_checkpoint=True)`` takes the newest whole one; one that is damaged or mixed is refused.
    - A second attempt in one run (``auto_find_batch_size``, or ``train()`` after an exception) starts from the base weights.
    - Evaluation draws no random number that training would draw: a resumed run may not evaluate again.

    Args:
        trainer: The Trainer, built; its model is selected from.
        selective: What to train. A method; or a function from T, the number of optimizer steps that the Trainer will make,
            to a method (``lambda steps: unmask.id3(320_000, steps)``), so that the schedule fits the run; or a live
            selection, if you built the optimizer yourself: ``Trainer(..., optimizers=(optimizer, None))``.
        **options: As for `unmask.select` (``include``, ``exclude``, ``dense``, ``new``, ``accumulation``, ``gradients``,
            ``clip_scope``), unless a selection is given.

    Attributes:
        selection: The selection; None until ``train()`` makes it. It stays live afterwards: take ``selection.delta()``, then
            ``selection.release()``.

    Raises:
        ConfigError: Options beside a selection; from ``train()``: an ``args.optim`` that chooses its own parameters.
        SelectionError: From ``train()``: the model is not the selection's, or it has trained to the end already.
        SelectionError: From ``train(resume_from_checkpoint=...)``: the checkpoint is damaged, mixed or of another run.
        WriteError: From ``train()``: a checkpoint cannot be written; the one before is kept.
        ScheduleNotRunError: From ``train()``: the callback was not added, the optimizer or the learning-rate schedule is
            another's, the run is too short for the schedule, or a step did not advance it.
    """

    def __init__(self, trainer: Trainer, selective: Selective, **options: Any) -> None:
        if isinstance(selective, Selection) and options:
            raise ConfigError(f"a selection is made already; give {', '.join(options)} to unmask.select.")
        self.trainer = trainer
        self.selection: Selection | None = selective if isinstance(selective, Selection) else None
        self._selective, self._options = selective, options
        self._start: dict[str, Any] | None = None  # the selection's state before the first attempt
        self._builds: bool | None = None  # whether the optimizer is made here; known at the first `create_optimizer`
        self._given: GivenOptimizer | None = None
        self._checkpoints = WholeCheckpoints(trainer)
        self._checkpointing = self._finished = self._opened = False
        self._step = self._advanced = self._skipped = 0
        self._theirs: dict[str, Any] = {}  # the Trainer's own methods
        self._refuse_engines()
        self._take_over()

    def _refuse_engines(self) -> None:
        """FSDP and DeepSpeed take the model apart after the selection; DDP finds every parameter of the model frozen."""
        trainer = self.trainer
        asked = trainer.args.fsdp or trainer.args.deepspeed
        if (
            asked or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        ):  # accelerate's own configuration may ask too
            raise SelectionError(
                "TrainingArguments or accelerate's configuration ask for FSDP or DeepSpeed, which take the model apart after "
                "unmask.select(). Leave them out: under torchrun the selection reduces its own gradients. To shard a model, see "
                "docs/distributed.md."
            )
        prepare = trainer.accelerator.prepare_model
        trainer.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    def _take_over(self) -> None:
        mine: dict[str, Callable] = {
            "train": self._train,
            "set_initial_training_values": self._set_initial_training_values,
            "create_optimizer": self._create_optimizer,
            "evaluate": self._evaluate,
            "_save_checkpoint": self._save_checkpoint,
            "_save": self._save,
            "_load_from_checkpoint": self._load_from_checkpoint,
            "_load_best_model": self._load_best_model,
        }
        for name, method in mine.items():
            self._theirs[name] = getattr(self.trainer, name)
            setattr(self.trainer, name, method)
        self._theirs["clip_grad_norm_"] = self.trainer.accelerator.clip_grad_norm_
        self.trainer.accelerator.clip_grad_norm_ = self._clip_grad_norm

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
                f"this Trainer has trained to the end of its run ({self.live}); a further train() would begin the schedule "
                "anew on trained weights. Take selection.delta() and build a new Trainer, or give resume_from_checkpoint=."
            )
        return self._theirs["train"](resume_from_checkpoint, *args, **kwargs)

    def _set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """The first moment of an attempt at which the Trainer knows how many steps it will make."""
        values = self._theirs["set_initial_training_values"](*args, **kwargs)
        self._begin(int(values[-1]))
        return values

    def _begin(self, steps: int) -> None:
        """Selects, or goes back to where the first attempt started; then continues a checkpoint, if there is one."""
        self._undo()
        if not isinstance(self._selective, Selection):
            if self.selection is not None:
                self.selection.release()
                self.selection = self._start = None
            self.selection = select(self._model, self._method(self._selective, steps), **self._options)
        check_run(self.trainer, self.live, steps)
        self._start = self.live.state_dict()
        if self._checkpoints.resumed is not None:
            self._go_on(self._checkpoints.resumed, steps)
        self._finished = False
        self._let_gradients_through()

    def _go_on(self, checkpoint: Checkpoint, steps: int) -> None:
        """Loads a checkpoint's state, if it is of this run."""
        state = read_state(checkpoint.path / STATE_FILE)
        planned = (checkpoint.settings or {}).get("planned_steps", steps)
        mine = {"budget": self.live.budget, "method": self.live.method.describe()}
        lines = differences({key: state.get(key) for key in mine}, mine)
        if lines:
            lengths = "" if planned == steps else f" It was planned for {planned:,} steps, and this run for {steps:,}."
            growing = (
                " A method that unmasks step by step spreads its budget over the steps planned, so a longer or shorter run is "
                "another run from its first step on: train it from the start, or fix the method's steps yourself "
                f"(unmask.id3(budget, steps={planned})), and further steps train the full budget."
            )
            raise SelectionError(
                f"{str(checkpoint.path)!r} is the checkpoint of another run (its own -> given now): {'; '.join(lines)}.{lengths} "
                "Resume with the settings that the run was started with."
                + (growing if lengths and self.live.method.strategy == "increment" else "")
            )
        self.live.load_state_dict(state)

    def _undo(self) -> None:
        if self._start is None:
            return
        if self.trainer.model_init is not None and self.live.model is not self._model:
            return  # a new model: the last one keeps what it was trained to
        self.live.load_state_dict(self._start)
        _drop_gradients(self.live)

    def _method(self, selective: Method | Callable[[int], Method], steps: int) -> Method:
        method = selective if isinstance(selective, Method) else selective(steps) if callable(selective) else None
        if not isinstance(method, Method):
            raise MethodError(
                f"SelectiveCallback was given {selective!r}; give a method (unmask.id3(...)), a function from the number of "
                "steps to a method, or a selection."
            )
        return method

    @property
    def _model(self) -> nn.Module:
        return cast(nn.Module, self.trainer.model)

    def _let_gradients_through(self) -> None:
        """Reentrant checkpointing needs an input that requires grad, and every weight is frozen."""
        args, model = self.trainer.args, cast(Any, self._model)
        settings = cast(dict[str, Any], args.gradient_checkpointing_kwargs or {})
        reentrant = args.gradient_checkpointing and settings.get("use_reentrant")
        able = hasattr(model, "enable_input_require_grads") and not hasattr(model, "_require_grads_hook")
        if reentrant and able:
            model.enable_input_require_grads()
            self._opened = True

    # The optimizer.

    def _create_optimizer(self, model: nn.Module | None = None) -> Any:
        trainer = self.trainer
        if self._builds is None:
            self._builds = trainer.optimizer is None
        if self._builds:
            trainer.optimizer = new_optimizer(trainer, self.live)
        elif self._given is None:
            self._given = GivenOptimizer(trainer, self.live)
        else:
            self._given.restore(trainer)
        return trainer.optimizer

    def _clip_grad_norm(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """The model's own parameters are frozen: what is clipped is what the selection trains."""
        accelerator = self.trainer.accelerator
        if self.live.clip_scope == "selected":
            return self._theirs["clip_grad_norm_"](self.live.parameters(), max_norm, norm_type)
        accelerator.unscale_gradients()
        return clip_grad_norm_(
            self.live, max_norm, 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        )

    # Checkpoints.

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._checkpointing = True
        try:
            self._theirs["_save_checkpoint"](*args, **kwargs)
        finally:
            self._checkpointing = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self._checkpointing:  # the user's save_model()
            self._theirs["_save"](output_dir, state_dict)
        elif self.trainer.args.should_save:
            folder = Path(output_dir or str(self.trainer.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            write_state(self.live.state_dict(), folder / STATE_FILE)
            torch.save(self.trainer.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Only remembers it: the Trainer loads weights before it knows its number of steps."""
        self._checkpoints.remember(resume_from_checkpoint)  # what is not whole is refused before anything starts

    def _load_best_model(self) -> None:
        self.live.load_state_dict(read_state(Path(str(self.trainer.state.best_model_checkpoint), STATE_FILE)))

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            return self._theirs["evaluate"](*args, **kwargs)

    # The Trainer's events.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step, self._advanced, self._skipped = self.live.step, 0, 0
        check_schedule(kwargs.get("optimizer"), kwargs.get("lr_scheduler"))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.live.step > self._step:
            self._step, self._advanced = self.live.step, self._advanced + 1
        elif self.trainer.accelerator.scaler is None:
            raise ScheduleNotRunError(
                f"optimizer step {state.global_step} of the Trainer did not reach the selection, which is still at step "
                f"{self.live.step}: its optimizer is no torch.optim.Optimizer, or it did not step."
            )
        else:  # skipped for an overflow
            self._skipped += 1
            _drop_gradients(self.live)  # which the Trainer's model.zero_grad() does not reach

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._opened:
            cast(Any, self._model).disable_input_require_grads()
            self._opened = False
        self._finished = True
        if self._skipped and not self._advanced:
            raise ScheduleNotRunError(
                f"the run is over, and its schedule never advanced: each of its {self._skipped} steps was skipped for an "
                "overflow. Lower the loss scale or the learning rate, or train in bf16."
            )


class SelectiveTrainer(Trainer):
    """A Trainer with a `SelectiveCallback` of its own.

    Args:
        selection: As `SelectiveCallback`'s ``selective``: a selection (then build ``optimizers`` from
            ``selection.parameters()``), a method, or a function from the number of steps to a method.
        settings: JSON values that go into each checkpoint's manifest.
        *args: As for ``transformers.Trainer``.
        **kwargs: As for ``transformers.Trainer``.

    Under torchrun the selection reduces the gradients: the model is not wrapped in DDP.

    Raises:
        SelectionError: The arguments ask for FSDP or DeepSpeed.

    Example:
        ``SelectiveTrainer(model=model, selection=selection, args=args, train_dataset=data, optimizers=(optimizer, None))``
    """

    def __init__(
        self, *args: Any, selection: Selective, settings: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        model = selection.model if isinstance(selection, Selection) else kwargs.get("model", args[0] if args else None)
        with _trainable(model):
            super().__init__(*args, **kwargs)
        self._selective = SelectiveCallback(self, selection)
        self._selective._checkpoints.settings = settings or {}
        self.add_callback(self._selective)

    @property
    def selection(self) -> Selection:
        """The selection; made by ``train()`` where a method was given."""
        return self._selective.live


def _drop_gradients(selection: Selection) -> None:
    for parameter in selection.parameters():
        parameter.grad = None


@contextmanager
def _trainable(model: Any) -> Iterator[None]:
    """Lets the Trainer take a quantised model: it wants adapters on one, and a selection's sidecars are such."""
    if not getattr(model, "is_quantized", False) or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
