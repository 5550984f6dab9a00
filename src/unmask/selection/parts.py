"""Parts: the finished parts of a selection, which `unmask.select` makes and hands to it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.hooks import RemovableHandle

from unmask.distributed.reducer import ProcessReducer
from unmask.gradients.taps import TapSet
from unmask.methods.method import Method
from unmask.ranking.ledger import Ledger
from unmask.selection.dense import DenseGradients, DenseTensor
from unmask.selection.eligible import ModelFacts
from unmask.selection.identity import Identity
from unmask.selection.outside import OutsideWrites
from unmask.selection.window import Window


@dataclass(frozen=True)
class Parts:
    """The finished parts of a selection, as `unmask.select` makes them."""

    method: Method
    facts: ModelFacts
    ledger: Ledger
    dense: list[DenseTensor]
    reducer: ProcessReducer
    dense_gradients: DenseGradients
    window: Window
    taps: TapSet
    identity: Identity
    outside: OutsideWrites
    hooks: list[RemovableHandle]
