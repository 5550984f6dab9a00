"""Lets a selection train in several processes: they start from the same weights, and average their gradients.

Before each exchange it checks that all processes are at the same step with the same settings, so that a process which differs
ends in an error and not in a deadlock.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.distributed.facts import checksum, facts_of_state, refusal, settings_of, state_of_optimizer
from unmask.distributed.processes import Processes
from unmask.distributed.ranking import CandidateRanking, ExactRanking
from unmask.distributed.sharding import ShardedLayout, ShardRanking, ShardTable, group_of, reshard
from unmask.errors import ProcessesDifferError, SelectionError
from unmask.methods.method import Exchange
from unmask.ranking.ledger import Ledger
from unmask.ranking.plan import Plan
from unmask.ranking.ranker import NewRanker, Ranking

F = TypeVar("F", bound=Callable[..., Any])
_SAME = "Give all processes the same"
_SAME_METHOD = f"{_SAME} model, method, budget, patterns, accumulation and exchange."
_SAME_STATE = f"{_SAME} state: load the file that one process has saved in all of them."
_SAME_OPTIMIZER = (
    f"{_SAME} optimizer, settings, learning-rate schedule and optimizer state; load the same checkpoint in all of them."
)


class ProcessReducer:
    """Averages gradients over several processes: those over which the model is sharded, or those of a process group.

    The process group may also be made after the selection, but before the first backward (transformers' Trainer does so). The
    arguments are those of `unmask.select`.

    Attributes:
        processes: The processes that train together; None if this one is alone, or has not joined them yet.
        sharded: The processes over which the model is sharded; None if it is not sharded.

    Raises:
        MethodError: The model is sharded in a way that a selection cannot work on.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, group: dist.ProcessGroup | None) -> None:
        self._exchange, self._group = exchange, group
        self.processes: Processes | None = None
        reshard(model)
        self.sharded = group_of(model)
        self._agreed: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # more than one, as an optimizer may wrap another
        self._optimizer: Optimizer | None = None  # the one that stepped last
        self._stepped: dict[str, Any] = {}  # that optimizer's settings at its last step
        # The plan and the micro-batch's number of a backward that has exchanged nothing yet.
        self._coming: tuple[Plan, int] | None = None
        self._micro = 0

    def share_weights(self, model: nn.Module) -> None:
        """Copies process 0's parameters and buffers to every process, as DDP does; only those that differ are sent."""
        processes = self._find()
        with torch._C.DisableTorchFunctionSubclass():
            detached = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
        # Shards and quantised tensors are left out: they are of other classes.
        tensors = {name: tensor for name, tensor in detached.items() if type(tensor) is Tensor}
        if processes is None or not tensors:
            return
        device = next(iter(tensors.values())).device
        facts = {name: f"{tuple(t.shape)} of {t.dtype}" for name, t in tensors.items()}
        processes.agree("select()", facts, device, _SAME_METHOD)
        for name in processes.differing(tensors, device):
            processes.take_first(tensors[name], device)

    def expect(self, facts: Mapping[str, Any], ledger: Ledger, whole: Mapping[str, Tensor]) -> None:
        """Takes what must be the same in all processes: settings (JSON values), the ledger, and the tensors trained whole."""
        self._facts, self._ledger, self._whole, self._device = facts, ledger, whole, ledger.values.device

    def join(self) -> None:
        """Joins the other processes as soon as there are any; raises a `ProcessesDifferError` if their selections differ."""
        processes = self._find() if self.processes is None else None
        if processes is None:
            return
        facts = {**self._facts, "exchange": self._exchange, "the step": self._ledger.step}
        processes.agree("the start of a selection", facts, self._device, _SAME_METHOD)
        ledger, layout = self._ledger, self._ledger.layout
        plain = {} if self.sharded is not None else {n: layout.plain(i) for i, n in enumerate(layout.names)}
        tensors = plain | {name: tensor.detach() for name, tensor in self._whole.items()}
        tensors["the order of unmasking"] = ledger.positions
        differing = processes.differing(tensors, self._device)
        if differing:
            name, ranks = next(iter(differing.items()))
            raise ProcessesDifferError(
                f"{name!r} is another in process {', '.join(map(str, ranks))} than in process 0. If it is a weight, call "
                "unmask.select() after init_process_group() (after TrainingArguments or Accelerator), which then shares the "
                "first process's weights; if it is the order of unmasking, give every process's method the same calibration "
                "data. Processes that train apart need exchange='none'."
            )
        self.processes = processes

    @contextlib.contextmanager
    def loading(self, state: Any) -> Iterator[None]:
        """Raises a `ProcessesDifferError` if another process loads another state, or refuses it."""
        self.join()
        if self.processes is not None:
            self.processes.agree("load_state_dict()", facts_of_state(state), self._device, _SAME_STATE)
        self._agreed.clear()  # their state is loaded, too
        self._optimizer, self._stepped, self._coming = None, {}, None
        try:
            yield
        except Exception as error:
            with contextlib.suppress(ProcessesDifferError):  # this process raises its own error
                self._loaded(error)
            raise
        self._loaded(None)

    def _loaded(self, error: Exception | None) -> None:
        if self.processes is not None:
            self.processes.agree("the end of load_state_dict()", refusal(error), self._device, _SAME_STATE)

    def stepping(self, optimizer: Optimizer) -> None:
        """Raises a `ProcessesDifferError` if an optimizer's class, settings or state differ, before its first step.

        The next backward compares the settings again.
        """
        if self.processes is None:
            return
        if optimizer not in self._agreed:
            facts = settings_of(optimizer) | state_of_optimizer(optimizer)
            doing = f"the first step of an optimizer, step {self._ledger.step} of the selection"
            self.processes.agree(doing, facts, self._device, _SAME_OPTIMIZER)
            self._agreed.add(optimizer)
        self._optimizer, self._stepped = optimizer, settings_of(optimizer)

    def leave(self) -> None:
        """Lets go of the optimizer when the selection ends."""
        self._optimizer = None

    def begin(self, plan: Plan, fresh: bool) -> None:
        """Begins a backward of the window; ``fresh`` is True for the first micro-batch of the step.

        Raises:
            SelectionError: DeepSpeed's ZeRO has taken over ``values``. Its inner optimizer steps partitions of a copy instead,
                so neither the schedule nor the model would follow. ZeRO 1 and 2 mark such parameters with ``_hp_mapping``.
        """
        if hasattr(self._ledger.values, "_hp_mapping"):
            raise SelectionError(
                "DeepSpeed's ZeRO has taken over the selected weights, and steps copies of them that the model does not follow. "
                "ZeRO shards optimizer state, which for a selection is B numbers: train with torchrun or accelerate alone (the "
                "selection reduces its gradients itself), or shard the model with fully_shard before unmask.select()."
            )
        self.join()
        self._coming = (plan, 1 if fresh else self._micro + 1)

    def _meet(self) -> None:
        """Raises a `ProcessesDifferError` if a process is at another micro-batch or step, before a backward's first exchange.

        The sizes of a backward's exchanges follow from the facts that are compared here, so they are the same in all
        processes. ``values`` and the optimizers' settings are compared, too.
        """
        if self.processes is None or self._coming is None:
            return
        (plan, self._micro), self._coming = self._coming, None
        facts = {"slots in use": plan.used, "slots that train": plan.active, "weights to unmask": plan.newcomers}
        doing = f"the backward of micro-batch {self._micro} of step {plan.step}"
        held = self._checksum() if self._micro == 1 else None
        self.processes.agree(doing, facts | self._settings(), self._device, _SAME_OPTIMIZER, held)

    def meet_for_dense(self) -> None:
        """Checks the same before the gradients of dense tensors are exchanged."""
        if self.processes is not None:
            doing = f"the exchange of the tensors trained whole, step {self._ledger.step}"
            self.processes.agree(doing, self._settings(), self._device, _SAME_OPTIMIZER, self._checksum())

    def _settings(self) -> dict[str, Any]:
        """Returns the optimizer's settings at its last step, and its settings now."""
        if self._optimizer is None:
            return {}
        return settings_of(self._optimizer) | {f"{key} at the last step": value for key, value in self._stepped.items()}

    def _checksum(self) -> Tensor:
        """Sums the bits of the values in use and of one tensor that is trained whole, at each step another one."""
        ledger, whole = self._ledger, list(self._whole.values())
        turn = ledger.step % max(1, len(whole))
        trained = [ledger.values[: ledger.used], *whole[turn : turn + 1]]
        return torch.stack([checksum(tensor.detach()).to(self._device) for tensor in trained]).sum()

    def _find(self) -> Processes | None:
        if self.sharded is not None:
            return self.sharded
        if self._exchange == "none" or not (dist.is_available() and dist.is_initialized()):
            return None
        processes = Processes(self._group)
        return processes if processes.size > 1 else None

    def ranking(self, new: NewRanker, table: Ledger) -> Ranking:
        """Returns a ranking by the gradient of all processes, of which there are several."""
        assert self.processes is not None, "a process that trains alone ranks by its own gradient"
        self._meet()
        if isinstance(table.layout, ShardedLayout):
            ranking = ShardRanking(new(ShardTable(table, table.layout)), table.layout)
            return ExactRanking(self.processes, ranking, table)
        if self._exchange == "candidates":
            return CandidateRanking(self.processes, new, table)
        return ExactRanking(self.processes, new(table), table)

    def mean(self, tensor: Tensor) -> None:
        """Replaces a tensor by its mean over the processes, in place. The mean is bitwise the same in all of them."""
        if self.processes is not None:
            self._meet()
            self.processes.mean(tensor)


def refused_by_all(select: F) -> F:
    """Decorates ``select`` so that an error in one process is raised in all of them, and none waits for it."""

    @functools.wraps(select)
    def run(model: nn.Module, *args: Any, **options: Any) -> Any:
        try:
            return select(model, *args, **options)
        except ProcessesDifferError:  # all processes raise it already
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # this process raises its own error
                processes = ProcessReducer(model, options.get("exchange", "exact"), options.get("group"))._find()
                if processes is not None:
                    device = next((p.device for p in model.parameters()), torch.device("cpu"))
                    processes.agree("select()", refusal(error), device, _SAME_METHOD)
            raise

    return cast(F, run)
