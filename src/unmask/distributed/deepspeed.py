"""DeepSpeed's ZeRO: why it is refused, and how it is known."""

from __future__ import annotations

from torch import Tensor

from unmask.errors import SelectionError


def refuse_zero(values: Tensor) -> None:
    """Refuses ``values`` that a ZeRO optimizer has taken over.

    ZeRO lets the inner optimizer step partitions of its own instead of the parameters, so the schedule would not advance, and
    no weight would follow ``values``. Stages 1 and 2 mark what they take over with ``_hp_mapping``.

    Raises:
        SelectionError: They did.
    """
    if hasattr(values, "_hp_mapping"):
        raise SelectionError(
            "DeepSpeed's ZeRO has taken over the selected weights, and steps copies of them that the model does not follow. ZeRO "
            "shards optimizer state, which for a selection is B numbers: train with torchrun or accelerate alone (the "
            "selection reduces its gradients itself), or shard the model with fully_shard before unmask.select()."
        )
