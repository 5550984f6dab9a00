"""What an adapter takes from the transformers Trainer that trains it: T, and the news that an attempt has failed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask.errors import MethodError
from unmask.peft.adapter import Adapter
from unmask.ranking.ledger import Slots


class Attempt:
    """A Trainer's attempt at a run, and where an adapter stood when it began.

    With ``auto_find_batch_size`` a Trainer that runs out of memory begins anew, with a smaller batch and so with another
    number of steps, on the model as it is.

    Args:
        trainer: The Trainer that runs.
        adapter: The adapter that it trains.
        whole: Tensors of the base that the adapter sets whole.
        copies: What PEFT trains beside the adapter: its copies of ``modules_to_save``.

    Attributes:
        slots: The adapter's then.
        whole: ``whole`` then.
    """

    def __init__(
        self, trainer: Any, adapter: Adapter, whole: Mapping[str, Tensor], copies: Mapping[str, Tensor]
    ) -> None:
        self._trainer, self._state = weakref.ref(trainer), trainer.state
        self.slots: Slots = adapter.slots()
        self.whole = dict(whole)
        self._values = adapter.values
        self._copies = {name: tensor.detach().clone() for name, tensor in copies.items()}
        self._moments = {id(p): copy.deepcopy(self._held(trainer).get(p)) for p in self._trained(copies)}

    @property
    def running(self) -> bool:
        """Whether the Trainer is still at it."""
        trainer, state = self._trainer(), self._state
        return trainer is not None and trainer.state is state and state.global_step < state.max_steps

    @property
    def failed(self) -> bool:
        """Whether what the Trainer has begun since is another attempt at the same run."""
        trainer = self._trainer()
        if trainer is None or not trainer.args.auto_find_batch_size:
            return False
        return trainer.state.train_batch_size != self._state.train_batch_size

    @torch.no_grad()
    def undo(self, copies: Mapping[str, Tensor]) -> None:
        """Puts the copies of ``modules_to_save`` and the optimizer's state back to where they were."""
        for name, tensor in copies.items():
            tensor.copy_(self._copies[name])
        state = self._held(self._trainer())
        for parameter in self._trained(copies):
            state.pop(parameter, None)
            if self._moments[id(parameter)] is not None:
                state[parameter] = copy.deepcopy(self._moments[id(parameter)])

    def _trained(self, copies: Mapping[str, Tensor]) -> list[nn.Parameter]:
        return [self._values, *(tensor for tensor in copies.values() if isinstance(tensor, nn.Parameter))]

    @staticmethod
    def _held(trainer: Any) -> dict:
        return {} if trainer is None or trainer.optimizer is None else trainer.optimizer.state


def planned_steps(trainer: Any) -> int | None:
    """T of the Trainer that runs, which works it out when it starts; None if none does."""
    return None if trainer is None or trainer.state.max_steps <= 0 else int(trainer.state.max_steps)


def not_known(adapter: str) -> MethodError:
    """The error of a first step whose T nobody knows."""
    return MethodError(
        f"adapter {adapter!r} spreads its budget over total_steps, which is not set, and no transformers Trainer runs this "
        "step. Give SelectiveConfig(total_steps=...) the planned number of optimizer steps, or set "
        f"model.peft_config[{adapter!r}].total_steps before the first step."
    )
