"""Taps: how the gradient of a frozen tensor is seen, once, and dropped, without touching any module.

A tapped parameter stays the same object under the same name; only its class changes, to `TappedParameter`, whose
``__torch_function__`` hands autograd a *proxy* (an alias that requires grad) in its place. So any operation on it is
differentiated by autograd itself, wherever it stands: in a Linear, an LSTM's flat weights, a functional call, a layer
recomputed by gradient checkpointing. The proxy's backward passes the dense gradient on and frees it.

What `TapSet` guarantees to its receiver, per outermost backward: ``begin`` once, then ``receive`` for each tensor with
the sum over all its uses, then ``end`` once; a backward that dies is followed by ``abort``. The sum may come in pieces
where a graph holds forwards from before and after another backward, and where reentrant checkpointing's segments share a
module in a model that is not in training mode: a receiver that cannot add them up raises `in_pieces`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.errors import SelectionError

_SITE = "_unmask_site"
# Differentiable properties; every other property (shape, grad, requires_grad ...) is read off the parameter itself.
_VIEWS = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.H.__get__, torch.Tensor.mH.__get__}  # type: ignore[attr-defined]
_RAW = (
    {"__get__", "__set__", "__delete__", "__setitem__", "__hash__", "__repr__", "__format__", "__reduce_ex__"}
    | {
        f"__i{name}__"
        for name in (
            "add",
            "sub",
            "mul",
            "truediv",
            "floordiv",
            "mod",
            "pow",
            "and",
            "or",
            "xor",
            "lshift",
            "rshift",
        )
    }
    | {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "detach", "data_ptr"}
    | {"size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "get_device"}
    | {"is_floating_point", "is_complex", "untyped_storage", "__len__"}
)

Handler = Callable[[Any, tuple, dict], Any]


class Receiver(Protocol):
    """What consumes the gradients."""

    def wanted(self, index: int) -> bool:
        """Whether this tensor's gradient is wanted in the coming backward."""

    def begin(self) -> None:
        """A backward starts."""

    def receive(self, index: int, gradient: Tensor) -> None:
        """One tensor's whole gradient."""

    def end(self) -> None:
        """The backward is complete."""

    def abort(self) -> None:
        """The backward died; what it brought is void."""


class Site:
    """One tapped tensor's place in its set."""

    __slots__ = ("index", "kind", "proxy", "taps")

    def __init__(self, taps: TapSet, index: int, kind: type) -> None:
        self.taps = taps
        self.index = index
        self.kind = kind  # the parameter's own class
        self.proxy: Tensor | None = None


class TappedParameter(nn.Parameter):
    """A frozen parameter whose gradient is streamed to a selection. Copies and pickles of it are ordinary parameters."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if _is_raw(func, args):
                return func(*args, **kwargs)
            handler = _handler(func, args, kwargs)
            if handler is not None:
                return handler(func, args, kwargs)
            return func(*_substitute(args), **_substitute(kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_plain(self).clone(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(_plain(self), requires_grad=False).__reduce_ex__(protocol)


def _plain(parameter: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def _is_raw(func: Any, args: tuple) -> bool:
    """Whether a function concerns the parameter as an object; in-place functions of *other* tensors use its value."""
    if not (args and isinstance(args[0], TappedParameter)):
        return False
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func not in _VIEWS
    return name in _RAW or (name.endswith("_") and not name.startswith("__"))


def _handler(func: Any, args: tuple, kwargs: dict) -> Handler | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, TappedParameter):
            handlers = value.__dict__[_SITE].taps.handlers
            return handlers.get(func) if handlers and torch.is_grad_enabled() else None
    return None


def _substitute(value: Any) -> Any:
    if isinstance(value, TappedParameter):
        return value.__dict__[_SITE].taps.use(value)
    if type(value) in (list, tuple):
        return type(value)(_substitute(item) for item in value)
    if type(value) is dict:
        return {key: _substitute(item) for key, item in value.items()}
    return value


class _Tap(torch.autograd.Function):
    """Identity on a weight; its backward hands the gradient over instead of propagating it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: Tensor, site: Site) -> Tensor:  # type: ignore[override]
        ctx.site = site
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.site.taps.fire(ctx.site.index, gradient.detach())
        return None, None, None


class _EndOfBackward:
    """Runs once when the graph task it was queued on ends; dies with it when that task dies."""

    def __init__(self, taps: TapSet) -> None:
        self.taps = taps

    def __call__(self) -> None:
        self.taps.close()


