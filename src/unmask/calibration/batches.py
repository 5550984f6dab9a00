"""Reads the example batches of a calibration, and turns each into scalars to differentiate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from unmask.errors import MethodError
from unmask.methods.method import Calibration


@contextlib.contextmanager
def frozen_evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode with all parameters frozen; restores every module's mode and every flag after."""
    modes = [(module, module.training) for module in model.modules()]  # A frozen BatchNorm has its own mode.
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


def batches(calibration: Calibration) -> Iterator[Any]:
    """Yields the loader's batches, cut to ``num_samples`` examples in all.

    Batches with token-level labels come one example at a time: the model's loss is a mean over tokens, so it is an example's
    own loss only if the example is alone.
    """
    left = calibration.num_samples
    for batch in calibration.loader:
        size = batch_size(batch)
        if size > left:
            batch, size = examples(batch, 0, left), left
        left -= size
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if calibration.loss is None and isinstance(labels, Tensor) and labels.ndim > 1:
            yield from singles(batch)
        else:
            yield batch
        if left <= 0:
            return


def batch_size(batch: Any) -> int:
    """Returns the number of examples in a batch: the first dimension of its first tensor that has one.

    Raises:
        MethodError: The batch holds no such tensor.

    Example:
        >>> import torch
        >>> batch_size({"input_ids": torch.zeros(3, 7)})
        3
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    for tensor in batch.values() if isinstance(batch, Mapping) else batch:
        if isinstance(tensor, Tensor) and tensor.ndim:
            return tensor.shape[0]
    raise MethodError(
        f"a calibration batch of type {type(batch).__name__} holds no tensor with a batch dimension; give a tensor, or a "
        "mapping or sequence of tensors, whose first dimension is the batch."
    )


def examples(batch: Any, low: int, high: int) -> Any:
    """Returns the examples ``low`` to ``high - 1`` of a batch, as a batch of the same form."""

    def cut(value: Any) -> Any:
        return value[low:high] if isinstance(value, Tensor) and value.ndim else value

    if isinstance(batch, Tensor):
        return cut(batch)
    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return tuple(cut(value) for value in batch)


def singles(batch: Any) -> Iterator[Any]:
    """Yields each example of a batch as a batch of one."""
    for i in range(batch_size(batch)):
        yield examples(batch, i, i + 1)


def objectives(model: nn.Module, batch: Any, size: int, calibration: Calibration) -> Iterator[Tensor]:
    """Yields scalars whose gradients per example add up, squared or absolute, to the statistic of a batch.

    They are sums, not means, over the ``size`` examples: one for ``sample_type="label"``, one per class for ``"expect"``.

    Raises:
        MethodError: The model cannot take the batch, or it returns no loss or no class logits.
    """
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
    # E_c[f(grad log p_c)] = sum_c p_c f(grad log p_c). The weight p_c goes inside f: as sqrt(p_c) under a square.
    weight = log_p.detach().exp()
    weight = weight.sqrt() if calibration.grad_type == "square" else weight
    for c in range(logits.shape[1]):
        yield (weight[:, c] * log_p[:, c]).sum()
