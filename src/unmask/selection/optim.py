"""Trains a selection by AdamW, with Adam's bias correction counted from the first step or from each weight's unmasking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from unmask.errors import ConfigError, SelectionError
from unmask.methods.method import BiasCorrection
from unmask.selection.stepping import slots_in_use

# Settings that earlier versions wrote into their states, with the values under which they had no effect.
_RETIRED = {"lr_scale": "none", "slot_warmup": 0}
_FUSED = ("cpu", "cuda")  # The devices whose fused kernel is used.
# A prefix of slots is a multiple of it: the fused kernel rounds a shorter tail differently from its vectors.
_LINE = 64
_CHUNK = 1 << 15  # The entries per thread on a CPU; 7 rows of them stay in its cache.
# The entries on other devices: few kernel launches, and scratch that is small next to the model.
_CHUNK_DEVICE = 1 << 22


class SelectiveAdamW(Optimizer):
    """AdamW whose bias correction may start again for every weight that is unmasked.

    With m, v the moving averages of the gradient and its square, each step computes

        value = value (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Under ``bias_correction="global"``, t is the number of steps taken, and a step is bit for bit that of
    ``torch.optim.AdamW(fused=True)``. Under ``"entry"``, each slot of a selection's ``values`` has a separate t, its age. The
    age is 1 at the first step after the weight was unmasked, so that its first move is about lr, however late it comes. (Under
    repeat-S it counts from the last unmasking; from the first, if what leaves is kept.) Parameters other than ``values`` are
    treated alike under both. A step reads and writes only slots in use.

    Args:
        params: ``selection.parameters()``, or anything that ``torch.optim.AdamW`` takes: dense float tensors of any shape, or
            groups with their own settings (``bias_correction`` too).
        lr: The learning rate, 0 or more.
        betas: The decay rates (b1, b2) of the two averages, each in [0, 1).
        eps: A number above 0, since a selected weight may have a gradient of exactly 0.
        weight_decay: The decoupled weight decay, 0 or more.
        bias_correction: ``"global"`` or ``"entry"``.

    The state of a parameter holds ``exp_avg`` and ``exp_avg_sq``, of its shape and dtype, and ``step`` (0-d float32). Under
    ``"entry"``, the state of ``values`` holds ``age`` (B,) instead, in the dtype of ``values``. In float32 an age is exact up to
    2^24 steps, by which time b^t has long been 0.

    Raises:
        ConfigError: A setting cannot work, or a parameter is complex.
        SelectionError: ``step`` meets a sparse gradient.

    Example:
        >>> import unmask
        >>> model = torch.nn.Linear(8, 4)
        >>> selection = unmask.select(model, unmask.id3(budget=6, steps=3))
        >>> optimizer = SelectiveAdamW(selection.parameters(), lr=1e-2, bias_correction="entry")
        >>> for _ in range(3):
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.state[selection.values]["age"].tolist()
        [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]

    Source: Kingma and Ba, Adam (arXiv 1412.6980); Loshchilov and Hutter, AdamW (arXiv 1711.05101).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        bias_correction: BiasCorrection = "global",
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "bias_correction": bias_correction})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as ``torch.optim.Optimizer.add_param_group`` does; adds nothing if the group cannot work.

        Raises:
            ConfigError: A setting cannot work, or a parameter is complex.
        """
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise ConfigError(
                    f"a parameter of {_named(p)}; SelectiveAdamW trains real ones. Use torch.optim.AdamW."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Makes one step of every parameter that has a gradient.

        Args:
            closure: A function that evaluates the model again, runs the backward and returns the loss.

        Returns:
            The result of the closure; None without one.

        Raises:
            SelectionError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if p.grad.layout != torch.strided:
                    raise SelectionError(
                        f"a parameter of {_named(p)} has a sparse gradient ({p.grad.layout}); SelectiveAdamW takes dense ones. "
                        "Build the embedding with sparse=False, or train it by torch.optim.SparseAdam."
                    )
            alike = []
            for p in trained:
                # A copied optimizer has no selection. Ages that it has begun go on, with all slots in use.
                if group["bias_correction"] == "entry" and (slots_in_use(p) is not None or "age" in self.state[p]):
                    _step_slots(p, self._state_of(p, "age"), group)
                else:
                    alike.append((p, self._state_of(p, "step")))
            _step_alike(alike, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continues a saved run bit for bit; a state of ``torch.optim.AdamW`` goes on under ``"global"``.

        Raises:
            ConfigError: The state was made under another ``bias_correction``, or with a setting that this optimizer does not
                have. Nothing was changed.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            own, other = group["bias_correction"], saved.get("bias_correction", "global")
            if own != other:
                raise ConfigError(
                    f"the saved optimizer state was made with bias_correction = {other!r}, this optimizer has {own!r}; build "
                    f"it with bias_correction={other!r} to go on."
                )
            for name, usual in _RETIRED.items():
                if saved.get(name, usual) != usual:
                    raise ConfigError(
                        f"the saved optimizer state was made with {name} = {saved[name]!r}, a setting that SelectiveAdamW no "
                        "longer has; go on with the version of unmask that saved it."
                    )
        super().load_state_dict(dict(state_dict))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # A state of torch.optim.AdamW has no such setting.
            group.setdefault("bias_correction", "global")

    def _state_of(self, p: Tensor, count: Literal["age", "step"]) -> dict[str, Tensor]:
        """Returns a parameter's state, which is made at its first step."""
        state = self.state[p]
        home = p.device if p.device.type in _FUSED else torch.device("cpu")  # The kernels want the step there.
        if not state:
            state[count] = torch.zeros((), device=home) if count == "step" else torch.zeros_like(p)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        elif count == "step" and state["step"].device != home:  # The state was loaded.
            state["step"] = state["step"].to(home)
        return state


