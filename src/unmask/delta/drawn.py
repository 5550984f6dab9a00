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

        A delta's indices need not be the draw's: `indices` tells. A draw that has left out the weights of other deltas would need
        those deltas to be repeated, so it is none either.
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
            The flat indices by name, ascending, and the SHA-256 of all positions, in hex. An index may lie behind its tensor's
            end if the weights are of other tensors.

        Raises:
            Malformed: There are fewer than two weights for each one to draw, or more than 2^40, or one is of no tensor.

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
        if edges[0] != 0:
            raise Malformed("a weight of its draw lies in none of its tensors")
        found = {
            name: positions[low:high] - start
            for name, start, low, high in zip(names, starts, edges[:-1], edges[1:], strict=True)
        }
        return found, hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest()

    def digest_of(self, sparse: Mapping[str, SparseTensor]) -> str | None:
        """Returns the SHA-256 of the positions of a delta's weights if they are exactly the draw's, else None."""
        count, names = sum(entry.numel for entry in sparse.values()), sorted(sparse)
        if not self.starts.keys() >= sparse.keys() or 2 * count > self.total:
            return None
        try:
            found, digest = self.indices(count, names)
        except Malformed:
            return None
        same = all(np.array_equal(found[name], sparse[name].indices.cpu().numpy()) for name in names)
        return digest if same else None

    def skipped(self, shapes: Mapping[str, Sequence[int]]) -> list[int]:
        """Returns how many weights lie before each of the named tensors, behind the one before it."""
        ends = [0, *(self.starts[name] + math.prod(shapes[name]) for name in sorted(shapes))]
        return [self.starts[name] - end for name, end in zip(sorted(shapes), ends, strict=False)]