class TapSet:
    """The taps of one selection.

    Args:
        tensors: Frozen parameters to tap; the index of each is its name in all calls.
        receiver: Consumes the gradients.
        training: Says whether the model is in training mode (then an operation under ``no_grad`` may be a segment that
            reentrant checkpointing will recompute).
    """

    def __init__(self, tensors: Sequence[nn.Parameter], receiver: Receiver, training: Callable[[], bool]) -> None:
        self.handlers: dict[Any, Handler] = {}
        self.owner: object = None  # kept alive by the tapped tensors, whoever else forgets it
        self._receiver = receiver
        self._training = training
        self._sites = [Site(self, index, type(tensor)) for index, tensor in enumerate(tensors)]
        self._tensors = list(tensors)
        self._anchor = torch.zeros((), requires_grad=True)  # makes proxies require grad; never receives one
        self._task: weakref.ref[_EndOfBackward] | None = None
        self._uses: Counter[int] = Counter()  # since the last backward
        self._pieces: set[int] = set()  # tensors used more than once: a backward may bring their gradient in pieces
        self._held: dict[int, Tensor] = {}
        self._received = False
        for tensor, site in zip(tensors, self._sites, strict=True):
            _attach(tensor, site)

    def remove(self) -> None:
        """Makes every tensor an ordinary parameter again."""
        for tensor in self._tensors:
            _detach(tensor)
        self.owner = None
        self.forget()

    def forget(self) -> None:
        """An optimizer step is over: nothing is known of any tensor's uses."""
        self._pieces.clear()
        self._renew()

    def _renew(self) -> None:
        """A backward is over: the next use of a tensor starts anew.

        A fresh proxy for every forward keeps the memory low: autograd runs the nodes made last first, so a tap made just
        before its layer fires just after it.
        """
        for site in self._sites:
            site.proxy = None
        self._uses.clear()
        self._held.clear()
        self._received = False

    def use(self, parameter: TappedParameter) -> Tensor:
        """What an operation gets in a tapped parameter's place: a proxy, or the plain tensor."""
        site: Site = parameter.__dict__[_SITE]
        inside = torch._C._current_graph_task_id() != -1
        if not inside:
            self._discard_dead_task()
        if not torch.is_grad_enabled():
            if not inside and self._training():
                self._count(site.index)
            return parameter
        if not self._receiver.wanted(site.index):
            return parameter
        if inside:  # recomputation of a checkpointed segment: the running backward is the outermost one
            self._open()
        if site.proxy is None or site.proxy.data_ptr() != parameter.data_ptr() or site.proxy.dtype != parameter.dtype:
            site.proxy = _Tap.apply(self._anchor, parameter, site)
            if not inside:
                self._count(site.index)
        return site.proxy

    def _count(self, index: int) -> None:
        self._uses[index] += 1
        if self._uses[index] > 1:
            self._pieces.add(index)

    def fire(self, index: int, gradient: Tensor) -> None:
        """A tap's backward ran."""
        self._open()
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if index in self._pieces:
            self._held[index] = self._held[index] + gradient if index in self._held else gradient
        else:
            self._received = True
            self._receiver.receive(index, gradient)

    def close(self) -> None:
        """The outermost backward is complete."""
        self._task = None
        held, received = self._held, self._received or bool(self._held)
        for index in sorted(held):
            self._receiver.receive(index, held.pop(index))
        self._renew()
        if received:
            self._receiver.end()

    def _open(self) -> None:
        if self._task is not None and self._task() is not None:
            return
        self._discard_dead_task()
        callback = _EndOfBackward(self)
        self._task = weakref.ref(callback)
        torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
        self._receiver.begin()

    def _discard_dead_task(self) -> None:
        if self._task is not None and self._task() is None:
            self._task = None
            self._renew()
            self._receiver.abort()


def _attach(parameter: nn.Parameter, site: Site) -> None:
    parameter.requires_grad_(False)
    parameter.__class__ = TappedParameter
    parameter.__dict__[_SITE] = site


def _detach(parameter: nn.Parameter) -> None:
    site = parameter.__dict__.pop(_SITE, None)
    if site is not None:
        parameter.__class__ = site.kind


def in_pieces() -> SelectionError:
    """The error of a receiver that needs whole gradients."""
    return SelectionError(
        "a tensor received its gradient in pieces within one backward, and cannot be ranked by it. If a module is shared "
        "between segments of reentrant checkpointing, call model.train() or checkpoint with use_reentrant=False; if one loss "
        "contains forwards from before and after another backward, run its backward by itself."
    )


def is_tapped(parameter: Tensor) -> bool:
    """Whether a parameter belongs to a live selection."""
    return isinstance(parameter, TappedParameter)


def owner_of(parameter: Tensor) -> object:
    """The selection that a tapped parameter belongs to; None for any other tensor."""
    return parameter.__dict__[_SITE].taps.owner if isinstance(parameter, TappedParameter) else None


def index_of(parameter: TappedParameter) -> int:
    """A tapped parameter's index in its set."""
    site: Site = parameter.__dict__[_SITE]
    return site.index