def _step_alike(chosen: list[tuple[Tensor, dict[str, Tensor]]], group: Mapping[str, Any]) -> None:
    """Runs torch's AdamW on parameters with their states; of a selection's ``values``, on the slots in use."""
    settings = {"beta1": group["betas"][0], "beta2": group["betas"][1]}
    settings |= {name: group[name] for name in ("lr", "weight_decay", "eps")}
    for fused in (True, False):
        rows = []
        for p, state in chosen:
            assert p.grad is not None, "only a parameter with a gradient makes a step"
            # The fused kernel ignores strides, so the memory must be contiguous.
            alike = p.is_contiguous() and p.grad.is_contiguous() and p.grad.dtype == p.dtype
            if (alike and p.device.type in _FUSED) == fused:
                row, in_use = [p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"]], slots_in_use(p)
                if in_use is not None:  # cut after the last line of slots that holds one in use
                    row = [column[: (in_use // _LINE + 1) * _LINE] for column in row]
                rows.append((*row, state["step"]))
        if not rows:
            continue
        params, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*rows, strict=True))
        adamw(params, grads, exp_avgs, exp_avg_sqs, [], steps, fused=fused, amsgrad=False, maximize=False, **settings)


def _step_slots(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """Steps the slots in use by their ages, chunk by chunk, so that each row is read and written once.

    The bias corrections are computed as 1 - b^age = -expm1(age ln b), which is exact even if b^age is near 1.
    """
    assert p.grad is not None, "only a parameter with a gradient makes a step"
    (b1, b2), lr, in_use = group["betas"], group["lr"], slots_in_use(p)
    log_b1, log_b2 = (math.log(beta) if beta > 0 else -math.inf for beta in (b1, b2))
    used = p.numel() if in_use is None else in_use
    size = _CHUNK * torch.get_num_threads() if p.device.type == "cpu" else _CHUNK_DEVICE
    scratch = p.new_empty(2, min(used, size))
    state["age"][:used].add_(1)
    rows = [p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state["age"]]
    for start in range(0, used, size):
        end = min(start + size, used)
        value, grad, exp_avg, exp_avg_sq, age = (row[start:end] for row in rows)
        root, denominator = scratch[:, : end - start]
        value.mul_(1 - lr * group["weight_decay"])
        exp_avg.lerp_(grad, 1 - b1)
        exp_avg_sq.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        torch.mul(age, log_b2, out=root).expm1_().neg_()  # 1 - b2^age
        torch.div(exp_avg_sq, root, out=root).sqrt_().add_(group["eps"])
        torch.mul(age, log_b1, out=denominator).expm1_().mul_(root)  # (b1^age - 1) root: the minus sign of a descent
        value.addcdiv_(exp_avg, denominator, value=lr)


def _named(p: Tensor) -> str:
    return f"shape {tuple(p.shape)} and dtype {p.dtype}"


def _check(settings: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a setting that cannot work; it says what is allowed."""
    for name in ("lr", "weight_decay"):
        if not (_is_number(settings[name]) and settings[name] >= 0):
            raise ConfigError(f"{name} = {settings[name]!r}; it must be a finite number, 0 or more.")
    if not (_is_number(settings["eps"]) and settings["eps"] > 0):
        raise ConfigError(
            f"eps = {settings['eps']!r}; it must be a finite number above 0, since a gradient of exactly 0 would give 0/0."
        )
    betas = settings["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (pair and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ConfigError(f"betas = {betas!r}; they must be two numbers, each at least 0 and below 1.")
    correction = settings["bias_correction"]
    if correction not in get_args(BiasCorrection):
        raise ConfigError(f"bias_correction = {correction!r}; it must be 'global' or 'entry'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
