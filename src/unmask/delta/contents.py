"""The fields of a delta, for the modules that `unmask.delta.delta` itself is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from unmask.delta.sparse import SparseTensor

Fields = tuple[dict[str, SparseTensor], dict[str, Tensor], str, dict[str, Any], str]
"""The sparse, whole, base, metadata and places of a delta, in the order in which `unmask.SparseDelta` takes them."""


class DeltaFields(Protocol):
    """The fields of an `unmask.SparseDelta`."""

    @property
    def sparse(self) -> Mapping[str, SparseTensor]: ...

    @property
    def whole(self) -> Mapping[str, Tensor]: ...

    @property
    def base(self) -> str: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def places(self) -> str: ...
