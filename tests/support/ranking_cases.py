"""Makes the cases in which the ranking by Triton kernels is compared with one dense sort on the CPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from ledgers import HEURISTICS, SHAPES, a_ledger, densely, ranked_by, some_gradients
from torch import Tensor, nn

from unmask.gradients.factors import Factors
from unmask.methods.heuristics import Heuristic, heuristic
from unmask.ranking.ledger import Layout, Ledger
from unmask.ranking.topk import Ranked
from unmask.ranking.triton_buffer import DTYPES
from unmask.ranking.triton_ranker import TritonRanker


class Rows(Tensor):
    """Is read as a quantised weight is: a run of rows at a time."""


@dataclass(frozen=True)
class Case:
    """One ranking.

    Attributes:
        by: The heuristic.
        keep: The number k of entries to keep.
        coarse: True makes many equal scores.
        small: True makes blocks and buffers so small that a buffer is cut back several times.
        exclude: True leaves out what is unmasked.
        weights: The dtype of the weights.
        gradients: The dtype of the gradients.
        spread: True makes numbers of all magnitudes. Those below the smallest normal number are among them, but not in bfloat16,
            where Triton's interpreter (but no GPU) takes them for zero.
        given: How the tensors are given: ``"plain"``, ``"transposed"``, ``"rows"`` or as ``"factors"``.
        unreached: The tensors that the loss did not reach.
    """

    by: Heuristic
    keep: int = 9
    coarse: bool = False
    small: bool = True
    exclude: bool = True
    weights: torch.dtype = torch.float32
    gradients: torch.dtype = torch.float32
    spread: bool = False
    given: str = "plain"
    unreached: tuple[int, ...] = ()

    @property
    def elsewhere(self) -> bool:
        """True if a GPU must give the same bits: torch's powers differ between devices."""
        return self.by not in SCORED and self.given in ("plain", "transposed")

    def ledger(self) -> Ledger:
        ledger = a_ledger(self.weights, coarse=self.coarse)
        if self.spread:
            for tensor in ledger.layout.tensors:
                tensor.mul_(_scales(tensor.shape, 20).to(tensor.dtype))
        return ledger

    def dense(self, ledger: Ledger) -> list[Tensor] | None:
        """Returns the gradients, zero where the loss did not reach a tensor."""
        if self.by.needs != "gradient":
            return None
        found = [g.to(self.gradients) for g in some_gradients(ledger, self.coarse)]
        if self.spread:
            most = {torch.float16: 20, torch.bfloat16: 100}.get(self.gradients, 140)
            found = [g.mul(_scales(g.shape, most).to(g.dtype)) for g in found]
        if self.given == "factors":
            found[6] = _factors(self.gradients).dense()
        return [g * (index not in self.unreached) for index, g in enumerate(found)]

    def rank(self, device: str = "cpu") -> Ranked:
        ledger = self.ledger()
        gradients = self.dense(ledger)
        layout = ledger.layout
        if device != "cpu":
            ledger, gradients = _moved(ledger, device), gradients and [g.to(device) for g in gradients]
            layout = ledger.layout
        if self.given == "transposed":
            layout.tensors[6] = layout.tensors[6].t().contiguous().t()
            gradients = gradients and [g.t().contiguous().t() if g.ndim == 2 else g for g in gradients]
        if self.given == "rows":
            layout.tensors = [tensor.as_subclass(Rows) if tensor.ndim > 1 else tensor for tensor in layout.tensors]
        if self.given == "factors":
            gradients[6] = _factors(self.gradients)
        order = torch.randperm(len(SHAPES), generator=torch.Generator().manual_seed(self.keep)).tolist()
        ranker = TritonRanker(self.by, ledger, self.keep, 4, self.exclude)
        return ranked_by(ranker, gradients, order, self.unreached)

    def reference(self) -> Ranked:
        ledger = self.ledger()
        return densely(self.by, ledger, self.dense(ledger), self.keep, 4, self.exclude)


def _scales(shape: torch.Size, most: int) -> Tensor:
    """Returns powers of two from 2^-most to 2^most/2."""
    generator = torch.Generator().manual_seed(shape.numel())
    return torch.pow(2.0, torch.randint(-most, most // 2, shape, generator=generator).double()).float()


def _factors(dtype: torch.dtype) -> Factors:
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randn(3, 16, generator=generator).to(dtype) for _ in range(2))
    return Factors(left, right, dtype)


def _moved(ledger: Ledger, device: str) -> Ledger:
    layout = Layout(ledger.layout.names, [tensor.to(device) for tensor in ledger.layout.tensors])
    moved = Ledger(layout, nn.Parameter(ledger.values.detach().to(device)), ledger.budget)
    held = ledger.positions[ledger.positions >= 0].to(device)
    moved.assign(torch.arange(held.numel(), device=device), held, layout.read(held, torch.float32))
    return moved


# A heuristic of a user may return scores with any strides and dtype.
MINE = [
    Heuristic("strided", lambda w, g: torch.stack([g * w, g], -1)[..., 0]),
    Heuristic("one number", lambda w, g: w.new_ones(()).expand(w.shape)),
    Heuristic("double", lambda w, g: (g / w.abs().clamp_min(1e-3)).double()),
]
FORMULAS = [heuristic("gradient"), heuristic("snip"), *(heuristic("d3", eps=0.3, exp=e) for e in (-1.0, 0.0, 1.0, 2.0))]
SCORED = [heuristic("d3", exp=0.5), heuristic("d3", exp=-2.0), heuristic("d3", exp=0.3)]  # by torch


def cases() -> dict[str, Case]:
    found = {}
    for by in [*HEURISTICS, *MINE, *SCORED]:
        found[f"{by.name}-{dict(by.parameters)}"] = Case(by, spread=by in SCORED)
    for name, keep, coarse in itertools.product(("d3", "constant", "small_magnitude"), (1, 20, 1000), (False, True)):
        found[f"{name}, k {keep}, {'ties' if coarse else 'distinct'}"] = Case(heuristic(name), keep, coarse)
    for by, weights, gradients in itertools.product(FORMULAS, DTYPES, DTYPES):
        if weights == gradients or weights == torch.float32:
            name = f"bits of {by.name}-{dict(by.parameters)}, {weights} {gradients}"
            found[name] = Case(by, 1000, small=False, weights=weights, gradients=gradients, spread=True)
    d3 = heuristic("d3")
    for given in ("transposed", "rows", "factors"):
        found[given] = Case(d3, given=given)
    found["float64 gradients"] = Case(d3, gradients=torch.float64)
    found["zeros of both signs"] = Case(MINE[0], 150, coarse=True)
    found["large blocks"] = Case(d3, small=False)
    found["all compete"] = Case(d3, exclude=False)
    found["unreached"] = Case(d3, 1000, unreached=(2, 6))
    found["unreached, but they have a score"] = Case(MINE[0], 1000, unreached=(2, 6))
    found["k of none"] = Case(d3, 0)
    return found
