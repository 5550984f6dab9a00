"""`select`: checks what was asked for, agrees on it with other processes, and starts a `Selection`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from unmask.delta.added import refuse_pruned_base
from unmask.delta.live import has_selection
from unmask.delta.record import missing_from_checkpoint, new_tensors
from unmask.distributed.reducer import ProcessReducer, check_exchange, refused_by_all
from unmask.distributed.sharding import check_sharded
from unmask.errors import MethodError
from unmask.gradients.wrappers import bare, named_parameters, refuse_wrappers
from unmask.methods.method import Accumulation, ClipScope, Exchange, Gradients, Method, check_word
from unmask.methods.scopes import Patterns, as_patterns, matching
from unmask.quantised.layers import weights
from unmask.selection.eligible import refuse_renormalized, resolve
from unmask.selection.refusals import refuse_quantised
from unmask.selection.selection import Selection
from unmask.selection.storage import Ties, refuse_absent, refuse_overlaps

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@refused_by_all
def select(
    model: nn.Module,
    method: Method,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    dense: Patterns = None,
    new: Patterns = None,
    accumulation: Accumulation = "candidates",
    gradients: Gradients = "auto",
    exchange: Exchange = "exact",
    group: ProcessGroup | None = None,
    clip_scope: ClipScope = "selected",
    values: nn.Parameter | None = None,
) -> Selection:
    """Freezes a model and makes a budget of its scalar weights trainable.

    Args:
        model: Any module. Its tensors keep their names, shapes and dtypes and always hold the current values. Of a compiled
            model, or one in ``DataParallel``, it is the model inside; names are those of the plain model. Parameters that
            share one memory become one parameter until ``release()``. What may be changed afterwards: docs/training.md.
        method: What is unmasked and when, e.g. ``unmask.id3(budget=320_000, steps=1_000)``.
        include: Regular expressions, searched in parameter names: only these tensors are eligible.
        exclude: Regular expressions: these tensors are not.
        dense: Regular expressions: these tensors are trained whole, outside the budget, and reported apart.
        new: Regular expressions: tensors that are not in the base checkpoint (a head with a random init). The delta
            stores them whole, trained or not. None: found out from a transformers model's checkpoint where it can be.
        accumulation: Which selection gradient accumulation makes: ``"candidates"`` (ranked on the first micro-batch, then
            re-ranked by the summed gradients; O(B) memory) or ``"exact"`` (by the summed dense gradients; O(N)). With
            one micro-batch per step both are the exact selection.
        gradients: How steps that select nothing get their gradients: ``"auto"`` (at the selected entries only, where that
            is cheaper than the dense gradient), ``"sampled"`` (wherever there is a way) or ``"dense"``. The three agree
            within rounding.
        exchange: How several processes of ``torch.distributed`` select together: ``"exact"`` (by the reduced dense gradient),
            ``"candidates"`` (what each process's own gradient puts first, ranked by the exact mean gradient; few bytes), or
            ``"none"`` (every process trains by itself).
        group: The processes that train together; None for all of them.
        clip_scope: Which norm `unmask.clip_grad_norm_` clips by: ``"selected"``, or ``"all"``: of the gradient of every
            eligible weight. ``"all"`` forms all gradients at every step (``gradients`` is ``"dense"`` then), and with
            several micro-batches it needs ``accumulation="exact"``.
        values: The parameter that becomes the selection's ``values``, for a wrapper that an optimizer is built from before
            the selection can start: (B,), or with one slot for each eligible weight under ``leaving="kept"``, on the model's
            device, float32 (float64 for a float64 model). Its contents are dropped. None: a new one.

    Returns:
        The selection. Give ``selection.parameters()`` to any ``torch.optim`` optimizer; no further call is needed.

    Raises:
        MethodError: The budget exceeds the eligible weights, a pattern finds nothing, the model is selected from already,
            ``values`` does not fit, a wrapper or place of the model does not allow a selection (DDP, FSDP1, DeepSpeed, the
            meta device), or trained tensors overlap in memory.
        SelectionError: Another process has another model or method.

    Example:
        >>> import torch, unmask
        >>> model = nn.Linear(8, 4)
        >>> selection = select(model, unmask.id3(budget=6, steps=3))
        >>> optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> selection.used, selection.step
        (6, 3)
    """
    if not isinstance(model, nn.Module) or not isinstance(method, Method):
        raise MethodError(
            f"select got a {type(model).__name__} and a {type(method).__name__}; give a torch module and a method, such as "
            "unmask.id3(budget=1000, steps=100)."
        )
    refuse_wrappers(model)
    model = bare(model)
    if has_selection(model):
        raise MethodError("this model already has a selection; call its release() first.")
    check_word("accumulation", accumulation, Accumulation)
    check_word("gradients", gradients, Gradients)
    check_word("clip_scope", clip_scope, ClipScope)
    if clip_scope == "all" and gradients == "sampled":
        raise MethodError("clip_scope='all' needs the whole gradient at every step; leave gradients='auto'.")
    check_exchange(exchange, method)
    refuse_absent(model)
    reducer = ProcessReducer(model, exchange, group)
    with Ties(model) as ties:  # a tensor of several names is one tensor from here on
        reducer.share_weights(model)
        eligible, dense_names = resolve(model, method.scope, include, exclude, dense)
        if method.whole:
            eligible, dense_names = [], sorted({*eligible, *dense_names})
        refuse_renormalized(model, dense_names)
        if reducer.sharded is not None:
            check_sharded(model, method, eligible, dense_names, exchange)
        refuse_overlaps(model, [*eligible, *dense_names])
        budget = count_budget(model, method, eligible)
        method.schedule.check(budget)
        parameters = named_parameters(model)
        new_names = None if new is None else matching(parameters, as_patterns(new), "new")
        absent = (lambda: missing_from_checkpoint(model)) if new_names is None else (lambda: set(new_names))
        refuse_quantised(model, method, [*eligible, *dense_names], absent)
        if method.unselected == "zero":
            refuse_pruned_base(eligible, set(new_tensors(model, new_names)))
        return Selection(
            model,
            method,
            eligible,
            dense_names,
            budget,
            accumulation,
            new_names,
            gradients,
            reducer,
            clip_scope,
            values,
            ties,
        )


def count_budget(model: nn.Module, method: Method, eligible: list[str]) -> int:
    """B: a method's budget among a model's eligible tensors, as a count.

    Raises:
        MethodError: Nothing is eligible, or less than the budget.
    """
    parameters = weights(model)
    available = sum(parameters[name].numel() for name in eligible)
    if method.whole:
        return available
    if not eligible:
        raise MethodError(
            f"scope {method.scope.kind!r} and the patterns leave no tensor for the budget; unmask.full() with include= trains "
            "dense tensors alone."
        )
    if method.budget is None:
        return available
    budget = method.budget.of(sum(p.numel() for p in parameters.values()), available)
    if budget > available:
        raise MethodError(
            f"budget = {method.budget} asks for {budget:,} weights, but only {available:,} are eligible under scope "
            f"{method.scope.kind!r} and the patterns; lower the budget or widen the scope."
        )
    return budget
