"""Intercepts every operation on a frozen parameter: the parameter stays the same object, and only its class is swapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.gradients.entries import Entries, take_gradient
from unmask.gradients.factors import PendingGradient

SITE = "_unmask_site"  # The attribute of a tapped tensor that holds its `Site`.
# These properties are differentiable. Every other property (shape, grad, requires_grad, ...) is read off the parameter.
_VIEWS = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.H.__get__, torch.Tensor.mH.__get__}  # type: ignore[attr-defined]
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
# These functions concern the parameter as an object, or its memory, and get the parameter itself.
_RAW = (
    {f"__{name}__" for name in ("set", "delete", "setitem", "hash", "repr", "format", "reduce_ex", "len")}
    | {f"__i{name}__" for name in _IN_PLACE}
    | {"register_hook", "register_post_accumulate_grad_hook", "retain_grad", "backward", "detach", "data_ptr"}
    | {"size", "dim", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size", "get_device"}
    | {"is_floating_point", "is_complex", "untyped_storage"}
)
# These of them hand out the parameter's memory, which must then hold what was written to ``values``.
_READ = {torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]

Handler = Callable[..., Any]
"""Runs an operation in torch's place: (function, *args, **kwargs) to its result; NotImplemented leaves it to autograd."""


@dataclass(frozen=True)
class StandIn:
    """The tensor that takes a tapped tensor's place in autograd's graph during one forward, and receives its gradient.

    Attributes:
        proxy: An alias of the tensor; or a placeholder, a vector of zeros that only carries a gradient.
        entries: The m entries that a placeholder (m,) stands for; its gradient is theirs. None if it stands for all.
        pending: The sum that the operations add their gradients to if a placeholder (1,) stands for the whole tensor. The
            placeholder's own gradient is then zero, and only signals that all operations have run.
    """

    proxy: Tensor
    entries: Entries | None = None
    pending: PendingGradient | None = None

    @property
    def alias(self) -> bool:
        """True if the proxy is an alias, which any operation can compute with."""
        return self.entries is None and self.pending is None

    def pass_on(self, gradient: Tensor) -> Tensor:
        """Returns the placeholder's gradient, made of the whole gradient of one use: dense, or sparse in rows and coalesced."""
        if self.entries is not None:
            return take_gradient(gradient, self.entries).to(self.proxy.dtype)
        assert self.pending is not None, "an alias gets its gradient from autograd"
        self.pending.put(gradient.detach())
        return torch.zeros(1, dtype=self.proxy.dtype, device=gradient.device)


class Interceptor(Protocol):
    """Decides what operations get in the place of tapped tensors. It is the `TapSet` of ``taps.py``.

    Attributes:
        owner: The selection that the tensors belong to.
        handlers: The operations that run in torch's place, by torch function.
        in_graph, running, entries_only, sampled, dense, served: See `TapSet`.
    """

    owner: object
    handlers: dict[Any, Handler]
    in_graph: Callable[..., Any] | None
    running: bool
    entries_only: bool
    sampled: bool
    dense: bool
    served: bool

    def stand_in(self, parameter: Tensor, whole: Callable[[Entries], bool] | None = None) -> StandIn | None:
        """Returns what receives the gradient of the coming operation; None if that gradient is not wanted.

        Where ``whole`` says so of the entries that are wanted, it is an alias nevertheless.
        """

    def use(self, parameter: TappedParameter) -> Tensor:
        """Returns what an operation that has no handler gets in the parameter's place."""

    def catch_up(self) -> None:
        """Brings pending writes to ``values`` into the tensors, which are about to be read."""


@dataclass(eq=False, slots=True)
class Site:
    """The facts that a tapped tensor knows about its taps.

    Attributes:
        taps: The set of taps that the tensor belongs to.
        index: The tensor's index in that set.
        kind: The tensor's class before it was tapped.
        part: The stand-in for the tensor's entries while their gradients suffice; None if whole gradients are wanted, or none.
        stand_in: The tensor's stand-in in the running forward, if it has one yet and needs another at the next forward.
        leaf: A stand-in that serves many forwards, once one was made.
    """

    taps: Interceptor
    index: int
    kind: type
    part: StandIn | None = None
    stand_in: StandIn | None = None
    leaf: StandIn | None = None


