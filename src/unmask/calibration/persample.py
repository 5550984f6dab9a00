"""Adds up per-example gradient statistics of a batch, from the inputs and output gradients of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unmask.gradients.factors import Factors
from unmask.gradients.receiver import Receiver
from unmask.gradients.tapped import TappedParameter, site_of
from unmask.gradients.taps import TapSet

_PRODUCT = 1 << 24  # The scalars in one block of per-example weight gradients.

Statistic = Callable[[Tensor, Tensor], None]


class _Watch(torch.autograd.Function):
    """The identity on a layer's output; the backward shows the layer's input and output gradient to a statistic."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, inputs: Tensor, statistic: Statistic) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inputs)
        ctx.statistic = statistic
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:  # type: ignore[override]
        (inputs,) = ctx.saved_tensors
        ctx.statistic(inputs, gradient)
        return None, gradient, None, None


class PerSampleTaps(Receiver):
    """Taps that add each example's squared (or absolute) gradients to given sums.

    Args:
        tensors: The frozen parameters to watch.
        sums: The sums by tensor index, float32 of the tensor's shape. They are added to in place.
        power: ``"square"`` or ``"abs"``.

    Attributes:
        unsupported: The indices of tensors whose use hides the examples. Their sums are worthless.
    """

    def __init__(self, tensors: Sequence[Tensor], sums: dict[int, Tensor], power: Literal["square", "abs"]) -> None:
        self.unsupported: set[int] = set()
        self._sums, self._power = sums, torch.square if power == "square" else torch.abs
        self._size, self._probing = 0, False
        self._uses: Counter[int] = Counter()
        self._anchor = torch.zeros((), requires_grad=True)
        self._taps = TapSet(tensors, self, lambda: False)
        self._taps.handlers = {F.linear: self._linear, F.embedding: self._embedding, F.layer_norm: self._layer_norm}

    def start(self, size: int, probing: bool = False) -> None:
        """Announces a forward of ``size`` examples.

        A ``probing`` forward has no backward. It only finds tensors whose use hides the examples, so no dimension may pass for
        the batch by chance.
        """
        self._size, self._probing = size, probing
        self._uses.clear()

    def remove(self) -> None:
        """Makes every tensor an ordinary parameter again."""
        self._taps.remove()

    def wanted(self, index: int) -> bool:
        """Notes a tensor as unsupported: the taps ask only about uses that no handler took, and these hide the examples."""
        self.unsupported.add(index)
        return False

    def receive(self, index: int, gradient: Tensor | Factors) -> None:
        raise AssertionError("no tensor's gradient is wanted from the taps")

    def _linear(self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = func(input, weight, bias)
        if not self._has_examples(input, weight, bias):
            return output

        def statistic(x: Tensor, g: Tensor) -> None:
            x, g = x.reshape(self._size, -1, x.shape[-1]), g.reshape(self._size, -1, g.shape[-1])
            self._add(bias, lambda: self._power(g.float().sum(1)).sum(0))
            self._add(weight, lambda: self._outer(x, g))

        return _Watch.apply(self._anchor, output, input, statistic)

    def _embedding(
        self,
        func: Any,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        if input.shape[0] == 1 < self._size:
            # Position ids of shape (1, T) serve all examples. Each example gets its own row of ids, or autograd would add the
            # examples' gradients up before they are seen.
            input = input.expand(self._size, *input.shape[1:])
        output = func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        if scale_grad_by_freq or not self._has_examples(input, weight):
            self._reject(weight)
            return output
        skip = None if padding_idx is None else padding_idx % weight.shape[0]

        def statistic(ids: Tensor, g: Tensor) -> None:
            self._add(weight, lambda: self._rows(ids, g, weight.shape, skip))

        return _Watch.apply(self._anchor, output, input, statistic)

    def _layer_norm(
        self,
        func: Any,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        output = func(input, normalized_shape, weight, bias, eps)
        if not self._has_examples(input, weight, bias):
            return output

        def statistic(x: Tensor, g: Tensor) -> None:
            shape = (self._size, -1, *normalized_shape)
            g = g.float().reshape(shape)
            normal = F.layer_norm(x.float(), normalized_shape, None, None, eps).reshape(shape)
            self._add(bias, lambda: self._power(g.sum(1)).sum(0))
            self._add(weight, lambda: self._power((g * normal).sum(1)).sum(0))

        return _Watch.apply(self._anchor, output, input, statistic)

    def _outer(self, x: Tensor, g: Tensor) -> Tensor:
        """Returns ``sum_n power(g_n^T x_n)``, (out, in), of x (N, T, in) and g (N, T, out)."""
        total = torch.zeros(g.shape[-1], x.shape[-1], device=g.device)
        height = max(1, _PRODUCT // total.numel())
        for low in range(0, self._size, height):
            part = slice(low, low + height)
            total += self._power(torch.bmm(g[part].mT, x[part].to(g.dtype)).float()).sum(0)
        return total

    def _rows(self, ids: Tensor, g: Tensor, shape: torch.Size, skip: int | None) -> Tensor:
        """Returns an embedding's statistic; within an example, the gradients of one row's uses add up first."""
        example = torch.arange(self._size, device=ids.device).repeat_interleave(ids.numel() // self._size)
        key = example * shape[0] + ids.reshape(-1)
        unique, inverse = key.unique(return_inverse=True)
        g = g.reshape(-1, shape[1]).float()
        rows = torch.zeros(unique.numel(), shape[1], device=g.device).index_add_(0, inverse, g)
        if skip is not None:
            rows[unique % shape[0] == skip] = 0
        return torch.zeros(shape, device=g.device).index_add_(0, unique % shape[0], self._power(rows))

    def _has_examples(self, input: Tensor, *parameters: Tensor | None) -> bool:
        """Returns True if the input's first dimension is the batch; rejects the parameters otherwise, or at a second use."""
        fits = input.shape[:1] == (self._size,) or (self._size == 1 and not self._probing)
        if isinstance(input, TappedParameter):  # Learned queries, for one, have no examples.
            self._reject(input)
            fits = False
        for parameter in parameters:
            if isinstance(parameter, TappedParameter):
                self._uses[site_of(parameter).index] += 1
                if not fits or self._uses[site_of(parameter).index] > 1:
                    self._reject(parameter)
        return fits

    def _reject(self, parameter: Tensor | None) -> None:
        if isinstance(parameter, TappedParameter):
            self.unsupported.add(site_of(parameter).index)

    def _add(self, parameter: Tensor | None, amount: Callable[[], Tensor]) -> None:
        if isinstance(parameter, TappedParameter) and site_of(parameter).index not in self.unsupported:
            self._sums[site_of(parameter).index] += amount()
