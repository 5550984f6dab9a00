"""Replaces the delta that a model holds by another one."""

from __future__ import annotations

from torch import nn

from unmask.delta.applying import check_model, written
from unmask.delta.delta import SparseDelta
from unmask.delta.target import Target


def swap(model: nn.Module, displaced: SparseDelta, delta: SparseDelta) -> SparseDelta:
    """Takes one delta off a model and applies another one, in O(B) of both, or changes nothing.

    The result is that of ``displaced.apply(model)`` and then ``delta.apply(model)``, bit for bit, and each is checked at its
    own places. The two may have places in common. A tensor in which both set the same weights (of two trainings with one
    random mask, say) is written once.

    Args:
        model: The model that holds the base with one delta applied. If FSDP2 has sharded it, all processes call this together.
        displaced: The delta that `SparseDelta.apply` or `swap` returned when the present one was written.
        delta: The delta to apply.

    Returns:
        The base's values under ``delta``, as a delta: the ``displaced`` of the next swap. Applied, it restores the base.

    Raises:
        DeltaError: The model does not hold the delta that ``displaced`` takes off, ``delta`` is of another base, or a tensor
            cannot be written. The model is as it was then.

    Example:
        >>> import torch, unmask
        >>> def tuned(seed):
        ...     model = nn.Linear(3, 2)
        ...     _ = model.load_state_dict(base.state_dict())
        ...     selection = unmask.select(model, unmask.random_mask(budget=3, seed=seed))
        ...     model(torch.ones(3)).sum().backward()
        ...     torch.optim.SGD(selection.parameters(), lr=0.1).step()
        ...     return selection.delta()
        >>> base = nn.Linear(3, 2)
        >>> first, second = tuned(1), tuned(2)
        >>> displaced = first.apply(base)
        >>> displaced = unmask.swap(base, displaced, second)   # now the base has the second delta
        >>> displaced = unmask.swap(base, displaced, first)    # and now the first one again
        >>> len(displaced)
        3
    """
    target = Target(model)
    for each in (displaced, delta):
        check_model(each, target)
    common = _same_places(displaced, delta) if delta.places else []  # a full check needs the base
    instead, done = ({name: each.sparse[name] for name in common} for each in (delta, displaced))
    with written(displaced, target, instead=instead), written(delta, target, done=done) as under:
        return SparseDelta(*under)


def _same_places(one: SparseDelta, other: SparseDelta) -> list[str]:
    """Returns the names of the tensors in which two deltas set the same weights, and that neither stores whole."""
    names = one.sparse.keys() & other.sparse.keys() - one.whole.keys() - other.whole.keys()
    return [name for name in names if one.sparse[name].has_places_of(other.sparse[name])]
