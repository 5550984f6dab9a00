"""Makes a quantised layer compute with its sidecar, and makes the gradients of the weight's entries.

A forward hook adds ``x S^T`` to the output of the layer, where S is sparse: the sidecar's values less the payload's. The layer
stays as it is, and so does its own backward, which gives x its gradient through the payload.
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
from unmask.gradients.choice import choose, spread
from unmask.gradients.factors import Factors
from unmask.gradients.sampled import Product, sampled_product
from unmask.gradients.tapped import StandIn, TappedParameter, has_site, site_of, stand_in_of
from unmask.gradients.wrappers import named_parameters
from unmask.quantised.sidecar import Sidecar, SparseMatrix
from unmask.quantised.sources import Source, Unsupported, sources
from unmask.quantised.tensor import QuantisedTensor

# A dense product of some rows and columns may be one part in so many of the matrix. A larger one would take its memory.
_SHARE = 8


@dataclass(frozen=True)
class _Setup:
    """The settings of a product with a sidecar, which are not its tensors."""

    deviation: SparseMatrix | None  # What the sidecar adds to the payload; None if that is nothing.
    shape: tuple[int, int]  # The shape (out, in) of the weight.
    stand_in: StandIn | None  # The weight's stand-in; None if its gradient is not wanted.
    how: Product  # The product that gives the weight's entries, if the stand-in is for some.


class SidecarHook:
    """The forward hook of a quantised layer. Copies and pickles of it keep the current values, but no selection.

    Args:
        sidecar: The current weights of the layer.
        tensor: The tensor that a selection taps; None to make one when it is needed.
    """

    def __init__(self, sidecar: Sidecar, tensor: QuantisedTensor | None = None) -> None:
        self.sidecar = sidecar
        self._tensor = tensor

    @property
    def tensor(self) -> QuantisedTensor:
        """The layer's weight as a tensor, which is the one that a selection taps."""
        if self._tensor is None or (self._tensor.device != self.sidecar.source.device and not self.live):
            self._tensor = QuantisedTensor(self.sidecar)
        return self._tensor

    @property
    def live(self) -> bool:
        """True if a selection trains the layer's weight."""
        return self._tensor is not None and has_site(self._tensor)

    def __reduce__(self) -> Any:
        return SidecarHook, (self.sidecar,)

    def settle(self) -> None:
        """Hooks onto the layer if a selection trains it or the sidecar changes its output; takes the hook off if not."""
        layer = self.sidecar.source.layer
        attached = hook_of(layer) is self
        needed = self.live or self.sidecar.deviating()[0].numel() > 0
        if needed and not attached:
            layer.register_forward_hook(self, with_kwargs=True)
        elif attached and not needed:
            for key in [key for key, hook in layer._forward_hooks.items() if hook is self]:
                del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # A compiler must not see the state of taps.
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        stand_in = stand_in_of(self.tensor) if self.live else None
        deviation = self.sidecar.deviation()
        if stand_in is None and deviation is None:
            return None
        entries = None if stand_in is None else stand_in.entries
        how: Product = "dense"
        if entries is not None:
            rows, columns = spread(entries)
            if _SHARE * rows * columns > entries.shape[0] * entries.shape[1]:
                how = "sampled"
            else:
                how = choose(entries, x.numel() // max(1, x.shape[-1]), x.dtype, x.device, dense=False)
        setup = _Setup(deviation, self.sidecar.source.shape, stand_in, how)
        return output + _SidecarProduct.apply(x, None if stand_in is None else stand_in.proxy, setup, output.dtype)


class _SidecarProduct(torch.autograd.Function):
    """``x S^T``, the sidecar's part of the layer's output.

    The backward returns the gradient of x through the sidecar, and for the stand-in the gradient of the weight: at the slots'
    entries, or whole on a selecting step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, proxy: Tensor | None, setup: _Setup, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        ctx.setup = setup
        ctx.save_for_backward(x)
        rows = setup.shape[0]
        if setup.deviation is None:
            return x.new_zeros((), dtype=dtype).expand(*x.shape[:-1], rows)
        return setup.deviation.times(x.reshape(-1, x.shape[-1])).to(dtype).view(*x.shape[:-1], rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,), setup = ctx.saved_tensors, ctx.setup
        g, flat_x = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_proxy = None
        if ctx.needs_input_grad[0] and setup.deviation is not None:
            grad_x = setup.deviation.transposed_times(g).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            flat_x, stand_in = flat_x.to(g.dtype), setup.stand_in
            with torch.autocast(g.device.type, enabled=False):
                if stand_in.entries is not None:
                    grad_proxy = sampled_product(g, flat_x, stand_in.entries, setup.how).float()
                elif stand_in.pending is None:
                    grad_proxy = Factors(g, flat_x, torch.float32).dense()
                else:
                    stand_in.pending.put(Factors(g, flat_x, torch.float32))
                    grad_proxy = torch.zeros_like(stand_in.proxy)
        return grad_x, grad_proxy, None, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def pass_to_bias(layer: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    """Passes the output's gradient on to the bias, as the forward hook of a layer that hides its bias from taps."""
    bias = layer.bias
    if not isinstance(bias, TappedParameter):  # This is a copy of a model in training.
        return None
    with torch._C.DisableTorchFunctionSubclass():
        proxy = site_of(bias).taps.use(bias)
        # The layer has added the bias already, so this adds zero; its backward gives the bias the output's gradient.
        return output + (proxy - proxy.detach()).to(output.dtype) if proxy.requires_grad else None


def hook_of(layer: nn.Module) -> SidecarHook | None:
    """Returns the hook that holds a layer's sidecar; None if the layer has none."""
    return next((hook for hook in layer._forward_hooks.values() if isinstance(hook, SidecarHook)), None)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's parameters by name, with a `QuantisedTensor` for each quantised matrix that can be read."""
    named: dict[str, Tensor] = dict(named_parameters(model))
    for name, source in sources(model).items():
        if not isinstance(source, Unsupported):
            hook = hook_of(source.layer)
            named[name] = QuantisedTensor(Sidecar(source)) if hook is None else hook.tensor
    return named


def settle(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Hooks the layers whose sidecars are in use, and takes the hooks off the others.

    From then on all of the model's quantised layers keep what they store as it is, until `detach`. The tensors are some of the
    model's; those that are not quantised need no hook.
    """
    for tensor in tensors:
        if isinstance(tensor, QuantisedTensor):
            hook = hook_of(tensor.sidecar.source.layer) or SidecarHook(tensor.sidecar, tensor)
            hook.settle()
    for source in _readable(model):
        source.hold()


def stored_in(tensors: Iterable[Tensor]) -> list[nn.Parameter]:
    """Returns the parameters of the quantised layers whose weights are among the tensors."""
    return [t.sidecar.source.layer.weight for t in tensors if isinstance(t, QuantisedTensor)]  # type: ignore[misc]


def _readable(model: nn.Module) -> list[Source]:
    return [source for source in sources(model).values() if not isinstance(source, Unsupported)]


def is_trained(model: nn.Module) -> bool:
    """Returns True if a live selection trains a quantised weight of this model."""
    return any(hook is not None and hook.live for hook in map(hook_of, model.modules()))


def has_sidecars(model: nn.Module) -> bool:
    """Returns True if quantised layers of a model compute with sidecars, which would be lost by saving the model."""
    return any(hook_of(layer) is not None for layer in model.modules())


def detach(model: nn.Module) -> None:
    """Takes all sidecars off a model, so that its quantised layers are again as they were loaded.

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
    """Hooks those layers with a tapped bias that hide it from taps. The caller must remove the hooks together with the taps."""
    layers = [source.layer for source in _readable(model) if source.hides_bias]
    return [layer.register_forward_hook(pass_to_bias) for layer in layers if isinstance(layer.bias, TappedParameter)]
