"""Estimates the diagonal empirical Fisher information, as the Fish mask does (arXiv 2111.09839)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unmask.calibration.batches import batch_size, batches, examples, frozen_evaluation, objectives, singles
from unmask.calibration.persample import PerSampleTaps
from unmask.errors import MethodError
from unmask.gradients.factors import Factors, as_dense
from unmask.gradients.receiver import Receiver, in_pieces
from unmask.gradients.taps import TapSet
from unmask.methods.method import Calibration
from unmask.ranking.ledger import Layout


def estimate_fisher(model: nn.Module, layout: Layout, calibration: Calibration) -> dict[int, Tensor]:
    """Computes the mean over examples of the squared (or absolute) gradient of each example's loss.

    One pass over batches serves Linear, Embedding and LayerNorm (`PerSampleTaps`). Tensors that are used in other ways (by
    convolutions, twice, or with activations that have no batch dimension) are found on the first batch; for them batches of one
    example follow. The model runs in evaluation mode and is left in the mode and with the flags it had.

    Returns:
        The estimate by tensor index: float32, of the tensor's shape. These are N numbers in all.

    Raises:
        MethodError: The loader is empty, or it gives batches without a batch dimension.
    """
    with frozen_evaluation(model):
        sums, unsupported, count = _one_pass(model, layout, calibration)
        if unsupported:
            sums |= _loop(model, layout, sorted(unsupported), calibration, count)
    return {index: total / count for index, total in sums.items()}


def _one_pass(model: nn.Module, layout: Layout, calibration: Calibration) -> tuple[dict[int, Tensor], set[int], int]:
    """Returns the sums by tensor index, the indices of the tensors that need the loop, and the number of examples."""
    sums = {i: torch.zeros(t.shape, dtype=torch.float32, device=t.device) for i, t in enumerate(layout.tensors)}
    taps = PerSampleTaps(layout.tensors, sums, calibration.grad_type)
    count, probed = 0, False
    try:
        for batch in batches(calibration):
            size = batch_size(batch)
            count += size
            # A sequence may be as long as the batch is large, and would pass for it. A forward with one example less shows
            # which dimension is the batch.
            if size > 1 and not probed:
                taps.start(size - 1, probing=True)
                next(objectives(model, examples(batch, 0, size - 1), size - 1, calibration))
                probed = True
            taps.start(size)
            for objective in objectives(model, batch, size, calibration):
                if objective.requires_grad:
                    objective.backward(retain_graph=True)
    finally:
        taps.remove()
    if count == 0:
        raise MethodError(
            "the calibration loader is empty; fish() needs examples to estimate the Fisher information from."
        )
    for index in taps.unsupported:
        del sums[index]
    return sums, taps.unsupported, count


def _loop(
    model: nn.Module, layout: Layout, indices: Sequence[int], calibration: Calibration, count: int
) -> dict[int, Tensor]:
    """Returns the sums of the tensors that need batches of one, over the same ``count`` examples once more."""
    power = torch.square if calibration.grad_type == "square" else torch.abs
    tensors = [layout.tensors[i] for i in indices]
    receiver = _Summing([torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in tensors], power)
    taps = TapSet(tensors, receiver, lambda: False)
    try:
        for single in (single for batch in batches(calibration) for single in singles(batch)):
            count -= 1
            for objective in objectives(model, single, 1, calibration):
                if objective.requires_grad:
                    objective.backward(retain_graph=calibration.sample_type == "expect")
    finally:
        taps.remove()
    if count:
        raise MethodError(
            f"the calibration loader gave {count} examples less the second time, and {layout.names[indices[0]]!r} needs two "
            "passes; give a list of batches or a DataLoader, not a generator."
        )
    return dict(zip(indices, receiver.sums, strict=True))


class _Summing(Receiver):
    """The receiver of the gradients of batches of one; it sums their powers."""

    def __init__(self, sums: list[Tensor], power: Callable[[Tensor], Tensor]) -> None:
        self.sums, self._power = sums, power
        self._seen: set[int] = set()

    def wanted(self, index: int) -> bool:
        return True

    def begin(self) -> None:
        self._seen.clear()

    def receive(self, index: int, gradient: Tensor | Factors) -> None:
        if index in self._seen:
            raise in_pieces()
        self._seen.add(index)
        self.sums[index] += self._power(as_dense(gradient).float())
