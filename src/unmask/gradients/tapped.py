"""Tapped parameters: the same objects, their class swapped, so that every operation on them is seen.

What an operation gets in a parameter's place is its `TapSet`'s to say (``tap.py``); here is how it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from unmask.gradients.taps import Tapped, TapSet

SITE = "_unmask_site"
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

_READ = {torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]  # raw, and they hand the memory out

Handler = Callable[[Any, tuple, dict], Any]  # NotImplemented: autograd shall do it


class Site:
    """One tapped tensor's place in its set."""

    __slots__ = ("index", "kind", "tapped", "taps")

    def __init__(self, taps: TapSet, index: int, kind: type) -> None:
        self.taps = taps
        self.index = index
        self.kind = kind  # the parameter's own class
        self.tapped: Tapped | None = None


class TappedParameter(nn.Parameter):
    """A frozen parameter whose gradient is streamed to a selection. Copies and pickles of it are ordinary parameters."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(_plain(self).clone(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(_plain(self), requires_grad=False).__reduce_ex__(protocol)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler must not see this state: its graph breaks here
def _dispatch(func: Any, args: tuple, kwargs: dict) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if _is_raw(func, args):
            if func in _READ:
                set_of(args[0]).catch_up()
            return func(*args, **kwargs)
        handler = _handler(func, args, kwargs)
        if handler is not None:
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return func(*substitute(args), **substitute(kwargs))


def _plain(parameter: Tensor) -> Tensor:
    set_of(parameter).catch_up()
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
            handlers = value.__dict__[SITE].taps.handlers
            return handlers.get(func) if handlers and torch.is_grad_enabled() else None
    return None


def substitute(value: Any) -> Any:
    """A value, or a nest of them, with every tapped parameter replaced by what an operation gets in its place."""
    if isinstance(value, TappedParameter):
        return value.__dict__[SITE].taps.use(value)
    if type(value) in (list, tuple):
        return type(value)(substitute(item) for item in value)
    if type(value) is dict:
        return {key: substitute(item) for key, item in value.items()}
    return value


def attach(parameter: Tensor, site: Site) -> None:
    """Freezes a parameter and swaps its class; a tensor that is no parameter (a quantised weight) gets its site alone."""
    if isinstance(parameter, nn.Parameter):
        parameter.requires_grad_(False)
        parameter.__class__ = TappedParameter
    parameter.__dict__[SITE] = site


def detach(parameter: Tensor) -> None:
    """Makes it an ordinary parameter again."""
    site = parameter.__dict__.pop(SITE, None)
    if site is not None and is_tapped(parameter):
        parameter.__class__ = site.kind


def is_tapped(parameter: Tensor) -> bool:
    """Whether operations on a tensor are intercepted; if not (a quantised weight), its layer's hook asks for its tap."""
    return isinstance(parameter, TappedParameter)


def owner_of(parameter: Tensor) -> object:
    """The selection that a tapped parameter belongs to; None for any other tensor."""
    return parameter.__dict__[SITE].taps.owner if isinstance(parameter, TappedParameter) else None


def has_site(tensor: Tensor) -> bool:
    """Whether a tensor is tapped, as a parameter or by its layer."""
    return SITE in tensor.__dict__


def set_of(parameter: Tensor) -> TapSet:
    """The set that a tapped parameter, or a tensor that has a site, belongs to."""
    site: Site = parameter.__dict__[SITE]
    return site.taps


def index_of(parameter: TappedParameter) -> int:
    """A tapped parameter's index in its set."""
    site: Site = parameter.__dict__[SITE]
    return site.index
