"""AdamW for a selection: Adam's bias correction counted from the first step, or from each weight's own unmasking."""

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

# Settings that earlier versions had and wrote into their states, with the values under which they changed nothing.
_RETIRED = {"lr_scale": "none", "slot_warmup": 0}
_FUSED = ("cpu", "cuda")  # devices whose fused kernel is used
_LINE = 64  # a prefix is a multiple of it: the fused kernel rounds a shorter tail otherwise than its vectors
_CHUNK = 1 << 15  # entries per thread (CPU): 7 rows of them stay in its cache
_CHUNK_DEVICE = 1 << 22  # entries (elsewhere): few launches, and scratch that is small beside the model


class SelectiveAdamW(Optimizer):
    """AdamW whose bias correction may start anew with every weight that is unmasked.

    With m, v the moving averages of the gradient and its square, each step makes

        value = value (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    where t is, under ``"global"``, the number of steps taken: this is bit for bit what
    ``torch.optim.AdamW(fused=True)`` does. Under ``"entry"`` each slot of a selection's ``values`` has a t of its own,
    its age: 1 at the first step after it was unmasked (repeat-S: after it was unmasked last, or first where it keeps what
    leaves), so that a first move is about lr, however late. All other parameters are treated alike under both. A step reads
    and writes only slots in use.

    Args:
        params: ``selection.parameters()``, or whatever ``torch.optim.AdamW`` takes: dense float tensors of any shape, or
            groups with settings of their own (``bias_correction`` too).
        lr: Learning rate, 0 or more.
        betas: (b1, b2), each in [0, 1).
        eps: Above 0: a selected weight may well have a gradient of exactly 0.
        weight_decay: Decoupled, 0 or more.
        bias_correction: ``"global"`` or ``"entry"``.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` (its shape and dtype), and ``step`` (0-d float32) or, for the slots
    under ``"entry"``, ``age`` (B,) in the dtype of ``values`` (exact to 2^24 steps in float32, where b^t is 0 long since).

    Raises:
        ConfigError: A setting that cannot work, or a complex parameter.
        SelectionError: From ``step``: a sparse gradient.

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
        """As ``torch.optim.Optimizer.add_param_group``; refuses what cannot work, and then adds nothing."""
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
        """One step of every parameter that has a gradient.

        Args:
            closure: Evaluates the model anew, runs the backward and returns the loss.

        Returns:
            What the closure returned; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            _refuse_sparse(trained)
            aged = [p for p in trained if self._has_ages(p, group)]
            for p in aged:
                _step_slots(p, self._state_of(p, "age"), group)
            alike = [p for p in trained if not any(p is q for q in aged)]
            _step_alike([(p, self._state_of(p, "step")) for p in alike], group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Continues a saved run bit for bit; a state of ``torch.optim.AdamW`` goes on under ``"global"``.

        Raises:
            ConfigError: The state was made under another ``bias_correction``, or with a setting that this optimizer does
                not have; nothing was changed.
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
        for group in self.param_groups:  # a state of torch.optim.AdamW
            group.setdefault("bias_correction", "global")

    def _has_ages(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Ages that were once begun go on without a selection too (a copied optimizer), all slots being in use then."""
        return group["bias_correction"] == "entry" and (slots_in_use(p) is not None or "age" in self.state[p])

    def _state_of(self, p: Tensor, count: Literal["age", "step"]) -> dict[str, Tensor]:
        state = self.state[p]
        home = p.device if p.device.type in _FUSED else torch.device("cpu")  # where the kernels want the step
        if not state:
            state[count] = torch.zeros((), device=home) if count == "step" else torch.zeros_like(p)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        elif count == "step" and state["step"].device != home:  # loaded
            state["step"] = state["step"].to(home)
        return state


def _step_alike(chosen: list[tuple[Tensor, dict[str, Tensor]]], group: Mapping[str, Any]) -> None:
    """torch's own AdamW, on the prefix in use where a parameter is a selection's ``values``."""
    for fused in (True, False):
        rows = [(_prefixes(p, state), state["step"]) for p, state in chosen if _fusable(p) == fused]
        if rows:
            columns = [list(column) for column in zip(*(row for row, _ in rows), strict=True)]
            _adamw(columns, [step for _, step in rows], group, fused)


def _adamw(columns: list[list[Tensor]], steps: list[Tensor], group: Mapping[str, Any], fused: bool) -> None:
    params, grads, exp_avgs, exp_avg_sqs = columns
    b1, b2 = group["betas"]
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=fused,
        foreach=False if fused else None,
        amsgrad=False,
        beta1=b1,
        beta2=b2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _fusable(p: Tensor) -> bool:
    """The fused CPU kernel walks memory and looks at no strides."""
    gradient = p.grad
    alike = gradient is not None and p.is_contiguous() and gradient.is_contiguous() and gradient.dtype == p.dtype
    return alike and p.device.type in _FUSED


def _prefixes(p: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """(p, grad, exp_avg, exp_avg_sq), cut after the last line of slots that holds one in use."""
    if p.grad is None:
        raise AssertionError("only parameters with a gradient step")
    whole = (p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"])
    in_use = slots_in_use(p)
    if in_use is None:
        return whole
    end = (in_use // _LINE + 1) * _LINE
    return tuple(tensor[:end] for tensor in whole)


def _step_slots(p: Tensor, state: Mapping[str, Tensor], group: Mapping[str, Any]) -> None:
    """The slots in use, chunk by chunk, so that each row is read and written once."""
    if p.grad is None:
        raise AssertionError("only parameters with a gradient step")
    in_use = slots_in_use(p)
    used = p.numel() if in_use is None else in_use
    size = _CHUNK * torch.get_num_threads() if p.device.type == "cpu" else _CHUNK_DEVICE
    scratch = p.new_empty(2, min(used, size))
    state["age"][:used].add_(1)
    rows = [p.detach(), p.grad, state["exp_avg"], state["exp_avg_sq"], state["age"]]
    for start in range(0, used, size):
        end = min(start + size, used)
        chunk = [row[start:end] for row in rows]
        _slot_adamw(*chunk, *scratch[:, : end - start], group)  # type: ignore[call-arg, arg-type]


def _slot_adamw(
    value: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    age: Tensor,
    root: Tensor,
    denominator: Tensor,
    group: Mapping[str, Any],
) -> None:
    """One chunk, all (n,), in place. Corrections are 1 - b^age = -expm1(age ln b): exact where b^age is near 1."""
    (b1, b2), lr = group["betas"], group["lr"]
    value.mul_(1 - lr * group["weight_decay"])
    exp_avg.lerp_(grad, 1 - b1)
    exp_avg_sq.mul_(b2).addcmul_(grad, grad, value=1 - b2)
    torch.mul(age, _log(b2), out=root).expm1_().neg_()  # 1 - b2^age
    torch.div(exp_avg_sq, root, out=root).sqrt_().add_(group["eps"])
    torch.mul(age, _log(b1), out=denominator).expm1_().mul_(root)  # (b1^age - 1) (...): the sign makes it a descent
    value.addcdiv_(exp_avg, denominator, value=lr)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def _refuse_sparse(trained: list[Tensor]) -> None:
    for p in trained:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise SelectionError(
                f"a parameter of {_named(p)} has a sparse gradient ({p.grad.layout}); SelectiveAdamW takes dense ones. Build "
                "the embedding with sparse=False, or train it by torch.optim.SparseAdam."
            )


def _named(p: Tensor) -> str:
    return f"shape {tuple(p.shape)} and dtype {p.dtype}"


def _check(settings: Mapping[str, Any]) -> None:
    """Refuses settings that cannot work, with what is allowed."""
    for name in ("lr", "weight_decay"):
        if not (_is_number(settings[name]) and settings[name] >= 0):
            raise ConfigError(f"{name} = {settings[name]!r}; it must be a finite number, 0 or more.")
    if not (_is_number(settings["eps"]) and settings["eps"] > 0):
        raise ConfigError(f"eps = {settings['eps']!r}; it must be above 0: a gradient of exactly 0 would give 0/0.")
    betas = settings["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    if not (pair and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise ConfigError(f"betas = {betas!r}; they must be two numbers, each at least 0 and below 1.")
    correction = settings["bias_correction"]
    if correction not in get_args(BiasCorrection):
        raise ConfigError(f"bias_correction = {correction!r}; it must be 'global' or 'entry'.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
