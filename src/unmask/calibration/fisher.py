"""The diagonal empirical Fisher information, in one pass over per-sample gradients where the layer allows it.

For Linear, Embedding and LayerNorm an example's gradient follows from the layer's input and output gradient, so one
backward of a batch yields the sum over examples of each example's squared gradient. Tensors used otherwise (convolutions,
tensors used twice, activations without a batch dimension) are found on the first batch, and get the plain loop of batches
of one. Fish mask: arXiv 2111.09839.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.calibration.persample import PerSampleTaps
from unmask.errors import MethodError, NonFiniteGradientError
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors, as_dense
from unmask.gradients.taps import TapSet, in_pieces
from unmask.methods.method import Calibration
from unmask.ranking.ledger import Layout


def estimate_fisher(model: nn.Module, layout: Layout, calibration: Calibration) -> dict[int, Tensor]:
    """The mean over examples of the squared (or absolute) gradient of each example's loss.

    Args:
        model: The model; run in evaluation mode, left in the mode and with the flags it had.
        layout: The eligible tensors.
        calibration: Where the examples come from, and which statistic.

    Returns:
        By tensor index: the estimate, float32, of the tensor's shape. N numbers in all.

    Raises:
        MethodError: The loader is empty, or gives batches without a batch dimension.
        NonFiniteGradientError: A gradient is not finite.
    """
    with frozen_evaluation(model):
        sums, unsupported, count = _one_pass(model, layout, calibration)
        if unsupported:
            sums |= _loop(model, layout, sorted(unsupported), calibration, count)
    for index, total in sums.items():
        if not torch.isfinite(total).all():
            raise NonFiniteGradientError(
                f"the Fisher information of {layout.names[index]!r} is not finite; look at the loader's labels."
            )
    return {index: total / count for index, total in sums.items()}


@contextlib.contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with nothing requiring grad; afterwards every module's mode and every flag is what it was."""
    modes = [(module, module.training) for module in model.modules()]  # a frozen BatchNorm has its own
    flags = [p.requires_grad for p in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


def _one_pass(model: nn.Module, layout: Layout, calibration: Calibration) -> tuple[dict[int, Tensor], set[int], int]:
    sums = {i: torch.zeros(t.shape, dtype=torch.float32, device=t.device) for i, t in enumerate(layout.tensors)}
    taps = PerSampleTaps(layout.tensors, sums, calibration.grad_type)
    count, probed = 0, False
    try:
        for batch in batches(calibration):
            size = batch_size(batch)
            count += size
            if size > 1 and not probed:  # a sequence may be as long as the batch is large: not so with an example less
                taps.start(size - 1, probing=True)
                next(objectives(model, _slice(batch, 0, size - 1), size - 1, calibration))
                probed = True
            taps.start(size)
            for objective in objectives(model, batch, size, calibration):
                taps.collect(objective)
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
    """Batches of one, for the tensors that need it: the same ``count`` examples once more."""
    power = _power(calibration)
    tensors = [layout.tensors[i] for i in indices]
    receiver = _Summing([torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in tensors], power)
    taps = TapSet(tensors, receiver, lambda: False)
    try:
        for batch in batches(calibration):
            for single in _singles(batch):
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


class _Summing:
    """Receives batch-of-one gradients and sums their powers."""

    def __init__(self, sums: list[Tensor], power: Callable[[Tensor], Tensor]) -> None:
        self.sums, self._power = sums, power
        self._seen: set[int] = set()

    def wanted(self, index: int) -> bool:
        return True

    def begin(self) -> None:
        self._seen.clear()

    def entries(self, index: int) -> None:
        return None

    def factored(self, index: int) -> bool:
        return False

    def receive(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        if index in self._seen:
            raise in_pieces()
        self._seen.add(index)
        self.sums[index] += self._power(as_dense(gradient).float())

    def end(self) -> None:
        pass

    def abort(self) -> None:
        pass


def _power(calibration: Calibration) -> Callable[[Tensor], Tensor]:
    return torch.square if calibration.grad_type == "square" else torch.abs


def objectives(model: nn.Module, batch: Any, size: int, calibration: Calibration) -> Iterator[Tensor]:
    """Scalars whose per-sample gradients' powers add up to the statistic: sums, not means, over the batch."""
    if calibration.loss is None and not isinstance(batch, Mapping):
        raise MethodError(
            f"a calibration batch is a {type(batch).__name__}, which model(**batch) cannot take; give mappings, or fish(..., "
            "loss=...)."
        )
    if calibration.sample_type == "label":
        loss = calibration.loss(model, batch) if calibration.loss else model(**batch).loss
        if loss is None:
            raise MethodError(
                "the model returned no loss for a calibration batch; the batches need labels, or give fish(..., loss=...)."
            )
        yield loss * size
        return
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise MethodError(
            f"sample_type='expect' needs class logits of shape (batch, classes >= 2), not {tuple(logits.shape)}; use 'label'."
        )
    log_p = F.log_softmax(logits.float(), dim=1)
    # E_c[f(grad log p_c)] = sum_c p_c f(grad log p_c): the weight goes inside f, as sqrt(p) under a square
    weight = log_p.detach().exp()
    weight = weight.sqrt() if calibration.grad_type == "square" else weight
    for c in range(logits.shape[1]):
        yield (weight[:, c] * log_p[:, c]).sum()


def batches(calibration: Calibration) -> Iterator[Any]:
    """Batches of the loader, cut to ``num_samples`` examples in all; token-level labels come one example at a time."""
    left = calibration.num_samples
    for batch in calibration.loader:
        size = batch_size(batch)
        if size > left:
            batch, size = _slice(batch, 0, left), left
        left -= size
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if calibration.loss is None and isinstance(labels, Tensor) and labels.ndim > 1:
            yield from _singles(batch)  # the loss is a mean over tokens, so only one example's own is its loss
        else:
            yield batch
        if left <= 0:
            return


def batch_size(batch: Any) -> int:
    """Examples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, Tensor):
        batch = (batch,)
    for tensor in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(tensor, Tensor) and tensor.ndim:
            return tensor.shape[0]
    raise MethodError(f"a calibration batch of type {type(batch).__name__} holds no tensor with a batch dimension.")


def _slice(batch: Any, low: int, high: int) -> Any:
    def cut(value: Any) -> Any:
        return value[low:high] if isinstance(value, Tensor) and value.ndim else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(value) for value in batch)


def _singles(batch: Any) -> Iterator[Any]:
    for i in range(batch_size(batch)):
        yield _slice(batch, i, i + 1)
