"""Taps: how the gradient of a frozen tensor is seen, once, and dropped, without touching any module.

A tapped parameter stays the same object under the same name; only its class changes, to `TappedParameter`, whose
``__torch_function__`` hands autograd a *proxy* (an alias that requires grad) in its place. So any operation on it is
differentiated by autograd itself, wherever it stands: in a Linear, an LSTM's flat weights, a functional call, a layer
recomputed by gradient checkpointing. The proxy's backward passes the dense gradient on and frees it.

Where the receiver asks for some entries only, the tensor's tap is a *token*: a vector of as many zeros, whose gradient is
that of the entries. The proxy then hangs on the token, and each use's dense gradient is gathered and freed at once; the
operations in ``operations.py`` make the token's gradient without a dense one. A token may also stand for the whole tensor: its
gradient is then no more than the signal that all uses have put theirs into a `Pending`, a linear layer's as `Factors`.

What `TapSet` guarantees to its receiver, per outermost backward: ``begin`` once, then ``receive`` for each tensor with
the sum over all its uses, then ``end`` once; a backward that dies is followed by ``abort``. The sum may come in pieces
where a graph holds forwards from before and after another backward, and where reentrant checkpointing's segments share a
module in a model that is not in training mode: a receiver that cannot add them up raises `in_pieces`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors, Pending, add
from unmask.gradients.sampled import take_gradient
from unmask.gradients.tapped import SITE, Handler, Site, TappedParameter, attach, detach, has_site, is_tapped
from unmask.gradients.writes import Writes


class _EndOfBackward:
    """Runs once when the graph task it was queued on ends; dies with it when that task dies."""

    def __init__(self, taps: TapSet) -> None:
        self.taps = taps

    def __call__(self) -> None:
        self.taps.close()


class TapSet:
    """The taps of one selection.

    Args:
        tensors: Frozen parameters to tap; the index of each is its name in all calls. A tensor that is no parameter is left
            as it is, but for its site: whoever computes with it must ask for its tap.
        receiver: Consumes the gradients.
        training: Says whether the model is in training mode (then an operation under ``no_grad`` may be a segment that
            reentrant checkpointing will recompute).
    """

    def __init__(self, tensors: Sequence[Tensor], receiver: Receiver, training: Callable[[], bool]) -> None:
        self.handlers: dict[Any, Handler] = {}
        self.owner: object = None  # kept alive by the tapped tensors, whoever else forgets it
        self.served = 0  # how often an operation was given something that brings a gradient
        self.writes: Writes | None = None  # into what the tensors get their weights from
        # brings such writes into the tensors, before an operation reads them
        self.take_in: Callable[[], None] | None = None
        self._receiver = receiver
        self._training = training
        self._sites = [Site(self, index, type(tensor)) for index, tensor in enumerate(tensors)]
        self._tensors = list(tensors)
        self._anchor = torch.zeros((), requires_grad=True)  # makes proxies require grad; never receives one
        self._task: weakref.ref[_EndOfBackward] | None = None
        self._uses: Counter[int] = Counter()  # since the last backward
        self._pieces: set[int] = set()  # tensors used more than once: a backward may bring their gradient in pieces
        self._held: dict[tuple[int, int], tuple[Tensor | Factors, Entries | None]] = {}
        self._received = False
        self.check: Callable[[], None] = lambda: None  # asks whether the model still is what was selected from
        self.checked = False  # since the last backward
        self.paused = False
        for tensor, site in zip(tensors, self._sites, strict=True):
            attach(tensor, site)

    def remove(self) -> None:
        """Makes every tensor an ordinary parameter again."""
        for tensor in self._tensors:
            detach(tensor)
        self.owner = None
        self.forget()

    def pause(self) -> None:
        """Until `resume`, a forward takes the tensors for ordinary frozen parameters; a backward that waits still arrives."""
        self.paused = True
        for tensor in self._tensors:
            detach(tensor)

    def resume(self) -> None:
        """Ends a `pause`."""
        self.paused = False
        for tensor, site in zip(self._tensors, self._sites, strict=True):
            attach(tensor, site)

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
            site.tapped = None
        self._uses.clear()
        self._held.clear()
        self._received = False
        self.checked = False

    def use(self, parameter: TappedParameter) -> Tensor:
        """What an operation gets in a tapped parameter's place: a proxy, or the plain tensor."""
        tapped = self.tap(parameter)
        if tapped is None:
            return parameter
        if tapped.entries is not None:
            return Gather.apply(tapped.proxy, parameter, tapped.entries)
        return tapped.proxy if tapped.pending is None else Whole.apply(tapped.proxy, parameter, tapped.pending)

    def catch_up(self) -> None:
        """The tensors are about to be read: they must hold what was written since."""
        if self.writes is not None and self.writes.new and self.take_in is not None:
            self.take_in()

    def tap(self, parameter: Tensor) -> Tapped | None:
        """What an operation's gradient for a tapped tensor goes to; None if it is not wanted."""
        self.catch_up()
        site: Site = parameter.__dict__[SITE]
        inside = torch._C._current_graph_task_id() != -1
        if not inside:
            self._discard_dead_task()
        if not torch.is_grad_enabled():
            if not inside and self._training():
                self._count(site.index)
                self.served += self._receiver.wanted(site.index)  # a checkpointed segment, made again in the backward
            return None
        if not (self.checked or inside):
            self.check()
        if not self._receiver.wanted(site.index):
            return None
        self.served += 1
        if inside:  # recomputation of a checkpointed segment: the running backward is the outermost one
            self._open()
        if site.tapped is None or not _stands_for(site.tapped, parameter):
            site.tapped = self._tapped(site, parameter)
            if not inside:
                self._count(site.index)
        if site.tapped.pending is not None:
            site.tapped.pending.uses += 1
        return site.tapped

    def _tapped(self, site: Site, parameter: Tensor) -> Tapped:
        entries = self._receiver.entries(site.index)
        pending = None
        if entries is None:
            if parameter.ndim != 2 or not self._receiver.factored(site.index):
                whole = parameter if is_tapped(parameter) else _zeros(parameter, parameter.shape, parameter.dtype)
                return Tapped(Tap.apply(self._anchor, whole, site, None, None))
            pending = Pending()
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        zeros = _zeros(parameter, (1 if entries is None else entries.flat.numel(),), wide)
        return Tapped(Tap.apply(self._anchor, zeros, site, entries, pending), entries, pending)

    def _count(self, index: int) -> None:
        self._uses[index] += 1
        if self._uses[index] > 1:
            self._pieces.add(index)

    def fire(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        """A tap's backward ran."""
        self._open()
        if isinstance(gradient, Tensor) and gradient.is_sparse:
            gradient = gradient.coalesce()
        if index in self._pieces:
            key = (index, id(entries))
            held = self._held.get(key)
            self._held[key] = (gradient if held is None else add(held[0], gradient), entries)
        else:
            self._received = True
            self._receiver.receive(index, gradient, entries)

    @property
    def serves(self) -> bool:
        """Whether operations come here; not between `pause` and `resume`, nor after `remove`."""
        return has_site(self._tensors[0])

    def signal(self) -> None:
        """A backward runs that brings no gradient: it counts as one whose gradients are zero."""
        self._open()
        self._received = True

    def close(self) -> None:
        """The outermost backward is complete."""
        self._task = None
        held, received = self._held, self._received or bool(self._held)
        for key in sorted(held):
            self._receiver.receive(key[0], *held.pop(key))
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


def _stands_for(tapped: Tapped, parameter: Tensor) -> bool:
    """Whether the parameter still is the tensor that was tapped: a user may have replaced its data."""
    proxy = tapped.proxy
    if tapped.alias and is_tapped(parameter):
        return proxy.data_ptr() == parameter.data_ptr() and proxy.dtype == parameter.dtype
    return proxy.device == parameter.device


def _zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros without memory of their own."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(shape)


@dataclass(frozen=True)
class Tapped:
    """What stands for a tapped tensor in one forward.

    Attributes:
        proxy: An alias of the tensor, or a token: a vector of zeros.
        entries: The m entries that a token (m,) stands for: its gradient is theirs.
        pending: Where the uses put their gradients; its token (1,) gets a gradient of zero.
    """

    proxy: Tensor
    entries: Entries | None = None
    pending: Pending | None = None

    @property
    def alias(self) -> bool:
        """Whether the proxy may take the tensor's place."""
        return self.entries is None and self.pending is None


class Tap(torch.autograd.Function):
    """Identity on a weight or a token; its backward hands the gradient over instead of propagating it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: Tensor, stand_in: Tensor, site: Site, entries: Entries | None, pending: Pending | None
    ) -> Tensor:
        ctx.site, ctx.entries, ctx.pending = site, entries, pending
        return stand_in.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        whole = gradient.detach() if ctx.pending is None else ctx.pending.take()
        ctx.site.taps.fire(ctx.site.index, whole, ctx.entries)
        return (None,) * 5


class Gather(torch.autograd.Function):
    """A token as the weight it stands for; its backward gathers the dense gradient's entries."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weight: Tensor, entries: Entries) -> Tensor:  # type: ignore[override]
        ctx.entries, ctx.dtype = entries, token.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.coalesce() if gradient.is_sparse else gradient
        return take_gradient(gradient, ctx.entries).to(ctx.dtype), None, None


class Whole(torch.autograd.Function):
    """A token as the weight it stands for; its backward puts the dense gradient into the `Pending`."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, weight: Tensor, pending: Pending) -> Tensor:  # type: ignore[override]
        ctx.pending = pending
        ctx.save_for_backward(token)
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (token,) = ctx.saved_tensors
        ctx.pending.put(gradient.detach().coalesce() if gradient.is_sparse else gradient.detach())
        return torch.zeros_like(token), None, None


class Receiver(Protocol):
    """What consumes the gradients."""

    def wanted(self, index: int) -> bool:
        """Whether this tensor's gradient is wanted in the coming backward."""

    def entries(self, index: int) -> Entries | None:
        """The entries whose gradient suffices; None for the whole tensor's."""

    def factored(self, index: int) -> bool:
        """Whether the whole tensor's gradient may come as `Factors`."""

    def begin(self) -> None:
        """A backward starts."""

    def receive(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        """One tensor's gradient: whole, or (m,) at the entries that its forward was asked for."""

    def end(self) -> None:
        """The backward is complete."""

    def abort(self) -> None:
        """The backward died; what it brought is void."""


def in_pieces() -> SelectionError:
    """The error of a receiver that needs whole gradients."""
    return SelectionError(
        "a tensor received its gradient in pieces within one backward, and cannot be ranked by it. If a module is shared "
        "between segments of reentrant checkpointing, call model.train() or checkpoint with use_reentrant=False; if one loss "
        "contains forwards from before and after another backward, run its backward by itself."
    )


def stale() -> SelectionError:
    """The error of a receiver that needs whole gradients and gets some entries."""
    return SelectionError(
        "this backward goes through a forward that ran before the last optimizer step, and this step selects by whole "
        "gradients, which that forward does not give. Run the forward again, or select(..., gradients='dense')."
    )
