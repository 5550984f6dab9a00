"""Detects writes to a parameter, by torch's version counter, also those that go through ``data``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer
from torch.optim import optimizer as _torch_optimizer

from unmask.errors import SelectionError

# The names under which implementations of Lookahead keep their copy.
_COPIES = {"slow_param", "slow_params", "slow_buffer", "lookahead_slow_buff", "cached_params", "backup_params"}
_ENOUGH = 8  # The slots in use from which on no state tensor passes for a copy by chance.


class WatchedParameter(nn.Parameter):
    """A parameter that also counts the writes ``p.data.copy_(x)`` and ``p.data = x`` in its version.

    Torch's ``data`` has a separate version counter, and optimizer wrappers and averagers write through ``data``.

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
        """The same memory, without gradient tracking."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        increment_version(self)


# Torch's multi-tensor optimizers accept these exact types only. A WatchedParameter has the memory and operations of one.
_types = getattr(_torch_optimizer, "_foreach_supported_types", None)
if isinstance(_types, list) and WatchedParameter not in _types:
    _types.append(WatchedParameter)


class Writes:
    """Knows whether one parameter was written to since the last `take`. The parameter becomes a `WatchedParameter`.

    Torch does not count writes to NumPy's view of the memory, or to another tensor that shares it; they are not seen.

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
        """True if there was a write since the last `take`."""
        return self.parameter._version != self.seen

    def take(self) -> None:
        """Marks all writes so far as seen."""
        self.seen = self.parameter._version

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """Marks the writes inside the ``with`` block as seen; writes before it stay new."""
        before = self.new
        yield
        if not before:
            self.take()


def same(a: Tensor, b: Tensor) -> bool:
    """Returns True if two tensors of one shape hold the same numbers; NaN counts as equal to NaN."""
    b = b.to(a.device)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def copy_in(optimizer: Optimizer, values: nn.Parameter, before: Tensor | None, used: int) -> str | None:
    """Returns the name of an optimizer's state tensor that is a copy of ``values``, or an average of its past; None without one.

    Such a tensor is recognised by the name that optimizers give it, or by its contents after the first step: each of its
    numbers lies between what ``values`` held before the step and what it holds now.

    Args:
        optimizer: The optimizer, after a step.
        values: The trained vector: (B,).
        before: What ``values`` held when the step began: (B,). None restricts the search to names.
        used: The number of slots in use, which are the first of ``values``.
    """
    state = {
        k: s for k, s in optimizer.state.get(values, {}).items() if isinstance(s, Tensor) and s.shape == values.shape
    }
    for group in optimizer.param_groups:
        if "train_mode" in group and "z" in state and any(p is values for p in group["params"]):
            return "z"
    if named := sorted(_COPIES & state.keys()):
        return named[0]
    # Torch's optimizers never write such state back: ASGD's average is for the user.
    if before is None or type(optimizer).__module__.startswith("torch.optim"):
        return None
    before, after = before[:used], values.detach()[:used]
    telling = before * after > 0  # Where the sign changed, any small number lies in between.
    if int(telling.sum()) < _ENOUGH:
        return None
    before, after = before[telling], after[telling]
    slack = 1e-5 * torch.maximum(before.abs(), after.abs())
    low, high = torch.minimum(before, after) - slack, torch.maximum(before, after) + slack
    for name, tensor in state.items():
        held = tensor[:used][telling]
        if tensor.is_floating_point() and bool(((low <= held) & (held <= high)).all()):
            return name
    return None


_WAYS_OUT = (
    "Use a method whose weights are known from the start (unmask.random_mask, unmask.pafi, unmask.fish, unmask.bitfit), or "
    "average the model itself (torch.optim.swa_utils.AveragedModel(selection.model))"
)


def copying_optimizer(optimizer: Optimizer, name: str, method: str) -> SelectionError:
    """Makes the error of an optimizer that keeps a copy of ``values`` under a method that unmasks weights during training."""
    return SelectionError(
        f"{type(optimizer).__name__} keeps a copy of selection.values ({name!r}). In the copy, a weight that {method!r} unmasks "
        f"later is 0 until then, so it would be pulled towards 0. {_WAYS_OUT}, or use an optimizer without such a copy "
        "(torch.optim.AdamW). The model's weights are as they were before this step."
    )


def stale_write(method: str, name: str) -> SelectionError:
    """Makes the error of a write that may have put back a copy from before some weight was unmasked."""
    return SelectionError(
        f"selection.values was written to outside optimizer.step() (weights of {name!r}, among others), and {method!r} picks "
        "weights by their gradient. An earlier copy of values (EMA, Lookahead, SAM, a rollback) holds 0, or another weight, "
        f"where a weight was unmasked since. {_WAYS_OUT}. If this write comes from no such copy, make it inside "
        "`with selection.writing():`. The model's weights are as they were before the write."
    )
