"""Draw: the seed of a random mask, from which its indices are drawn again, so that a file need not store them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.delta.sparse import SparseTensor
from unmask.methods.draw import MOST, draw
from unmask.ranking.ledger import Layout
from unmask.reading import Malformed


@dataclass(frozen=True)
class Draw:
    """The draw of a random mask: its seed, and where each tensor lies among the weights that it was drawn from.

    ``docs/methods.md`` specifies the draw. Fewer weights of the same seed are the first ones of the same draw.

    Attributes:
        seed: The seed, as a whole number of 64 bits with a sign.
        total: The number of weights that it was drawn from.
        starts: The position of each tensor's first weight among them, by name. They ascend with the names.
    """

    seed: int
    total: int
    starts: Mapping[str, int]

    @classmethod
    def of(cls, method: Mapping[str, Any] | None, layout: Layout) -> Draw | None:
        """Returns the draw of a method, as `unmask.Method.describe` gives it; None for a method that is no such draw.

        The indices of the method's delta need not be the draw's: `to_json` compares them. A draw that has left out the weights of
        other deltas would need those deltas to be repeated, so it is none either.
        """
        if method is None or method["heuristic"] != "random" or method["allocation"] != "global":
            return None
        if layout.free != layout.total:
            return None
        seed = (int(method["parameters"].get("seed", 0)) + 2**63) % 2**64 - 2**63
        return cls(seed, layout.total, dict(zip(layout.names, layout.starts, strict=True)))

    def indices(self, count: int, names: Sequence[str]) -> tuple[dict[str, NDArray[np.int64]], str]:
        """Draws ``count`` weights, at most half of all, in time and memory of order ``count``.

        Args:
            count: The number of weights.
            names: The tensors that have all of these weights, sorted.

        Returns:
            The flat indices by name, ascending, and the SHA-256 of all positions, in hex. If the names are not all that have
            these weights, some are left out or lie behind the end of a tensor.

        Raises:
            Malformed: There are fewer than two weights for each one to draw, or more than 2^40.

        Example:
            >>> found, _ = Draw(0, 10, {"a": 0, "b": 4}).indices(4, ["a", "b"])
            >>> found["a"].tolist(), found["b"].tolist()
            ([2], [0, 2, 5])
        """
        if not 0 <= 2 * count <= self.total <= MOST:
            raise Malformed(f"it has {count} weights of a draw from {self.total}")
        positions = np.sort(draw(count, self.total, self.seed))
        starts = [self.starts[name] for name in names]
        edges = [*np.searchsorted(positions, np.array(starts, dtype=np.int64)).tolist(), count]
        found = {
            name: positions[low:high] - start
            for name, start, low, high in zip(names, starts, edges[:-1], edges[1:], strict=True)
        }
        return found, hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()

    def to_json(self, sparse: Mapping[str, SparseTensor]) -> dict[str, Any] | None:
        """Returns what a file's header says in the place of a delta's indices; None if they are not exactly the draw's.

        ``skipped`` has the number of weights between each tensor and the one before it: those of tensors without a drawn weight.
        """
        count, names = sum(entry.numel for entry in sparse.values()), sorted(sparse)
        if not self.starts.keys() >= sparse.keys():
            return None
        try:
            found, digest = self.indices(count, names)
        except Malformed:
            return None
        ends = [0, *(self.starts[name] + math.prod(sparse[name].shape) for name in names)]
        skipped = [self.starts[name] - end for name, end in zip(names, ends, strict=False)]
        same = all(np.array_equal(found[name], sparse[name].indices.cpu().numpy()) for name in names)
        if not same or min(skipped, default=0) < 0 or ends[-1] > self.total:
            return None
        return {"seed": self.seed, "total": self.total, "skipped": skipped, "sha256": digest}
