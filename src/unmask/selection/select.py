"""`select`: starts a `Selection` in five steps: eligible tensors, refusals, ledger, taps, and the watch over the optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unmask.calibration.estimates import estimates
from unmask.delta.delta import SparseDelta
from unmask.delta.live import has_selection
from unmask.distributed.facts import facts_of_method
from unmask.distributed.reducer import ProcessReducer, refused_by_all
from unmask.distributed.sharding import ShardedLayout, catch_up_before_gather
from unmask.errors import MethodError
from unmask.gradients.compiled import in_graph
from unmask.gradients.linear import handlers
from unmask.gradients.taps import TapSet
from unmask.gradients.unreached import watch_forwards
from unmask.gradients.wrappers import bare, named_parameters, refuse_wrappers
from unmask.methods.draw import draw
from unmask.methods.method import Accumulation, ClipScope, Exchange, Gradients, Method
from unmask.methods.scopes import Patterns
from unmask.quantised.layers import reach_biases, settle, weights
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.unwaiting import new_ranker
from unmask.selection.avoid import digest_of_avoided
from unmask.selection.dense import DenseGradients, DenseTensor, catch_up_before_forward
from unmask.selection.eligible import ModelFacts, facts_of
from unmask.selection.identity import Identity
from unmask.selection.outside import OutsideWrites
from unmask.selection.parts import Parts
from unmask.selection.refusals import Options, check_exchange, refuse, refuse_dead_lora
from unmask.selection.selection import Selection
from unmask.selection.storage import refuse_absent, tied
from unmask.selection.window import Window

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
    avoid: SparseDelta | Iterable[SparseDelta] | None = None,
    accumulation: Accumulation = "candidates",
    gradients: Gradients = "auto",
    exchange: Exchange = "exact",
    group: ProcessGroup | None = None,
    clip_scope: ClipScope = "selected",
    values: nn.Parameter | None = None,
) -> Selection:
    """Freezes a model, and makes a budget of its scalar weights trainable as one vector.

    This changes the model until ``release()``: all parameters are frozen (``requires_grad`` is False), the eligible ones get
    another class (``TappedParameter``), which sees their gradients, and hooks on every torch optimizer's ``step`` do the rest.

    Args:
        model: Any module. Its tensors keep their names, shapes and dtypes and always hold the current values. For a compiled
            model, or one in ``DataParallel``, the model inside is taken; names are those of the plain model. Parameters that
            share one memory become one parameter until ``release()``. docs/training.md says what may be changed afterwards.
        method: This says what is unmasked and when, e.g. ``unmask.id3(budget=320_000, steps=1_000)``.
        include: Regular expressions, searched in parameter names: only these tensors are eligible.
        exclude: Regular expressions: these tensors are not eligible.
        dense: Regular expressions: these tensors are trained whole, outside the budget, and reported apart.
        new: Regular expressions: these tensors are not in the base checkpoint (a head with a random init). The delta
            stores them whole, trained or not. None finds them out from a transformers model's checkpoint where it can.
        avoid: Deltas to the same base: the budget is drawn from the weights that they do not set, so that this run's delta and
            theirs can be added in any order (`SparseDelta.__or__`). A random mask is drawn uniformly from what is left. Tensors
            that they store whole are left out. A new head may be trained with ``dense`` nevertheless: each task has its own.
        accumulation: The selection that gradient accumulation makes: ``"candidates"`` (ranked on the first micro-batch, then
            re-ranked by the summed gradients; O(B) memory) or ``"exact"`` (by the summed dense gradients; O(N)). With
            one micro-batch per step both are the exact selection.
        gradients: The way in which steps that select nothing get their gradients: ``"auto"`` (at the selected entries only,
            where that is cheaper than the dense gradient), ``"sampled"`` (wherever there is a way) or ``"dense"``. The three
            agree within rounding.
        exchange: The way in which several processes of ``torch.distributed`` select together: ``"exact"`` (by the reduced
            dense gradient), ``"candidates"`` (the entries that each process's own gradient puts first, ranked by the exact
            mean gradient; few bytes), or ``"none"`` (every process trains by itself).
        group: The processes that train together; None for all of them.
        clip_scope: The norm by which `unmask.clip_grad_norm_` clips: ``"selected"``, or ``"all"`` for that of the gradient of
            every eligible weight. ``"all"`` forms all gradients at every step (``gradients`` is ``"dense"`` then), and with
            several micro-batches it needs ``accumulation="exact"``.
        values: The parameter that becomes the selection's ``values``, for a wrapper whose optimizer is built before the
            selection can start: (B,), or with one slot for each eligible weight under ``leaving="kept"``, on the model's
            device, float32 (float64 for a float64 model). Its contents are dropped. None makes a new one.

    Returns:
        The selection. Give ``selection.parameters()`` to any ``torch.optim`` optimizer; no further call is needed.

    Raises:
        MethodError: The budget exceeds the eligible weights, a pattern finds nothing, the model is selected from already,
            ``values`` does not fit, a delta to avoid belongs to another base or sets weights that ``dense`` would train, a
            wrapper or place of the model does not allow a selection (DDP, FSDP1, DeepSpeed, the meta device), or trained
            tensors overlap in memory.
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
        # A name is most likely meant as the one of a method.
        given = f"the name {method!r}" if isinstance(method, str) else f"a {type(method).__name__}"
        raise MethodError(
            f"select got a {type(model).__name__} and {given}; give a torch module and a method, such as "
            "unmask.id3(budget=1000, steps=100)."
        )
    refuse_wrappers(model)
    model = bare(model)
    if has_selection(model):
        raise MethodError("this model already has a selection; call its release() first.")
    options = Options(accumulation, gradients, exchange, clip_scope)
    check_exchange(exchange, method)
    refuse_absent(model)
    reducer = ProcessReducer(model, exchange, group)
    with tied(model) as untie:  # a tensor of several names is one tensor from here on
        reducer.share_weights(model)
        facts = facts_of(model, method, include, exclude, dense, new, avoid, reducer.sharded is not None)
        refuse(method, facts, options)
        ledger = _start_ledger(facts, method, reducer, values)
        parts = _tap(facts, method, ledger, options, reducer)
        selection = Selection(parts, clip_scope, untie)
        selection.start()
        return selection


