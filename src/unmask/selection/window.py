"""Collects the gradients of the slots between two optimizer steps, and makes the tentative selection of the coming step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.distributed.reducer import ProcessReducer
from unmask.errors import NonFiniteGradientError, SelectionError
from unmask.gradients.backend import backend_of
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors, as_dense, forget, gradient_at, total_norm
from unmask.gradients.receiver import in_pieces, stale
from unmask.methods.method import Method
from unmask.ranking.ledger import Ledger
from unmask.ranking.plan import Plan
from unmask.ranking.ranker import Ranker, Ranking
from unmask.ranking.topk import Ranked, in_order
from unmask.ranking.unwaiting import new_ranker
from unmask.selection.refusals import Options

OVERSAMPLE = 4  # candidates kept per entry to be unmasked


class Window:
    """The *window*, the time between two optimizer steps: it receives the gradients that the taps see in this time.

    A selection made in a backward is tentative until the optimizer steps: a dropped batch, or a step that a GradScaler skips,
    consumes no budget. Under gradient accumulation the selection is one of two:

    - ``"candidates"``: the first micro-batch ranks all entries and keeps the first ``4 u_t``; their gradients are then summed
      over all micro-batches, and the best u_t by the summed gradient are unmasked. With one micro-batch this is the exact
      selection. The gradients of the unmasked weights are exact either way.
    - ``"exact"``: dense gradients are summed over the micro-batches of a selecting step (N numbers, as in full fine-tuning).

    Each of several processes has a window, and all windows hold the same, since gradients are averaged before they are used.

    Attributes:
        sampled: True if a step that does not select asks for the entries of its slots only.
        measured: True if every step forms all gradients, for their norm.
        plan: What the coming step does.
        norm: The norm of all gradients so far, 0-d; None where it is not measured.
        nonfinite: Says what was not finite in a backward of this window; None if all was finite.
    """

    def __init__(self, ledger: Ledger, method: Method, options: Options, reducer: ProcessReducer) -> None:
        self.ledger, self.values, self.method, self.accumulation = ledger, ledger.values, method, options.accumulation
        self.reducer = reducer
        self.measured = options.clip_scope == "all"
        self.sampled = options.gradients != "dense" and not self.measured
        self._asks = backend_of(ledger.values.device).asks
        self.plan = Plan(0, 0, 0, 0, repeat=False)
        # What `at_entries` depends on, what it returned last, and the objects whose ids are among the former.
        self._lasting: tuple[tuple, dict[int, Entries], tuple] | None = None
        self._inside: dict[int, Entries] = {}  # the entries that this step trains: of a known order, or the last picks
        self._open = torch.empty(0, dtype=torch.int64)  # slots that the newcomers may take
        self._clear()

    def _clear(self) -> None:
        """Makes the window that of a step whose backwards have brought nothing yet."""
        self.norm: Tensor | None = None
        self.nonfinite: str | None = None
        self._parts: list[tuple[Tensor, Tensor]] = []  # slots and gradients that are not in the buffer yet
        self._buffer: Tensor | None = None  # (B,) this backward's gradient of the slots
        self._earlier: Tensor | None = None  # (B,) that of earlier ones: a slot of repeat-S may change twice
        self._added: Tensor | None = None  # (c,) this backward's gradient of the candidates
        self._ranker: Ranking | None = None
        self._candidates: Ranked | None = None
        self._by_tensor: dict[int, Entries] | None = None  # of the candidates; an entry's slot is its place among them
        self._dense: dict[int, Tensor] = {}
        self._norms: dict[int, Tensor] = {}
        self._offered: set[int] = set()

    def start(self, plan: Plan) -> None:
        """Begins a new step's window."""
        self.plan = plan
        self._inside = {} if plan.picked is None or plan.selecting else self.ledger.entries(plan.picked)
        self._clear()
        if plan.selecting and plan.picked is None:
            self._open = plan.open(self.values.device)

    @property
    def due(self) -> int:
        """The number of slots in use after the step: the planned one, or once a backward has selected, the found one."""
        tentative = self.ledger.tentative
        return self.plan.due if tentative is None else self.plan.used + tentative.fresh

    def wanted(self, index: int) -> bool:
        """Returns True if the tensor's gradient is wanted. With nothing to train yet, all are, so that the loss has a graph."""
        if self.plan.selecting or self.measured or self.plan.active == 0:
            return True
        return self._active(index) is not None

    def at_entries(self) -> Mapping[int, Entries] | None:
        """Returns the entries, by tensor, that this step trains; None if it needs whole gradients.

        The same object is returned as long as they stay what they were.
        """
        plan, ledger = self.plan, self.ledger
        if plan.selecting or self.measured:
            return None
        key = plan.active, id(ledger.arrangement), id(plan.picked)
        if self._lasting is None or self._lasting[0] != key:
            found = {index: self._active(index) for index in range(len(ledger.layout.tensors))}
            if plan.active == 0:  # nothing to train yet: no entries of any tensor, so that the loss has a graph
                none = torch.empty(0, dtype=torch.int64, device=self.values.device)
                found = {index: ledger.layout.at(index, none, none) for index in found}
            wanted = {index: entries for index, entries in found.items() if entries is not None}
            self._lasting = key, wanted, (ledger.arrangement, plan.picked)
        return self._lasting[1]

    def factored(self, index: int) -> bool:
        """Returns True if the whole gradient may come as `Factors`."""
        return self.sampled and self._asks

    def _active(self, index: int) -> Entries | None:
        """Returns the tensor's entries that this step trains, without those that it selects; None if there are none."""
        if self.plan.picked is not None:
            return self._inside.get(index)
        members = self.ledger.members(index)
        if members is None or self.plan.active >= self.ledger.held:
            return members
        if index not in self._inside:
            self._inside[index] = members.below(self.plan.active)
        inside = self._inside[index]
        return inside if inside.flat.numel() else None

    def begin(self) -> None:
        """Begins a backward: that of a fresh window if ``values`` carries no gradient, else one more micro-batch."""
        gradient = self.values.grad
        unused = self.measured and self.plan.active + self.plan.newcomers == 0  # no slot is in use: zeros say nothing
        fresh = gradient is None or not (unused or gradient.any())
        self.reducer.begin(self.plan, fresh)
        if self.measured and self.reducer.processes is not None:
            raise SelectionError(
                "clip_scope='all' needs the norm of the mean gradient of all processes, which is not exchanged; use "
                "clip_scope='selected', whose norm is the same in all of them."
            )
        if fresh:
            self.discard()
        if self.norm is not None and self.accumulation != "exact":
            raise SelectionError(
                "clip_scope='all' needs the norm of the sum of all micro-batches' gradients, which accumulation='candidates' "
                "does not keep. Use select(..., accumulation='exact') (N numbers more), or one backward per optimizer step."
            )
        self._buffer = torch.zeros_like(self.values)
        if self.plan.selecting and self.accumulation == "candidates" and self._candidates is None:
            self._ranker, self._offered = self._new_ranker(OVERSAMPLE * self.plan.newcomers), set()
        if self._candidates is not None:
            self._added = torch.zeros_like(self._candidates.payload)

    def collect(self, slots: Tensor, gradient: Tensor) -> None:
        """Takes the gradient (n,) of slots, (n,) int64; they are those of `at_entries` when the forward ran."""
        if self.plan.selecting:
            raise stale()
        if self._buffer is not None:
            self._parts.append((slots, gradient))

    @torch.no_grad()
    def receive(self, index: int, gradient: Tensor | Factors) -> None:
        """Takes one tensor's whole gradient (dense, sparse in rows, or `Factors`).

        Adds the part of its slots, and offers the rest to the ranking.
        """
        if self.accumulation == "exact" and (self.plan.selecting or self.measured):
            copy = index not in self._dense
            whole = as_dense(gradient).to(self.values.dtype, copy=copy)  # sums of bfloat16 would lose bits
            self._dense[index] = whole if copy else self._dense[index].add_(whole)
        if self.plan.selecting and not self.nonfinite:
            try:
                self._offer(index, gradient)
            except NonFiniteGradientError as error:  # an error once the optimizer steps: a GradScaler may skip the step
                self.nonfinite = str(error)
        active = self._active(index)
        if active is not None and self._buffer is not None:
            self._parts.append((active.slots, gradient_at(gradient, active)))
        if self.measured and self.accumulation != "exact":
            if index in self._norms:
                raise in_pieces()
            self._norms[index] = total_norm([as_dense(gradient)])

    @torch.no_grad()
    def end(self) -> None:
        """Ends a backward: settles the tentative selection, and hands the gradient to ``values``."""
        forget()
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if self._parts:
            slots, gradients = zip(*self._parts, strict=True)
            buffer.index_add_(0, torch.cat(slots), torch.cat([gradient.to(buffer) for gradient in gradients]))
            self._parts = []
        if self.plan.active:
            self.reducer.mean(buffer[: self.plan.active])  # only these slots received any
        if self.measured:
            self.norm = total_norm(list((self._dense or self._norms).values())).to(self.values.device)
            if not torch.isfinite(self.norm):
                self.nonfinite = self.nonfinite or "the norm of the whole gradient is not finite"
        if self.nonfinite:
            buffer.fill_(torch.nan)
        elif self.plan.selecting:
            settle = self._settle if self.plan.picked is None else self._settle_kept
            try:
                settle(self._ranked(), buffer)
            except NonFiniteGradientError as error:
                self.nonfinite = str(error)
                buffer.fill_(torch.nan)
        with torch.enable_grad():
            self.values.backward(buffer)

    def abort(self) -> None:
        """Drops the part of a backward that failed. Earlier micro-batches stand, except for dense sums, which it has spoilt."""
        forget()
        self._buffer = self._ranker = self._added = None
        self._offered, self._norms, self._parts = set(), {}, []
        if self._dense:
            self.discard()
            self.values.grad = None

    def discard(self) -> None:
        """Drops the tentative selection: no budget is consumed."""
        self.ledger.withdraw()
        self._clear()

    def _offer(self, index: int, gradient: Tensor | Factors) -> None:
        """Offers a whole gradient to the ranking, or adds its part at the candidates."""
        if self._ranker is not None:
            if index in self._offered:
                raise in_pieces()
            self._offered.add(index)
            self._ranker.rank(index, gradient)
        elif self._candidates is not None and self._added is not None:
            if self._by_tensor is None:
                self._by_tensor = dict(self.ledger.layout.entries(self._candidates.positions))
            if candidates := self._by_tensor.get(index):
                self._added[candidates.slots] += gradient_at(gradient, candidates).to(self._added)

    def _ranked(self) -> Ranked:
        """Returns the first u_t entries by the gradients summed so far."""
        if self.accumulation == "exact":
            ranker = self._new_ranker(self.plan.newcomers)
            for index in sorted(self._dense):
                ranker.rank(index, self._dense[index])
            self._offer_untouched(ranker, set(self._dense))
            return ranker.result()
        if self._ranker is not None:
            self._offer_untouched(self._ranker, self._offered)
            ranked, self._ranker = self._ranker.result(), None
            if ranked.positions.numel():  # otherwise the next micro-batch is the first that ranks
                self._candidates = ranked
            return ranked.first(self.plan.newcomers)
        candidates, added = self._candidates, self._added  # those of the first micro-batch, by their summed gradients
        assert candidates is not None, "a further micro-batch has candidates"
        assert added is not None, "a further micro-batch has candidates"
        self.reducer.mean(added)
        candidates.payload.add_(added)
        if self.method.by_entry:  # otherwise a score needs whole tensors, and the first order stands
            heuristic = self.method.heuristic
            weights = self.ledger.layout.read(candidates.positions, self.ledger.base.dtype)
            candidates = in_order(candidates._replace(scores=heuristic.score(weights, candidates.payload)))
            candidates = candidates.where(~(candidates.scores <= heuristic.floor))  # NaN stays, and is refused later
        return candidates.first(self.plan.newcomers)

    def _offer_untouched(self, ranker: Ranking, offered: set[int]) -> None:
        """Offers the tensors that the loss did not reach, with a gradient of zero."""
        for index in range(len(self.ledger.layout.tensors)):
            if index not in offered:
                ranker.rank_zero(index)

    def _settle(self, ranked: Ranked, buffer: Tensor) -> None:
        """Proposes the best weights for slots, and gives these their gradient.

        Where weights may leave, one of the best that has a slot keeps it, and the others get slots of weights that leave.
        """
        missing = self.plan.newcomers - ranked.positions.numel()
        slots = self._open[: ranked.positions.numel()]
        fresh = slots.numel()  # all are empty if no weight may leave; to count them would make the host wait for a GPU
        if self.plan.exchanging:
            held, best = self.ledger.positions[self._open], ranked.positions.to(self.ledger.positions.device)
            ranked = ranked.where(~torch.isin(ranked.positions, held.to(ranked.positions.device)))
            slots, count = self._open[~torch.isin(held, best)], ranked.positions.numel()
            if count < slots.numel():  # too few weights have a gradient: empty slots go first, the other weights stay
                vacant = slots >= self.plan.used
                slots = torch.cat([slots[vacant], slots[~vacant]])[:count].sort().values
            fresh = int((slots >= self.plan.used).sum().item())
        positions, payload = ranked.positions.to(buffer.device), ranked.payload.to(buffer)
        earlier = self.ledger.tentative
        if earlier is not None and self.values.grad is not None:  # an earlier micro-batch's choice: undo it
            self.ledger.withdraw()
            self.values.grad[earlier.slots] = 0.0 if self._earlier is None else self._earlier[earlier.slots]
            self.values.grad[slots] = 0
        if self.plan.exchanging:
            self._earlier = buffer.clone() if self._earlier is None else self._earlier + buffer
        self.ledger.propose(positions, slots, fresh, missing)
        buffer[slots] = payload

    def _settle_kept(self, ranked: Ranked, buffer: Tensor) -> None:
        """Gives the picks their gradient, and no other slot one. Picks without a slot get the next slots, in order of rank.

        At a step that does not select, the gradient comes from the entries of the last picks.
        """
        earlier = self.ledger.tentative
        if earlier is not None and self.values.grad is not None:  # an earlier micro-batch's choice: undo it
            self.ledger.withdraw()
            self.values.grad[earlier.picked] = 0  # the payload is of all micro-batches
        positions = ranked.positions.to(buffer.device)
        picked = self.ledger.find(positions)
        entering = picked < 0
        positions, missing = positions[entering], self.plan.newcomers - positions.numel()
        slots = torch.arange(self.plan.used, self.plan.used + positions.numel(), device=buffer.device)
        picked[entering] = slots
        buffer[picked] = ranked.payload.to(buffer)
        stay = picked if picked.numel() else self.plan.picked  # no gradient at all: the picks stay
        self.ledger.propose(positions, slots, slots.numel(), missing, stay)

    def _new_ranker(self, keep: int) -> Ranking:
        """Returns a ranking of this step that keeps the first ``keep`` entries."""
        method, plan = self.method, self.plan
        if self.reducer.processes is None:
            return new_ranker(method, self.ledger, keep, plan.step, not plan.repeat)
        return self.reducer.ranking(
            lambda table: Ranker(method.heuristic, table, method.allocation, keep, plan.step, not plan.repeat),
            self.ledger,
        )
