"""Knows whether a parameter was written to since it was last looked at: by torch's version counter, and through ``data`` too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from unmask.errors import SelectionError

_COPIES = {
    "slow_param",
    "slow_params",
    "slow_buffer",
    "lookahead_slow_buff",
    "cached_params",
    "backup_params",
}  # Lookahead's
_ENOUGH = 8  # slots in use, from which chance does not put another state tensor where a copy would be


class WatchedParameter(nn.Parameter):
    """A parameter whose ``data`` counts writes as ``detach()`` does, so that ``p.data.copy_(x)`` and ``p.data = x`` are seen.

    Torch's own ``data`` has a version counter of its own, and optimizer wrappers and averagers write through it.

    Example:
        >>> parameter = nn.Parameter(torch.zeros(2))
        >>> parameter.__class__ = WatchedParameter
        >>> before = parameter._version
        >>> _ = parameter.data.fill_(1.0)
        >>> parameter._version > before
        True
    """

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The same memory without gradient tracking."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        increment_version(self)


# Torch's multi-tensor optimizers ask for these very types; ours has torch's own memory and operations.
_types = getattr(_torch_optimizer, "_foreach_supported_types", None)
if isinstance(_types, list) and WatchedParameter not in _types:
    _types.append(WatchedParameter)


class Writes:
    """The writes into one parameter that were not taken in yet. The parameter becomes a `WatchedParameter`.

    Writes are not seen that torch does not count: into NumPy's view of the memory, or into another tensor that shares it.

    Attributes:
        parameter: The parameter.
        seen: Its version when it was last looked at.

    Example:
        >>> writes = Writes(nn.Parameter(torch.zeros(2)))
        >>> with torch.no_grad():
        ...     _ = writes.parameter.add_(1.0)
        >>> writes.new
        True
        >>> writes.take()
        >>> writes.new
        False
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        if type(parameter) is nn.Parameter:
            parameter.__class__ = WatchedParameter
        self.parameter, self.seen = parameter, parameter._version

    @property
    def new(self) -> bool:
        """Whether there was a write since the last `take`."""
        return self.parameter._version != self.seen

    def take(self) -> None:
        """All writes so far are taken in."""
        self.seen = self.parameter._version

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """What is written inside is not new; what was new before stays so."""
        before = self.new
        yield
        if not before:
            self.take()


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN is the same as NaN."""
    b = b.to(a.device)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def copy_in(optimizer: Optimizer, values: nn.Parameter, before: Tensor | None, used: int) -> str | None:
    """The name of an optimizer's state that is a copy of ``values`` or an average of its past; None if it has none.

    It is known by the name that optimizers give it, or by its contents after the first step: each number in use lies between
    what ``values`` held before the step and what it holds now.

    Args:
        optimizer: It has stepped.
        values: (B,).
        before: (B,) what ``values`` held when the step began; None leaves the contents out.
        used: How many slots are in use, the first of ``values``.
    """
    state = {
        k: s for k, s in optimizer.state.get(values, {}).items() if isinstance(s, Tensor) and s.shape == values.shape
    }
    for group in optimizer.param_groups:
        if "train_mode" in group and "z" in state and any(p is values for p in group["params"]):
            return "z"
    named = sorted(_COPIES & state.keys())
    if named or before is None or type(optimizer).__module__.startswith("torch.optim"):
        return named[0] if named else None  # torch's own write no such state back (ASGD's average is for the user)
    before, after = before[:used], values.detach()[:used]
    told = before * after > 0  # elsewhere any small number lies in between
    if int(told.sum()) < _ENOUGH:
        return None
    before, after = before[told], after[told]
    slack = 1e-5 * torch.maximum(before.abs(), after.abs())
    low, high = torch.minimum(before, after) - slack, torch.maximum(before, after) + slack
    for name, tensor in state.items():
        held = tensor[:used][told]
        if tensor.is_floating_point() and bool(((low <= held) & (held <= high)).all()):
            return name
    return None


_WAYS_OUT = (
    "Use a method whose weights are known from the start (unmask.random_mask, unmask.pafi, unmask.fish, unmask.bitfit), or "
    "average the model itself (torch.optim.swa_utils.AveragedModel(selection.model))"
)


def copying_optimizer(optimizer: Optimizer, name: str, method: str) -> SelectionError:
    """The error of an optimizer that keeps a copy of ``values`` under a method that unmasks weights as it goes."""
    return SelectionError(
        f"{type(optimizer).__name__} keeps a copy of selection.values ({name!r}), in which a weight that {method!r} unmasks "
        f"later is 0 until then, so that it would be dragged towards 0. {_WAYS_OUT}, or use an optimizer without such a copy "
        "(torch.optim.AdamW). The model's weights are as they were before this step."
    )


def stale_write(method: str, name: str) -> SelectionError:
    """The error of a write that may have put back a copy made before some weight was unmasked."""
    return SelectionError(
        f"selection.values was written to outside optimizer.step() (weights of {name!r}, among others), and {method!r} picks "
        "weights by their gradient: a copy of values made earlier (EMA, Lookahead, SAM, a rollback) holds 0, or another weight, "
        f"where one was unmasked since. {_WAYS_OUT}. If this write comes from no such copy, make it inside "
        "`with selection.writing():`. The model's weights are as they were before the write."
    )
