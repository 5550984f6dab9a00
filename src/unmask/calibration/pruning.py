"""Scores weights by SNIP and GraSP, for pruning at initialisation, from exact gradients of the examples' mean loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unmask.calibration.batches import batch_size, batches, frozen_evaluation, objectives
from unmask.errors import MethodError
from unmask.methods.method import Calibration
from unmask.ranking.ledger import Layout

Gradients = list[Tensor]


def connection_sensitivity(model: nn.Module, layout: Layout, calibration: Calibration) -> dict[int, Tensor]:
    """Computes SNIP's score ``|w dL/dw|``: eq. 5 of arXiv 1810.02340 before its normalisation.

    Args:
        model: The model. It runs in evaluation mode and is left in the mode and with the flags it had.
        layout: The eligible tensors.
        calibration: The examples whose mean loss is L.

    Returns:
        The score by tensor index, of the tensor's shape, float32 (float64 for a float64 tensor).

    Raises:
        MethodError: The loader is empty.
    """
    with _trainable(model, layout):
        gradients = _mean_gradient(model, layout, calibration)
    return {i: (g * w).abs() for i, (g, w) in enumerate(zip(gradients, _weights(layout), strict=True))}


def gradient_flow(model: nn.Module, layout: Layout, calibration: Calibration) -> dict[int, Tensor]:
    """Computes GraSP's score ``w (H dL/dw)``: eq. 8 of arXiv 2002.07376 with its sign turned, so that the highest stay.

    H is the Hessian of the mean loss L. GraSP's authors divide the logits by a temperature of 200; SparseAdapter's code does not,
    and neither does this function. The arguments and the result are those of `connection_sensitivity`.

    Raises:
        MethodError: The loader is empty, or it gives nothing the second time.
    """

    def product(loss: Tensor) -> Sequence[Tensor | None]:
        """Differentiates the product of the mean gradient and the loss's own gradient."""
        own = torch.autograd.grad(loss, layout.tensors, create_graph=True, allow_unused=True)
        inner = sum((g * v.to(g)).sum() for g, v in zip(own, gradients, strict=True) if g is not None)
        if isinstance(inner, Tensor) and inner.requires_grad:
            return torch.autograd.grad(inner, layout.tensors, allow_unused=True)
        return [None] * len(own)  # A loss that is linear in the weights has no curvature.

    # The fused attention kernels have no second derivative.
    with _trainable(model, layout), sdpa_kernel(SDPBackend.MATH):
        gradients = _mean_gradient(model, layout, calibration)
        again = "the calibration loader gave nothing the second time; give a list of batches or a DataLoader."
        products = _mean(model, layout, calibration, product, again)
    return {i: h * w for i, (h, w) in enumerate(zip(products, _weights(layout), strict=True))}


@contextlib.contextmanager
def _trainable(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Freezes the model in evaluation mode, but makes the eligible tensors require grad."""
    with frozen_evaluation(model), torch.enable_grad():
        for tensor in layout.tensors:
            tensor.requires_grad_(True)
        yield


def _mean_gradient(model: nn.Module, layout: Layout, calibration: Calibration) -> Gradients:
    def gradient(loss: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(loss, layout.tensors, allow_unused=True)

    empty = "the calibration loader is empty; snip and grasp need examples to take gradients of."
    return _mean(model, layout, calibration, gradient, empty)


def _mean(
    model: nn.Module,
    layout: Layout,
    calibration: Calibration,
    derivative: Callable[[Tensor], Sequence[Tensor | None]],
    empty: str,
) -> Gradients:
    """Returns the mean over the examples of a derivative of their loss; raises an error that says ``empty`` without any."""
    sums, count = [torch.zeros_like(weight) for weight in _weights(layout)], 0
    for batch in batches(calibration):
        size = batch_size(batch)
        count += size
        for loss in objectives(model, batch, size, calibration):
            for total, part in zip(sums, derivative(loss), strict=True):
                if part is not None:
                    total += part
    if count == 0:
        raise MethodError(empty)
    return [total / count for total in sums]


def _weights(layout: Layout) -> Gradients:
    """Returns the eligible weights, in float32 at least."""
    plain = [layout.plain(index) for index in range(len(layout.tensors))]
    return [weight if weight.dtype == torch.float64 else weight.float() for weight in plain]
