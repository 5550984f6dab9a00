"""Checks that a model still is what was selected from: the same tensors in the same places, with the same shapes and values."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from unmask.distributed.sharding import ShardedLayout
from unmask.errors import SelectionError
from unmask.gradients.entries import take
from unmask.gradients.taps import TapSet
from unmask.gradients.wrappers import has_memory, named_parameters, persistent_buffers
from unmask.ranking.ledger import Ledger
from unmask.selection.dense import DenseTensor

_WAY = (
    "Nothing was trained since. Change a model first and select from it afterwards: selection.release() makes it an ordinary "
    "model again."
)
_STATE = " selection.state_dict() still holds what was trained; load_state_dict() continues it on the unchanged base."


class _Seen:
    """The shape and place of a tensor when it was last found right.

    Attributes:
        first: The rounding step of its dtype when the selection was made.
        coarsest: The coarsest rounding step that it has had since.
    """

    __slots__ = ("coarsest", "device", "dtype", "first", "pointer", "shape", "storage", "tensor")

    def __init__(self, tensor: Tensor, before: _Seen | None = None) -> None:
        step = torch.finfo(tensor.dtype).eps
        self.first: float = step if before is None else before.first
        self.coarsest: float = step if before is None else max(step, before.coarsest)
        self.tensor, self.shape, self.dtype, self.device = tensor, tensor.shape, tensor.dtype, tensor.device
        self.pointer = tensor.data_ptr()
        self.storage = StorageWeakRef(tensor.untyped_storage())  # memory that is used again is not taken for the same


class Identity:
    """Remembers what a model was when a selection was made from it, and finds what has changed.

    Torch lets a model be changed under a selection: a layer is replaced, an embedding resized, weights are converted or loaded.
    Each forward, optimizer step and delta looks again. Changes that a selection can follow are followed (another dtype or
    device, other memory with the same values); all others are refused before anything is trained. While the taps are paused,
    the model may differ.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, dense: Sequence[DenseTensor], taps: TapSet) -> None:
        self._model, self._ledger, self._taps = model, ledger, taps
        layout, named = ledger.layout, named_parameters(model)
        own = [] if isinstance(layout, ShardedLayout) else list(zip(layout.names, layout.tensors, strict=True))
        own += [(d.name, d.parameter) for d in dense]
        self._own = {id(t): name for name, t in own if isinstance(t, nn.Parameter)}
        others = {} if isinstance(layout, ShardedLayout) else {id(p): n for n, p in named.items() if has_memory(p)}
        self._tracked = others | self._own
        self._objects = [p for p in named.values() if id(p) in self._tracked]  # kept alive, so that no id is used again
        self._names = {*named, *persistent_buffers(model)}
        self._look_around()
        with torch._C.DisableTorchFunctionSubclass():
            self._seen = {i: _Seen(t) for i, t in enumerate(layout.tensors) if has_memory(t) and id(t) in self._own}
            self._dense = [(d, _Seen(d.parameter)) for d in dense]
        self.renew()
        self._started = self._in_peft = self._released = False
        self._hook: RemovableHandle | None = None

    def watch_forwards(self, check: Callable[[], None]) -> None:
        """Calls ``check`` before each forward of the model. The model then keeps the selection alive whose method it is."""
        hooks = self._model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]  # a copy has that of its original
        self._hook = self._model.register_forward_pre_hook(_Hook(check))

    def leave_to_peft(self) -> None:
        """Leaves forwards alone: a PEFT model asks at each of them, and may wrap modules while one of its adapters trains."""
        if self._hook is not None:
            self._hook.remove()
        self._in_peft = True  # a PEFT fingerprint is that of the base as it was converted last
        self._tracked = dict(self._own)
        self._objects = [p for p in self._objects if id(p) in self._own]
        self._look_around()

    def release(self) -> None:
        """Ends all checks."""
        self._released = True
        if self._hook is not None:
            self._hook.remove()

    def check(self, places: bool = True) -> None:
        """Checks that all is as it was, and follows the changes that a selection can follow.

        Args:
            places: True to check also where the tensors are. This is no use at the moment when an operation uses a tensor,
                which then may be on its way to another place (`torch.nn.utils.weight_norm`).

        Raises:
            SelectionError: The model was changed in a way that the selection cannot follow.
        """
        if self._released or self._taps.paused:
            return
        with torch._C.DisableTorchFunctionSubclass():
            if places:
                self._check_places()
            self.check_dense()
            self._follow()
            if not self._started:  # weights may have been loaded through .data, which torch does not count
                for index in self._seen:
                    self._check_values(index)
                self._started = True
        self._taps.checked = True

    def check_structure(self) -> None:
        """Raises a `SelectionError` if a tensor was replaced or has another shape, before values are set."""
        with torch._C.DisableTorchFunctionSubclass():
            self._check_places()
            for index, seen in self._seen.items():
                if seen.tensor.shape != seen.shape:
                    raise _resized(self._ledger.layout.names[index], seen)
            self.check_dense()

    def check_result(self) -> None:
        """Raises a `SelectionError` if the model does not hold what was trained, before a delta is read off it."""
        self.check()
        names = {*named_parameters(self._model), *persistent_buffers(self._model)}
        if names != self._names:
            name = min(names ^ self._names)
            what = "that it did not have" if name in names else "no more that it had"
            raise SelectionError(
                f"the model has a tensor {name!r} {what} at unmask.select(), so no base has its tensors. {_WAY}{_STATE}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            for index in self._seen:
                self._check_values(index)

    def check_dense(self) -> None:
        """Raises a `SelectionError` if a tensor trained whole was resized, or converted and has no master with its values."""
        with torch._C.DisableTorchFunctionSubclass():
            for dense, seen in self._dense:
                parameter = dense.parameter
                if parameter.shape != seen.shape:
                    raise _resized(dense.name, seen)
                if parameter.dtype != seen.dtype and dense.master is parameter:
                    raise SelectionError(
                        f"{dense.name!r} is trained whole as {seen.dtype}, and was converted to {parameter.dtype} after "
                        "unmask.select(): the optimizer holds the tensor itself, so its precise values are lost. Convert a "
                        "model first and select from it afterwards, or convert a copy: "
                        f"copy.deepcopy(model).to({parameter.dtype})."
                    )

    def renew(self) -> None:
        """Takes the model as it is now for right, after a state was loaded."""
        with torch._C.DisableTorchFunctionSubclass():
            self._seen = {index: _Seen(seen.tensor, seen) for index, seen in self._seen.items()}
            for index, seen in self._seen.items():
                self._ledger.layout.versions[index] = seen.tensor._version

    # What is where.

    def _look_around(self) -> None:
        """Remembers which module or parameter is at which place of the model."""
        modules = list(self._model.modules())
        self._edges = [(m._modules, name, child) for m in modules for name, child in m._modules.items()]
        self._leaves = [
            (m._parameters, name, p) for m in modules for name, p in m._parameters.items() if id(p) in self._tracked
        ]

    def _check_places(self) -> None:
        for children, name, child in self._edges:
            if children.get(name) is not child:
                return self._relocate()
        for parameters, name, parameter in self._leaves:
            found = parameters.get(name)
            if found is not parameter and (found is None or isinstance(found, nn.Parameter)):
                return self._relocate()  # torch.func.functional_call puts any other tensor there, for one call
        return None

    def _relocate(self) -> None:
        """Looks for every tensor again. A wrapper may have been put around a module; that leaves the parameters what they are."""
        present = {id(p) for module in self._model.modules() for p in module._parameters.values()}
        gone = sorted(name for key, name in self._tracked.items() if key not in present)
        if gone:
            more = f" (and {len(gone) - 1} more)" if gone[1:] else ""
            raise SelectionError(
                f"{gone[0]!r}{more} was replaced after unmask.select() (by a new layer or parameter, "
                "load_state_dict(assign=True), weight_norm, or sharding), so that the model no longer computes with what the "
                f"selection trains. {_WAY}{_STATE}"
            )
        self._look_around()

    # What the tensors hold.

    def _follow(self) -> None:
        """Follows tensors that were converted, moved or written to; refuses what no base holds."""
        layout, expired, moved = self._ledger.layout, torch.UntypedStorage._expired, False
        touched = [  # four comparisons for each tensor, at every forward and step: in other memory, or written to by others
            index
            for index, seen in self._seen.items()
            if (tensor := seen.tensor)._version != layout.versions[index]
            or tensor.data_ptr() != seen.pointer
            or tensor.shape != seen.shape
            or expired(seen.storage.cdata)
        ]
        for index in touched:
            seen = self._seen[index]
            if seen.tensor.shape != seen.shape:
                raise _resized(layout.names[index], seen)
            rounded = seen.coarsest > max(seen.first, torch.finfo(seen.tensor.dtype).eps)
            if rounded and not self._in_peft:
                raise SelectionError(
                    f"{layout.names[index]!r} is {seen.tensor.dtype}, and was trained as {seen.dtype}, which has rounded its "
                    f"unselected weights: no base holds them. Convert the model back to {seen.dtype}: it trains on."
                )
            if (seen.tensor.dtype, seen.tensor.device) != (seen.dtype, seen.device):
                moved = True
            else:
                self._check_values(index)
            self._seen[index] = _Seen(seen.tensor, seen)
            layout.versions[index] = seen.tensor._version
        if moved:
            ledger, tensors = self._ledger, layout.tensors
            members = [(ledger.members(index), tensors[index]) for index in ledger.occupied()]
            if any(entries and entries.flat.device != tensor.device for entries, tensor in members):
                ledger.rebuild()
            with torch.no_grad():  # round the masters once more into tensors that were converted or moved
                ledger.scatter()
            self._taps.prepare(moved=True)
        for place, (dense, seen) in enumerate(self._dense):
            parameter = dense.parameter
            same_place = parameter.data_ptr() == seen.pointer and parameter.shape == seen.shape
            same_place = same_place and not seen.storage.expired()
            if dense.master is parameter or (same_place and dense.version == parameter._version):
                continue
            if parameter.dtype == seen.dtype and not torch.equal(
                parameter.detach(), dense.master.detach().to(parameter)
            ):
                raise _overwritten(dense.name)
            dense.write()
            self._dense[place] = (dense, _Seen(parameter))

    def _check_values(self, index: int) -> None:
        """Refuses selected weights of a tensor that are neither what ``values`` say nor what they were before training."""
        ledger, layout = self._ledger, self._ledger.layout
        entries = ledger.members(index)
        if entries is None:
            return
        trained, base = ledger.trained()[entries.slots], ledger.base[entries.slots]
        tensor = layout.plain(index)
        expected = torch.where(entries.slots < ledger.used, trained, base).to(tensor.device, tensor.dtype)
        if not torch.equal(take(tensor, entries.flat), expected):
            raise _overwritten(layout.names[index])


def _resized(name: str, seen: _Seen) -> SelectionError:
    return SelectionError(
        f"{name!r} has shape {tuple(seen.tensor.shape)}, and had {tuple(seen.shape)} at unmask.select() "
        f"(resize_token_embeddings, or other data), so that a weight's place means another weight. {_WAY} Resized back, the "
        f"model trains on.{_STATE}"
    )


def _overwritten(name: str) -> SelectionError:
    return SelectionError(
        f"selected weights of {name!r} were written to after unmask.select() (load_state_dict, copy_, another optimizer, or a "
        "conversion to fewer bits and back), and the selection holds other values of them. To load weights, do so before "
        "unmask.select(); to change selected weights, write to selection.values; to put what was trained back into the model, "
        "`with selection.writing(): selection.values.data = selection.values.detach().clone()`."
    )


class _Hook:
    """The model's forward pre-hook. It keeps the selection alive even if the model has lost the selected tensors.

    A copy or pickle of the model has one in its place that does nothing, made of Python's own parts.
    """

    def __init__(self, check: Callable[[], None] | None) -> None:
        self._check = check

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._check is not None and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._check()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes any arguments and returns None
