"""Supports a transformers Trainer that trains a selection: optimizer, checks, clipping, DDP and repeated attempts.

`SelectiveCallback` and the PEFT method share these functions. Each takes the Trainer as an argument; `running_trainer` finds
the Trainer where no argument can bring it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.errors import ConfigError, ScheduleNotRunError, SelectionError
from unmask.selection.clipping import clip_grad_norm_
from unmask.selection.selection import Selection

if TYPE_CHECKING:
    from transformers import Trainer

Held = TypeVar("Held")


# The Trainer that runs.


def calling(kind: type) -> Any:
    """Returns the innermost object of a class whose method is running now; None if there is none.

    The function reads ``self`` from the frames of the call stack. It is a last resort: PEFT and transformers pass a tuner
    neither its `PeftModel` nor its Trainer.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, kind):
            return found
        frame = frame.f_back
    return None


def running_trainer() -> Trainer | None:
    """Returns the ``transformers.Trainer`` (or the object of a subclass) that is running; None if there is none."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    return None if kind is None else calling(kind)


def planned_steps(trainer: Trainer | None) -> int | None:
    """Returns T, the number of steps that a Trainer has planned; None if there is no Trainer or it has not started."""
    return None if trainer is None or trainer.state.max_steps <= 0 else int(trainer.state.max_steps)


class Attempt(Generic[Held]):
    """An attempt of a Trainer to complete a run. It remembers the start of the run, so that the attempt can be undone.

    With ``auto_find_batch_size`` a Trainer that runs out of memory starts again with a smaller batch, and so with another
    number of steps. The Trainer leaves the model and the optimizer as the failed attempt has changed them.

    Args:
        trainer: The Trainer, at the start of the attempt. Its optimizer and its schedule are remembered, if it has them yet.
        tensors: The parameters and buffers that `undo` sets back.
        held: A value that `undo` returns: the state that the caller itself sets back.
    """

    def __init__(self, trainer: Trainer, tensors: Iterable[Tensor], held: Held) -> None:
        self._trainer, self._state, self._held = weakref.ref(trainer), trainer.state, held
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        optimizer, self._schedule = unwrapped(trainer.optimizer), trainer.lr_scheduler
        self._optimizer_state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
        self._schedule_state = {} if self._schedule is None else copy.deepcopy(self._schedule.state_dict())

    @property
    def running(self) -> bool:
        """True while the Trainer still makes this attempt."""
        trainer, state = self._trainer(), self._state
        return trainer is not None and trainer.state is state and state.global_step < state.max_steps

    @property
    def failed(self) -> bool:
        """True if the Trainer has begun another attempt at the same run."""
        trainer = self._trainer()
        if trainer is None or not trainer.args.auto_find_batch_size:
            return False
        return trainer.state.train_batch_size != self._state.train_batch_size

    @torch.no_grad()
    def undo(self) -> Held:
        """Sets the tensors, the optimizer and the schedule back to the start of the attempt, and returns ``held``.

        If the Trainer has made a new schedule since, that schedule has set the learning rates already, and they stay.
        """
        for tensor, before in self._tensors:
            tensor.copy_(before)
        trainer = self._trainer()
        optimizer = None if trainer is None else unwrapped(trainer.optimizer)
        if trainer is None or optimizer is None or self._optimizer_state is None:
            return self._held
        state = copy.deepcopy(self._optimizer_state)
        if self._schedule is not None and trainer.lr_scheduler is self._schedule:
            self._schedule.load_state_dict(copy.deepcopy(self._schedule_state))
        elif self._schedule is not None:
            state["param_groups"] = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state)
        return self._held


# The optimizer and its schedule.


def unwrapped(optimizer: Any) -> Any:
    """Returns an optimizer without the wrapper that accelerate puts around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def new_optimizer(trainer: Trainer, selection: Selection) -> Optimizer:
    """Builds the optimizer that ``args.optim`` names, over the parameters that the selection trains.

    ``values`` decays. Of the dense tensors, those decay that the Trainer would let decay: no biases and no norms.

    Raises:
        ConfigError: The optimizer takes its parameters from the model itself (GaLore, LOMO, Muon ...).
    """
    kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args)
    own = {"params", "model", "optimizer_dict"} & settings.keys()
    if own or not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigError(
            f"optim = {str(trainer.args.optim)!r} takes its parameters from the model, where they are frozen; take one that "
            "trains what it is given (adamw_torch, adamw_bnb_8bit, sgd ...), or build one from selection.parameters()."
        )
    decaying = set(trainer.get_decay_parameter_names(trainer.model))  # type: ignore[arg-type]
    spared = [tensor.master for tensor in selection.dense if tensor.name not in decaying]
    rest = [p for p in selection.parameters() if not any(p is master for master in spared)]
    decays = ((rest, trainer.args.weight_decay), (spared, 0.0))
    return kind([{"params": params, "weight_decay": decay} for params, decay in decays if params], **settings)