def _start_ledger(facts: ModelFacts, method: Method, reducer: ProcessReducer, values: nn.Parameter | None) -> Ledger:
    """Makes the ledger, and gives it all weights at once where their order is known before training.

    The model is not frozen yet: a calibration wants it as it was.
    """
    layout: Layout
    if reducer.sharded is not None and facts.eligible:
        layout = ShardedLayout(facts.model, facts.eligible, reducer.sharded)
    else:
        tensors = weights(facts.model)
        layout = Layout(facts.eligible, [tensors[name] for name in facts.eligible])
    layout.leave_out(facts.avoided.entries)
    slots = facts.budget if facts.eligible else 0
    kept = method.leaving == "kept"
    double = any(tensor.dtype == torch.float64 for tensor in layout.tensors)
    device = named_parameters(facts.model)[facts.trained[0]].device
    size, dtype = layout.total if kept else slots, torch.float64 if double else torch.float32
    zeros = torch.zeros(size, dtype=dtype, device=device)
    if values is None:
        values = nn.Parameter(zeros)
    else:
        for what in ("shape", "dtype", "device"):
            given, needed = getattr(values, what), getattr(zeros, what)
            if given != needed:
                raise MethodError(f"values has {what} {given}; this selection needs {needed}.")
        with torch.no_grad():
            values.copy_(zeros)
        values.grad = None
    ledger = Ledger(layout, values, slots, kept)
    if slots and method.heuristic.needs != "gradient" and method.strategy != "repeat":
        ledger.reserve(known_positions(method, ledger, estimates(facts.model, layout, method, slots)))
        refuse_dead_lora(facts.model, {*facts.dense, *(layout.names[index] for index in ledger.occupied())})
    if method.unselected == "zero":
        ledger.zero_rest()
    return ledger


def known_positions(method: Method, ledger: Ledger, scores: dict[int, Tensor] | None = None) -> Tensor:
    """Returns the positions (B,) int64 that a method without gradients unmasks, in order.

    Where a calibration made ``scores``, by tensor index, they are used up.
    """
    if method.heuristic.needs == "nothing" and method.allocation == "global":
        ranks = torch.from_numpy(draw(ledger.budget, ledger.layout.free, method.heuristic.seed))
        return ledger.layout.numbered(ranks)
    ranker = new_ranker(method, ledger, ledger.budget, 0, False)
    for index in range(len(ledger.layout.tensors)):
        ranker.rank(index, None if scores is None else scores.pop(index, None))
    return ranker.result().positions


def _tap(facts: ModelFacts, method: Method, ledger: Ledger, options: Options, reducer: ProcessReducer) -> Parts:
    """Freezes the model, taps the eligible tensors, puts hooks on the model and tells other processes what they must share."""
    model, parameters = facts.model, named_parameters(facts.model)
    model.requires_grad_(False)
    dense = [DenseTensor(name, parameters[name]) for name in facts.dense]
    dense_gradients = DenseGradients(dense, reducer)
    window = Window(ledger, method, options, reducer)
    training = weakref.ref(model)
    taps = TapSet(ledger.layout.tensors, window, lambda: bool((m := training()) and m.training))
    outside = OutsideWrites(facts, method, ledger, dense, taps)
    taps.sampled, taps.dense = window.sampled, options.gradients != "sampled"
    if method.strategy == "static" and not facts.sharded:
        taps.in_graph = in_graph
    if window.sampled:
        taps.handlers = handlers(dense=options.gradients == "auto")
    settle(model, ledger.layout.tensors)
    hooks = list(reach_biases(model))
    if facts.eligible:
        watch_forwards(model, taps)
    hooks += catch_up_before_forward(model, dense)
    if facts.sharded:
        hooks += catch_up_before_gather(model, taps.catch_up)
    identity = Identity(model, ledger, dense, taps)
    same = facts_of_method(method, ledger.budget) | {"budget": facts.budget, "accumulation": options.accumulation}
    same |= {"the eligible tensors": facts.eligible, "the tensors trained whole": facts.dense}
    same |= {"the weights to avoid": digest_of_avoided(ledger.layout)}
    reducer.expect(same, ledger, {d.name: d.master for d in dense})
    return Parts(method, facts, ledger, dense, reducer, dense_gradients, window, taps, identity, outside, hooks)
