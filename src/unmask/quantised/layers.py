"""What a sidecar adds to its layer's output, and how the entries' gradients are made from the layer's input.

``y = layer(x) + x S^T``, S being sparse: the sidecar's values less the payload's. The layer stays as it is, and so does
its own backward, which gives x its gradient through the payload; a forward hook adds the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from unmask.errors import SelectionError
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors
from unmask.gradients.sampled import Product, choose, sampled_product, spread
from unmask.gradients.tapped import StandIn, TappedParameter, has_site, set_of, stand_in_of
from unmask.gradients.wrappers import named_parameters
from unmask.quantised.sidecar import Sidecar, SparseMatrix
from unmask.quantised.sources import Source, Unsupported, sources
from unmask.quantised.tensor import QuantisedTensor

_SHARE = 8  # a dense product of some rows and columns may be this part of the matrix: more would be no sampling


@dataclass(frozen=True)
class _Job:
    """What the product knows beside its tensors."""

    deviation: SparseMatrix | None
    shape: tuple[int, int]
    tapped: StandIn | None
    how: Product  # where the tap stands for some entries


class SidecarHook:
    """The forward hook of a quantised layer. Copies and pickles of it are out of training, and keep the current values.

    Args:
        sidecar: The layer's weight.
    """

    def __init__(self, sidecar: Sidecar, tensor: QuantisedTensor | None = None) -> None:
        self.sidecar = sidecar
        self._tensor = tensor

    @property
    def tensor(self) -> QuantisedTensor:
        """The layer's weight as a tensor: the one that a selection taps."""
        if self._tensor is None or (self._tensor.device != self.sidecar.source.device and not self.live):
            self._tensor = QuantisedTensor(self.sidecar)
        return self._tensor

    @property
    def live(self) -> bool:
        """Whether a selection trains the layer's weight."""
        return self._tensor is not None and has_site(self._tensor)

    def __reduce__(self) -> Any:
        return SidecarHook, (self.sidecar,)

    def settle(self) -> None:
        """Joins the layer if a selection trains it or there is something to add to its output; leaves it if not."""
        layer = self.sidecar.source.layer
        attached = hook_of(layer) is self
        needed = self.live or self.sidecar.deviating()[0].numel() > 0
        if needed and not attached:
            layer.register_forward_hook(self, with_kwargs=True)
        elif attached and not needed:
            for key in [key for key, hook in layer._forward_hooks.items() if hook is self]:
                del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler must not see a tap's state
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        tapped = stand_in_of(self.tensor) if self.live else None
        self.sidecar.follow()
        deviation = self.sidecar.deviation()
        if tapped is None and deviation is None:
            return None
        entries = None if tapped is None else tapped.entries
        how: Product = "dense" if entries is None else _how(entries, x)
        job = _Job(deviation, self.sidecar.source.shape, tapped, how)
        return output + _Beside.apply(x, None if tapped is None else tapped.proxy, job, output.dtype)


class _Beside(torch.autograd.Function):
    """``x S^T``, whose backward gives x its gradient and the tap that of the whole weight's entries, or of all of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tensor | None, job: _Job, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.job = job
        ctx.save_for_backward(x)
        rows = job.shape[0]
        if job.deviation is None:
            return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], rows)
        return job.deviation.times(x.reshape(-1, x.shape[-1])).to(dtype).view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,), job = ctx.saved_tensors, ctx.job
        g, flat_x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_tap = None
        if ctx.needs_input_grad[0] and job.deviation is not None:
            grad_x = job.deviation.transposed_times(g).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            with torch.autocast(g.device.type, enabled=False):
                grad_tap = _gradient(g, flat_x.to(g.dtype), job)
        return grad_x, grad_tap, None, None


def _gradient(g: Tensor, x: Tensor, job: _Job) -> Tensor:
    """What the tap's proxy gets."""
    if job.tapped is None:
        raise AssertionError("there is a tap, or its gradient would not be asked for")
    if job.tapped.entries is not None:
        return sampled_product(g, x, job.tapped.entries, job.how).float()
    factors = Factors(g, x, torch.float32)
    if job.tapped.pending is None:
        return factors.dense()
    job.tapped.pending.put(factors)
    return torch.zeros_like(job.tapped.proxy)