class TappedParameter(nn.Parameter):
    """A tapped, that is intercepted, parameter: frozen, with a gradient that goes to a selection as soon as it is known.

    Copies and pickles of a tapped parameter are ordinary parameters.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not torch.compiler.is_compiling():
            return _dispatch(func, args, kwargs or {})
        if not torch.compiler.is_dynamo_compiling():  # What stands for the tensors is in the graph already.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        taps = _taps_of((*args, *(kwargs or {}).values()))
        if taps is None or taps.in_graph is None or not (taps.running and taps.entries_only):
            return _outside_compiler(func, args, kwargs or {})
        taps.served = True
        with torch._C.DisableTorchFunctionSubclass():
            return taps.in_graph(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_plain(self).clone(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(_plain(self), requires_grad=False).__reduce_ex__(protocol)


def is_raw(func: Any) -> bool:
    """Returns True if a function changes its first argument, or concerns it as an object, so that no gradient flows to it."""
    name = getattr(func, "__name__", "")
    changes = name.endswith("_") and not name.startswith("__")
    return changes or name in _RAW or (name == "__get__" and func not in _VIEWS)


def _taps_of(values: Iterable[Any]) -> Interceptor | None:
    """Returns the taps of the first tapped parameter among values, or in a list or tuple of them; None if there is none."""
    for value in values:
        if isinstance(value, TappedParameter):
            return site_of(value).taps
        if isinstance(value, list | tuple) and (found := _taps_of(value)) is not None:
            return found
    return None


def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    # `type(...) is` in this file, for a parameter's `isinstance` is a slow function in Python.
    with torch._C.DisableTorchFunctionSubclass():
        # A function that writes into another tensor uses the parameter's value, so only the first argument counts.
        if args and type(args[0]) is TappedParameter and is_raw(func):
            if func in _READ:
                site_of(args[0]).taps.catch_up()
            return func(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            if type(value) is TappedParameter:
                handler = site_of(value).taps.handlers.get(func)
                result = handler(func, *args, **kwargs) if handler and torch.is_grad_enabled() else NotImplemented
                if result is not NotImplemented:
                    return result
                break
        return func(*substitute(args), **(substitute(kwargs) if kwargs else kwargs))


# A compiler must not see the state of taps: its graph breaks here.
_outside_compiler = torch.compiler.disable(_dispatch)  # type: ignore[no-untyped-call]


def _plain(parameter: Tensor) -> Tensor:
    """Returns a tapped parameter's memory as an ordinary tensor."""
    site_of(parameter).taps.catch_up()
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


def substitute(value: Any) -> Any:
    """Returns a value, or a nest of lists, tuples and dicts, with each tapped parameter replaced for an operation."""
    kind = type(value)
    if kind is TappedParameter:
        return site_of(value).taps.use(value)
    if kind is tuple or kind is list:
        return kind([substitute(item) for item in value])
    if kind is dict:
        return {key: substitute(item) for key, item in value.items()}
    return value


def attach(tensor: Tensor, site: Site) -> None:
    """Gives a tensor its site; a parameter is also frozen and gets the class `TappedParameter`.

    A tensor that is no parameter (a quantised weight) is not intercepted: its layer's hook asks for its stand-in.
    """
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(False)
        tensor.__class__ = TappedParameter
    tensor.__dict__[SITE] = site


def detach(tensor: Tensor) -> None:
    """Takes a tensor's site away; a parameter becomes an ordinary one again."""
    site = tensor.__dict__.pop(SITE, None)
    if site is not None and isinstance(tensor, TappedParameter):
        tensor.__class__ = site.kind


def has_site(tensor: Tensor) -> bool:
    """Returns True if a tensor belongs to a set of taps, as a tapped parameter or through its layer's hook."""
    return SITE in tensor.__dict__


def owner_of(tensor: Tensor) -> object:
    """Returns the selection that a tapped parameter belongs to; None for any other tensor."""
    return site_of(tensor).taps.owner if isinstance(tensor, TappedParameter) else None


def site_of(tensor: Tensor) -> Site:
    """Returns the site of a tensor that has one."""
    site: Site = getattr(tensor, SITE)
    return site


def stand_in_of(tensor: Tensor, whole: Callable[[Entries], bool] | None = None) -> StandIn | None:
    """Returns what receives the gradient of the coming operation on a tensor with a site; see `Interceptor.stand_in`."""
    return site_of(tensor).taps.stand_in(tensor, whole)
