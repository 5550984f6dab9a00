"""Keeps what was computed from an input for the next layer, which may have the same one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor


class LastInput(threading.local):
    """The result of a computation on the last input of a thread; the layers of query, key and value have the same input."""

    key: tuple | None = None
    x: Tensor | None = None  # A reference to the input keeps its address from being used by another tensor.
    result: Any = None

    def of(self, x: Tensor, compute: Callable[[Tensor], Any], *options: Any) -> Any:
        """Returns ``compute(x)``, which depends on x and the options alone; keeps it until another input or `forget`."""
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, x._version, *options)
        if self.key != key:
            self.forget()  # The computation may write over the last result, and then fail.
            self.result = compute(x)
            self.key, self.x = key, x
        return self.result

    def forget(self) -> None:
        """Releases the input and the result; the end of a backward calls it."""
        self.key = self.x = self.result = None