# Checks.


def check_run(trainer: Trainer, selection: Selection, steps: int) -> None:
    """Refuses a run of ``steps`` optimizer steps that cannot train the selection as planned.

    A run that is longer than the method's schedule is fine; a shorter one would leave budget unused.

    Raises:
        ConfigError: Several processes would clip by the norm of the whole gradient.
        ScheduleNotRunError: The run is too short.
        SelectionError: The Trainer's model is not the selection's.
    """
    whole = {id(tensor.parameter) for tensor in selection.dense}
    parameters = () if trainer.model is None else trainer.model.parameters()
    if not any(selection.owns(p) or id(p) in whole for p in parameters):
        raise SelectionError(
            "the Trainer's model is not the one that was selected from (it may be a copy, or made by model_init). Select from "
            "trainer.model, or give SelectiveCallback a method: it selects when train() starts."
        )
    end, budget = selection.step + steps, selection.budget
    reached = budget if selection.method.whole else selection.method.cumulative(end - 1, budget)
    if reached < budget:
        raise ScheduleNotRunError(
            f"the schedule is spread over {selection.method.schedule.steps:,} steps, and this Trainer ends after {end:,}: "
            f"only {reached:,} of {budget:,} weights would be unmasked. Build the method with steps={end}, or give "
            "SelectiveCallback a function of the number of steps: lambda steps: unmask.id3(budget, steps)."
        )
    check_clip_scope(trainer, selection.clip_scope)


def check_clip_scope(trainer: Trainer, scope: str) -> None:
    """Refuses ``clip_scope="all"`` for a Trainer of several processes."""
    if scope == "all" and trainer.args.world_size > 1:
        raise ConfigError(
            "clip_scope='all' knows the norm of one process's gradient only; use clip_scope='selected' with several."
        )


# Clipping, DDP and gradient checkpointing.

Trained = Callable[[Sequence[nn.Parameter]], tuple[Selection | None, Sequence[nn.Parameter]]]


def clip_in(trainer: Trainer, trained: Trained) -> None:
    """Makes a Trainer clip the gradient of a selection, by the norm that the selection's ``clip_scope`` names.

    ``trained`` takes the parameters that the Trainer would clip. It returns the live selection, and those of the parameters
    that are trained in addition; if it returns no selection, the Trainer clips as always.
    """
    accelerator: Any = trainer.accelerator
    original = getattr(accelerator.clip_grad_norm_, "original", accelerator.clip_grad_norm_)

    def clip(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2) -> Any:
        parameters = list(parameters)
        selection, others = trained(parameters)
        if selection is None:
            return original(parameters, max_norm, norm_type)
        if selection.clip_scope == "selected":
            return original([*selection.parameters(), *others], max_norm, norm_type)
        accelerator.unscale_gradients()
        scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
        return clip_grad_norm_(selection, max_norm, scale, others)

    clip.original = original  # type: ignore[attr-defined]  # so that the next call replaces this function
    accelerator.clip_grad_norm_ = clip


def keep_unwrapped(trainer: Trainer) -> None:
    """Keeps a Trainer from wrapping its model in DistributedDataParallel.

    A selection reduces its gradient over the processes itself. DDP would find every parameter of the model frozen, and refuses
    such a model.
    """
    prepare = trainer.accelerator.prepare_model
    if not isinstance(prepare, functools.partial):
        trainer.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)


def open_inputs(trainer: Trainer) -> bool:
    """Lets gradients pass reentrant gradient checkpointing, which needs an input that requires grad; all weights are frozen.

    It returns True if it opened the model's inputs; ``model.disable_input_require_grads()`` closes them.
    """
    model: Any = trainer.model
    settings: Any = trainer.args.gradient_checkpointing_kwargs or {}
    reentrant = trainer.args.gradient_checkpointing and settings.get("use_reentrant")
    if not reentrant or not hasattr(model, "enable_input_require_grads") or hasattr(model, "_require_grads_hook"):
        return False
    model.enable_input_require_grads()
    return True
