"""The reducer of several processes: whom a selection trains with, that all start from the same, and one gradient of all."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from unmask.distributed.agreeing import refusal
from unmask.distributed.facts import facts_of_state, settings_of, state_of_optimizer
from unmask.distributed.processes import Processes, checksum
from unmask.distributed.ranking import CandidateRanking, ExactRanking
from unmask.distributed.sharding import ShardedLayout, ShardRanking, ShardTable, group_of, reshard
from unmask.errors import MethodError, ProcessesDifferError, SelectionError
from unmask.methods.method import Exchange, Method, check_word
from unmask.ranking.exchange import NewRanker, Ranking
from unmask.ranking.ledger import Layout, SlotTable
from unmask.ranking.plan import Plan

F = TypeVar("F", bound=Callable[..., Any])
_CPU = torch.device("cpu")
_SAME = "Give all processes the same"
_SAME_METHOD = f"{_SAME} model, method, budget, patterns, accumulation and exchange."
_SAME_STATE = f"{_SAME} state: load the file that one process has saved in all of them."
_SAME_OPTIMIZER = (
    f"{_SAME} optimizer, settings, learning-rate schedule and optimizer state; load the same checkpoint in all of them."
)


def check_exchange(exchange: str, method: Method) -> None:
    """Refuses an exchange that there is not, or that does not go with the method.

    Raises:
        MethodError: Either.
    """
    check_word("exchange", exchange, Exchange)
    heuristic = method.heuristic
    ranks = heuristic.needs == "gradient" or method.strategy == "repeat"
    if exchange == "candidates" and ranks and not method.by_entry:
        raise MethodError(
            f"exchange = 'candidates' scores single entries by their gradient, which heuristic {heuristic.name!r} under "
            f"allocation {method.allocation!r} does not allow; use exchange='exact'."
        )


class ProcessReducer:
    """Makes one gradient of those of several processes: those that the model is sharded over, or those of a process group.

    A process group may be made after the selection too, but before the first backward (transformers' Trainer makes it).

    Args:
        model: The model, not selected from yet.
        exchange: What travels when all rank together; ``"none"``: nothing, ever.
        group: The process group; None for all processes.

    Attributes:
        processes: Whom this process trains with; None: it is alone, or not joined to them yet.
        sharded: Whom the model is sharded over; None: it is not.

    Raises:
        MethodError: The model is sharded in another way than a selection can work on.
    """

    def __init__(self, model: nn.Module, exchange: Exchange, group: dist.ProcessGroup | None) -> None:
        self._exchange, self._group = exchange, group
        self.processes: Processes | None = None
        reshard(model)
        self.sharded = group_of(model)
        self._device = _CPU
        self._facts: Mapping[str, Any] = {}
        self._tensors: Callable[[], Mapping[str, Tensor]] = dict
        self._progress: Callable[[], tuple[int, list[Tensor]]] = lambda: (0, [])
        self._agreed: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # an optimizer may hold another one: both step
        self._optimizer: Optimizer | None = None  # the last that stepped
        self._stepped: dict[str, Any] = {}  # its settings at its last step
        self._coming: tuple[Plan, int] | None = None  # a backward whose exchanges have not begun
        self._micro = 0

    @property
    def several(self) -> bool:
        """Whether this process trains with others."""
        return self.processes is not None

    def share_weights(self, model: nn.Module) -> None:
        """Gives every process the first one's parameters and buffers, as DDP does; only those that differ travel."""
        processes = self._find()
        with torch._C.DisableTorchFunctionSubclass():
            detached = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
        tensors = {
            name: tensor for name, tensor in detached.items() if type(tensor) is Tensor
        }  # no shards, no quantised ones
        if processes is None or not tensors:
            return
        device = next(iter(tensors.values())).device
        facts = {name: f"{tuple(t.shape)} of {t.dtype}" for name, t in tensors.items()}
        processes.agree("select()", facts, device, _SAME_METHOD)
        for name in processes.differing(tensors, device):
            processes.take_first(tensors[name], device)

    def layout(self, model: nn.Module, tensors: Mapping[str, Tensor], names: Sequence[str]) -> Layout:
        """The eligible ones of a model's tensors, wherever their weights are."""
        if self.sharded is not None and names:
            return ShardedLayout(model, names, self.sharded)
        return Layout(names, [tensors[name] for name in names])

    def expect(
        self,
        facts: Mapping[str, Any],
        tensors: Callable[[], Mapping[str, Tensor]],
        progress: Callable[[], tuple[int, list[Tensor]]],
        device: torch.device,
    ) -> None:
        """Says what must be the same in all processes.

        Args:
            facts: JSON values by name.
            tensors: What a selection starts from.
            progress: The step, and tensors that training has made by then; not always the same ones.
            device: Where tensors travel: that of ``values``.
        """
        self._facts, self._tensors, self._progress, self._device = facts, tensors, progress, device

    def join(self) -> None:
        """Joins the others, once there are others: all must hold the same selection of the same weights.

        Raises:
            ProcessesDifferError: They do not.
        """
        processes = self._find() if self.processes is None else None
        if processes is None:
            return
        facts = {**self._facts, "exchange": self._exchange, "the step": self._progress()[0]}
        processes.agree("the start of a selection", facts, self._device, _SAME_METHOD)
        differing = processes.differing(self._tensors(), self._device)
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
        """Agrees on a saved state before it is loaded, and afterwards on that all have loaded it.

        Raises:
            ProcessesDifferError: Another process loads another state, or refuses it.
        """
        self.join()
        if self.processes is not None:
            self.processes.agree("load_state_dict()", facts_of_state(state), self._device, _SAME_STATE)
        self._agreed.clear()  # their state is loaded too
        self._optimizer, self._stepped, self._coming = None, {}, None
        try:
            yield
        except Exception as error:
            with contextlib.suppress(ProcessesDifferError):  # the error of this process is the one that it raises
                self._loaded(error)
            raise
        self._loaded(None)

    def _loaded(self, error: Exception | None) -> None:
        if self.processes is not None:
            self.processes.agree("the end of load_state_dict()", refusal(error), self._device, _SAME_STATE)

    def stepping(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step: the first time all processes agree on it, its settings and its state.

        A setting that is another later on is found in the next backward.

        Raises:
            ProcessesDifferError: They differ, or another process is elsewhere.
        """
        if self.processes is None:
            return
        if optimizer not in self._agreed:
            facts = settings_of(optimizer) | state_of_optimizer(optimizer)
            doing = f"the first step of an optimizer, step {self._progress()[0]} of the selection"
            self.processes.agree(doing, facts, self._device, _SAME_OPTIMIZER)
            self._agreed.add(optimizer)
        self._optimizer, self._stepped = optimizer, settings_of(optimizer)

    def leave(self) -> None:
        """The selection has ended: nothing of its optimizer is kept."""
        self._optimizer = None

    def begin(self, plan: Plan, fresh: bool) -> None:
        """See `Reducer`."""
        self.join()
        self._coming = (plan, 1 if fresh else self._micro + 1)

    def _meet(self) -> None:
        """Before a backward's first exchange: all processes must be at the same micro-batch of the same step.

        What is exchanged in a backward follows from what is agreed on here, so no call meets another one of another size. All
        hold the same `values` then, and their optimizers the same settings.

        Raises:
            ProcessesDifferError: They are not.
        """
        if self.processes is None or self._coming is None:
            return
        (plan, self._micro), self._coming = self._coming, None
        facts = {
            "slots in use": plan.used,
            "slots that train": plan.active,
            "weights to unmask": plan.newcomers,
        }
        doing = f"the backward of micro-batch {self._micro} of step {plan.step}"
        held = self._checksum() if self._micro == 1 else None
        self.processes.agree(doing, facts | self._settings(), self._device, _SAME_OPTIMIZER, held)

    def meet_for_dense(self) -> None:
        """The same before the exchange of dense tensors."""
        if self.processes is not None:
            doing = f"the exchange of the tensors trained whole, step {self._progress()[0]}"
            self.processes.agree(doing, self._settings(), self._device, _SAME_OPTIMIZER, self._checksum())

    def _settings(self) -> dict[str, Any]:
        """What the optimizer has stepped by, and what it will step by as it is now."""
        if self._optimizer is None:
            return {}
        return settings_of(self._optimizer) | {f"{key} at the last step": value for key, value in self._stepped.items()}

    def _checksum(self) -> Tensor:
        sums = [checksum(tensor).to(self._device) for tensor in self._progress()[1]]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.int64, device=self._device)

    def _find(self) -> Processes | None:
        if self.sharded is not None:
            return self.sharded
        if self._exchange == "none" or not (dist.is_available() and dist.is_initialized()):
            return None
        processes = Processes(self._group)
        return processes if processes.size > 1 else None

    def ranking(self, new: NewRanker, table: SlotTable) -> Ranking:
        """See `Reducer`."""
        if self.processes is None:
            return new(table)
        self._meet()
        if isinstance(table.layout, ShardedLayout):
            ranking = ShardRanking(new(ShardTable(table, table.layout)), table.layout)
            return ExactRanking(self.processes, ranking, table)
        if self._exchange == "candidates":
            return CandidateRanking(self.processes, new, table)
        return ExactRanking(self.processes, new(table), table)

    def mean(self, tensor: Tensor) -> None:
        """See `Reducer`."""
        if self.processes is not None:
            self._meet()
            self.processes.mean(tensor)


def refused_by_all(select: F) -> F:
    """Lets all processes refuse what one of them refuses, so that none waits for it."""

    @functools.wraps(select)
    def run(model: nn.Module, *args: Any, **options: Any) -> Any:
        try:
            return select(model, *args, **options)
        except ProcessesDifferError:  # raised in all
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # the error of this process is the one that it raises
                _tell(error, model, options)
            raise

    return cast(F, run)


def _tell(error: Exception, model: nn.Module, options: Mapping[str, Any]) -> None:
    processes = ProcessReducer(model, options.get("exchange", "exact"), options.get("group"))._find()
    if processes is not None:
        device = next((p.device for p in model.parameters()), _CPU)
        processes.agree("select()", refusal(error), device, _SAME_METHOD)


def refuse_zero(values: Tensor) -> None:
    """Refuses ``values`` that a ZeRO optimizer has taken over.

    ZeRO lets the inner optimizer step partitions of its own instead of the parameters, so the schedule would not advance, and
    no weight would follow ``values``. Stages 1 and 2 mark what they take over with ``_hp_mapping``.

    Raises:
        SelectionError: They did.
    """
    if hasattr(values, "_hp_mapping"):
        raise SelectionError(
            "DeepSpeed's ZeRO has taken over the selected weights, and steps copies of them that the model does not follow. ZeRO "
            "shards optimizer state, which for a selection is B numbers: train with torchrun or accelerate alone (the "
            "selection reduces its gradients itself), or shard the model with fully_shard before unmask.select()."
        )