def _how(entries: Entries, x: Tensor) -> Product:
    """The cheapest product that is not of the matrix's own size."""
    rows, columns = spread(entries)
    if _SHARE * rows * columns > entries.shape[0] * entries.shape[1]:
        return "sampled"
    return choose(entries, x.numel() // max(1, x.shape[-1]), x.dtype, x.device, dense=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pass_to_bias(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """The forward hook of a layer that hides its bias from taps: passes the output's gradient on to the bias."""
    bias = layer.bias
    if not isinstance(bias, TappedParameter):  # in a copy of a model in training
        return None
    with torch._C.DisableTorchFunctionSubclass():
        proxy = set_of(bias).use(bias)
        return output + _Shadow.apply(proxy, output.dtype) if proxy.requires_grad else None


class _Shadow(torch.autograd.Function):
    """Zero, for a bias that has been added already; its gradient is the bias's."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.dtype = bias.dtype
        return bias.new_zeros((), dtype=dtype).expand(bias.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


def hook_of(layer: nn.Module) -> SidecarHook | None:
    """A layer's sidecar, if it has one."""
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, SidecarHook)), None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters by name, a `QuantisedTensor` in the place of each quantised matrix that can be read."""
    named: dict[str, Tensor] = dict(named_parameters(model))
    for name, source in sources(model).items():
        if not isinstance(source, Unsupported):
            hook = hook_of(source.layer)
            named[name] = QuantisedTensor(Sidecar(source)) if hook is None else hook.tensor
    return named


def settle(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Brings the layers' hooks in line with what the quantised ones among a model's tensors hold; the others need none.

    From then on all of the model's quantised layers keep what they store as it is, until `detach`.
    """
    for tensor in tensors:
        if isinstance(tensor, QuantisedTensor):
            hook = hook_of(tensor.sidecar.source.layer) or SidecarHook(tensor.sidecar, tensor)
            hook.settle()
    for source in _readable(model):
        source.hold()


def stored_in(tensors: Iterable[Tensor]) -> list[nn.Parameter]:
    """The parameters of quantised layers that some tensors stand for."""
    return [t.sidecar.source.layer.weight for t in tensors if isinstance(t, QuantisedTensor)]  # type: ignore[misc]


def _readable(model: nn.Module) -> list[Source]:
    return [source for source in sources(model).values() if not isinstance(source, Unsupported)]


def is_trained(model: nn.Module) -> bool:
    """Whether a live selection trains a quantised weight of this model."""
    return any(hook is not None and hook.live for hook in map(hook_of, model.modules()))


def has_sidecars(model: nn.Module) -> bool:
    """Whether a model's quantised layers compute with more than what they store, so that saving the model loses it."""
    return any(hook_of(layer) is not None for layer in model.modules())


def detach(model: nn.Module) -> None:
    """Takes all sidecars off a model: its quantised layers are again as they were loaded.

    Raises:
        SelectionError: A selection is live.

    Example:
        >>> import unmask
        >>> detach(nn.Linear(2, 2))   # nothing to take off
    """
    if is_trained(model):
        raise SelectionError("this model has a live selection; call its release() before unmask.quantised.detach().")
    hooks = [hook for hook in map(hook_of, model.modules()) if hook is not None]
    for hook in hooks:
        hook.sidecar.clear()
    settle(model, [hook.tensor for hook in hooks])
    for source in _readable(model):
        source.free()


def reach_biases(model: nn.Module) -> list[RemovableHandle]:
    """Hooks for the tapped biases of layers that hide theirs; ``remove()`` them when the taps go."""
    layers = [source.layer for source in _readable(model) if source.hides_bias]
    return [layer.register_forward_hook(pass_to_bias) for layer in layers if isinstance(layer.bias, TappedParameter)]
