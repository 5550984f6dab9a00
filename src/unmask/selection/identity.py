"""Whether a model still is what was selected from: the same tensors in the same places, of the same shape, in their values.

Torch lets a model be changed under a selection: a layer is replaced, an embedding resized, weights are converted or loaded.
An `Identity` remembers what was there, and looks again at each forward, each optimizer step and each delta. What a selection can
follow (another dtype or device, other memory with the same values) it follows; the rest is refused before anything is trained.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from unmask.distributed.sharding import ShardedLayout
from unmask.errors import SelectionError
from unmask.gradients.entries import take
from unmask.gradients.wrappers import has_memory, named_parameters, persistent_buffers
from unmask.ranking.ledger import Layout
from unmask.selection.storage import Ties

if TYPE_CHECKING:
    from unmask.selection.selection import Selection

_WAY = (
    "Nothing was trained since. Change a model first and select from it afterwards: selection.release() makes it an ordinary "
    "model again."
)
_STATE = " selection.state_dict() still holds what was trained; load_state_dict() continues it on the unchanged base."


class _Seen:
    """What a tensor looked like when it was last found right."""

    __slots__ = ("coarsest", "device", "dtype", "first", "pointer", "shape", "storage", "tensor")

    first: float
    coarsest: float

    def __init__(self, tensor: Tensor, before: _Seen | None = None) -> None:
        step = torch.finfo(tensor.dtype).eps
        self.first = step if before is None else before.first  # of the dtype at select
        self.coarsest = step if before is None else max(step, before.coarsest)
        self.tensor, self.shape, self.dtype, self.device = tensor, tensor.shape, tensor.dtype, tensor.device
        self.pointer = tensor.data_ptr()
        self.storage = StorageWeakRef(tensor.untyped_storage())  # so that memory used again is not taken for the same

    def in_place(self) -> bool:
        """Whether the tensor still is the same memory, seen alike."""
        tensor = self.tensor
        return tensor.data_ptr() == self.pointer and tensor.shape == self.shape and not self.storage.expired()


class Identity:
    """What a selection's model was when the selection was made.

    Args:
        selection: The selection, complete but for its first step.
        ties: The parameters that were made one; they are put back by `release`.

    Attributes:
        shapes: The eligible tensors' shapes at the time.
    """

    def __init__(self, selection: Selection, ties: Ties) -> None:
        self._selection, self._ties = weakref.ref(selection), ties
        self._model = weakref.ref(selection.model)
        layout, named = selection._layout, named_parameters(selection.model)
        self.shapes = [list(tensor.shape) for tensor in layout.tensors]
        own = [] if isinstance(layout, ShardedLayout) else list(zip(layout.names, layout.tensors, strict=True))
        own += [(d.name, d.parameter) for d in selection.dense]
        self._own = {id(t): name for name, t in own if isinstance(t, nn.Parameter)}
        others = {} if isinstance(layout, ShardedLayout) else {id(p): n for n, p in named.items() if has_memory(p)}
        self._tracked = others | self._own
        self._objects = [p for p in named.values() if id(p) in self._tracked]  # alive, so that no id is used again
        self._names = {*named, *persistent_buffers(selection.model)}
        self._look_around(selection.model)
        with torch._C.DisableTorchFunctionSubclass():
            self._seen = {
                i: _Seen(t) for i, t in enumerate(layout.tensors) if has_memory(t) and id(t) in self._own
            }  # by index
            self._dense = [(d, _Seen(d.parameter)) for d in selection.dense]
        self._remember_versions(layout)
        self._started = self._in_peft = False
        hooks = selection.model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]  # a copy has that of its original
        self._hook = selection.model.register_forward_pre_hook(_Hook(selection))

    def leave_to_peft(self) -> None:
        """A PEFT model asks by itself at each forward, and may wrap modules while one of its adapters trains."""
        self._hook.remove()
        self._in_peft = True  # its fingerprint is of the base as it was converted last
        self._tracked = dict(self._own)
        self._objects = [p for p in self._objects if id(p) in self._own]
        model = self._model()
        if model is not None:
            self._look_around(model)

    def release(self) -> None:
        """The selection has ended."""
        self._hook.remove()
        self._ties.undo()

    def check(self, places: bool = True) -> None:
        """Looks whether all is as it was, and follows what a selection can follow.

        Args:
            places: Whether to look where the tensors are too. One that is used may be on its way to another place
                (`torch.nn.utils.weight_norm`), so that its use is no moment for that.

        Raises:
            SelectionError: The model was changed in a way that the selection cannot follow.
        """
        selection = self._selection()
        if selection is None or selection._released or selection._taps.paused:
            return
        with torch._C.DisableTorchFunctionSubclass():
            if places:
                self._check_places()
            self._check_dense()
            self._follow(selection)
            if not self._started:  # weights may have been loaded through .data, which leaves no trace
                for index in self._seen:
                    self._check_values(selection, index)
                self._started = True
        selection._taps.checked = True

    def check_structure(self) -> None:
        """Looks at places and shapes alone: values are about to be set.

        Raises:
            SelectionError: A tensor was replaced or has another shape.
        """
        selection = self._selection()
        if selection is not None:
            with torch._C.DisableTorchFunctionSubclass():
                self._check_places()
                self._check_shapes(selection._layout)
                self._check_dense()

    def check_result(self) -> None:
        """Looks at everything, the values of all selected weights too: a delta is about to be read off the model.

        Raises:
            SelectionError: What the model holds is not what was trained.
        """
        self.check()
        selection, model = self._selection(), self._model()
        if selection is None or model is None:
            return
        names = {*named_parameters(model), *persistent_buffers(model)}
        if names != self._names:
            name = min(names ^ self._names)
            what = "that it did not have" if name in names else "no more that it had"
            raise SelectionError(
                f"the model has a tensor {name!r} {what} at unmask.select(), so no base has its tensors. {_WAY}{_STATE}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            for index in self._seen:
                self._check_values(selection, index)

    def check_dense(self) -> None:
        """Looks at the tensors trained whole, which a state holds.

        Raises:
            SelectionError: One was resized, or converted without a master that keeps its values.
        """
        with torch._C.DisableTorchFunctionSubclass():
            self._check_dense()

    def renew(self) -> None:
        """Takes what is there now for right: a state was loaded."""
        selection = self._selection()
        if selection is not None:
            with torch._C.DisableTorchFunctionSubclass():
                self._seen = {index: _Seen(seen.tensor, seen) for index, seen in self._seen.items()}
            self._remember_versions(selection._layout)

    # What is where.

    def _look_around(self, model: nn.Module) -> None:
        modules = list(model.modules())
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
                return self._relocate()  # any other tensor is torch.func.functional_call's, for one call
        return None

    def _relocate(self) -> None:
        """Something is elsewhere: a wrapper may have been put around a module, which leaves the parameters what they are."""
        model = self._model()
        if model is None:
            return
        present = {id(p) for module in model.modules() for p in module._parameters.values()}
        gone = sorted(name for key, name in self._tracked.items() if key not in present)
        if gone:
            more = f" (and {len(gone) - 1} more)" if gone[1:] else ""
            raise SelectionError(
                f"{gone[0]!r}{more} was replaced after unmask.select() (by a new layer or parameter, "
                "load_state_dict(assign=True), weight_norm, or sharding), so that the model no longer computes with what the "
                f"selection trains. {_WAY}{_STATE}"
            )
        self._look_around(model)

    def _check_shapes(self, layout: Layout) -> None:
        for index, seen in self._seen.items():
            if seen.tensor.shape != seen.shape:
                raise _resized(layout.names[index], seen)

    # What the tensors hold.

    def _check_dense(self) -> None:
        for dense, seen in self._dense:
            parameter = dense.parameter
            if parameter.shape != seen.shape:
                raise _resized(dense.name, seen)
            if parameter.dtype != seen.dtype and dense.master is parameter:
                raise SelectionError(
                    f"{dense.name!r} is trained whole as {seen.dtype}, and was converted to {parameter.dtype} after "
                    "unmask.select(): the optimizer holds the tensor itself, so its precise values are lost. Convert a model "
                    f"first and select from it afterwards, or convert a copy: copy.deepcopy(model).to({parameter.dtype})."
                )

    def _follow(self, selection: Selection) -> None:
        layout, moved = selection._layout, False
        for index in self._touched(layout):
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
                self._check_values(selection, index)
            self._seen[index] = _Seen(seen.tensor, seen)
            layout.versions[index] = seen.tensor._version
        if moved:
            _write_again(selection)
        for place, (dense, seen) in enumerate(self._dense):
            if dense.master is dense.parameter or (seen.in_place() and dense.version == dense.parameter._version):
                continue
            if dense.parameter.dtype == seen.dtype and not dense.holds_master():
                raise _overwritten(dense.name)
            dense.write()
            self._dense[place] = (dense, _Seen(dense.parameter))

    def _touched(self, layout: Layout) -> list[int]:
        """Tensors that are in other memory, or were written to by others: four comparisons each, at every forward and step."""
        versions, expired = layout.versions, torch.UntypedStorage._expired
        return [
            index
            for index, seen in self._seen.items()
            if (tensor := seen.tensor)._version != versions[index]
            or tensor.data_ptr() != seen.pointer
            or tensor.shape != seen.shape
            or expired(seen.storage.cdata)
        ]

    def _check_values(self, selection: Selection, index: int) -> None:
        """One tensor's selected weights must be what ``values`` say, or what they were before training."""
        table, layout = selection._table, selection._layout
        entries = table.members(index)
        if entries is None:
            return
        trained, base = selection._held()[entries.slots], table.base[entries.slots]
        tensor = layout.plain(index)
        expected = torch.where(entries.slots < selection.used, trained, base).to(tensor.device, tensor.dtype)
        if not torch.equal(take(tensor, entries.flat), expected):
            raise _overwritten(layout.names[index])

    def _remember_versions(self, layout: Layout) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            for index, seen in self._seen.items():
                layout.versions[index] = seen.tensor._version


@torch.no_grad()
def _write_again(selection: Selection) -> None:
    """Tensors were converted or moved: the masters are rounded into them once more."""
    table, layout = selection._table, selection._layout
    members = [(table.members(index), layout.tensors[index]) for index in table.occupied()]
    if any(entries and entries.flat.device != tensor.device for entries, tensor in members):
        table.rebuild()
    table.scatter(selection.values, selection.used)


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
    """The model's forward pre-hook: keeps the selection alive, whose tensors the model may have lost.

    A copy or pickle of the model has one in its place that does nothing, of Python's own.
    """

    def __init__(self, selection: Selection | None) -> None:
        self._selection = selection

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(None)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._selection is not None and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            self._selection.check_model()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes any arguments and returns None
