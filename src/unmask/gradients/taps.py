"""Taps: the points of autograd's graph at which the gradient of a frozen tensor is seen once, handed over, and freed."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from unmask.errors import SelectionError
from unmask.gradients.entries import Entries
from unmask.gradients.factors import Factors, PendingGradient, add
from unmask.gradients.tapped import Handler, Site, StandIn, TappedParameter, attach, detach, site_of
from unmask.gradients.writes import Writes


class Receiver(Protocol):
    """The consumer of the gradients that a `TapSet` sees; by default it takes whole gradients.

    For each outermost backward come ``begin`` once, then ``receive`` for each tensor with the sum over all its uses, then
    ``end`` once; if it fails, ``abort``. The sum may come in pieces in two cases: a graph holds forwards from before and after
    another backward, or segments of reentrant checkpointing share a module of a model that is not in training mode. A receiver
    that cannot add up pieces raises `in_pieces`.
    """

    def wanted(self, index: int) -> bool:
        """Returns True if the coming backward needs this tensor's gradient."""

    def entries(self, index: int) -> Entries | None:
        """Returns the entries whose gradient suffices; None if the whole tensor's is needed."""
        return None

    def factored(self, index: int) -> bool:
        """Returns True if the whole tensor's gradient may come as `Factors`."""
        return False

    def begin(self) -> None:
        """Learns that a backward starts."""
        return

    def receive(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        """Takes one tensor's gradient: the whole of it, or (m,) at the entries that its forward was given."""

    def end(self) -> None:
        """Learns that the backward is complete."""
        return

    def abort(self) -> None:
        """Learns that the backward failed, so that what it brought is void."""
        return


class TapSet:
    """The taps of one selection; it gives operations a *proxy* in the place of each tapped tensor.

    Usually the proxy is an alias that requires grad, so autograd differentiates any operation on it. Its backward hands the
    dense gradient over and frees it. Where the receiver asks for some entries only, the proxy is a *placeholder*, a vector of
    as many zeros, whose gradient is that of the entries. An operation then uses the weight through `ByPlaceholder`, or is one
    of ``linear.py`` and ``embedding.py``, which form no dense gradient. A placeholder of one zero stands for a whole tensor,
    whose uses add their gradients to a `PendingGradient`.

    Args:
        tensors: The frozen tensors. Their places in this sequence are their indices in all calls. A tensor that is no
            parameter only gets a `Site`; the code that computes with it must ask for its stand-in.
        receiver: The consumer of the gradients.
        training: Returns True if the model is in training mode. Then an operation under ``no_grad`` may belong to a segment
            that reentrant checkpointing will recompute.

    Attributes:
        owner: The selection. The tapped tensors keep this set alive and the set keeps its selection alive, so that a run goes
            on even if the user drops the selection.
        handlers: The operations that run in torch's place.
        served: The number of operations so far that were given something that brings a gradient.
        writes: The writes to ``values``, from which the tensors get their weights.
        take_in: Brings such writes into the tensors.
        check: Raises an error if the model is no longer the one that was selected from.
        checked: True if `check` has run since the last backward.
        paused: True between `pause` and `resume`, and after `remove`: the tensors are not tapped.
    """

    def __init__(self, tensors: Sequence[Tensor], receiver: Receiver, training: Callable[[], bool]) -> None:
        self.owner: object = None
        self.handlers: dict[Any, Handler] = {}
        self.served = 0
        self.writes: Writes | None = None
        self.take_in: Callable[[], None] | None = None
        self.check: Callable[[], None] = lambda: None
        self.checked = False
        self.paused = False
        self._receiver = receiver
        self._training = training
        self._sites = [Site(self, index, type(tensor)) for index, tensor in enumerate(tensors)]
        self._tensors = list(tensors)
        self._anchor = torch.zeros((), requires_grad=True)  # It makes proxies require grad, and never receives one.
        self._task: weakref.ref[functools.partial[None]] | None = None
        self._uses: Counter[int] = Counter()  # since the last backward
        self._pieces: set[int] = set()  # Tensors that were used twice: a backward may bring their gradient in pieces.
        self._held: dict[tuple[int, int], tuple[Tensor | Factors, Entries | None]] = {}  # Their sums so far.
        self._received = False
        self.resume()

    def remove(self) -> None:
        """Makes every tensor an ordinary one again, for good."""
        self.pause()
        self.owner = None
        self.forget()

    def pause(self) -> None:
        """Makes forwards take the tensors for ordinary frozen ones until `resume`; a backward still brings gradients."""
        self.paused = True
        for tensor in self._tensors:
            detach(tensor)

    def resume(self) -> None:
        """Ends a `pause`."""
        self.paused = False
        for tensor, site in zip(self._tensors, self._sites, strict=True):
            attach(tensor, site)

    def forget(self) -> None:
        """Forgets all uses of the tensors, for an optimizer step is over."""
        self._pieces.clear()
        self._renew()

    def _renew(self) -> None:
        """Makes the next use of each tensor get a new proxy, for a backward is over.

        Autograd runs the nodes made last first. So a proxy that was made just before its layer hands its gradient over just
        after the layer's backward, which keeps the memory low.
        """
        for site in self._sites:
            site.stand_in = None
        self._uses.clear()
        self._held.clear()
        self._received = False
        self.checked = False

    def use(self, parameter: TappedParameter) -> Tensor:
        """Returns what an operation that has no handler gets in a tapped parameter's place."""
        stand_in = self.stand_in(parameter)
        if stand_in is None:
            return parameter
        return stand_in.proxy if stand_in.alias else ByPlaceholder.apply(stand_in.proxy, parameter, stand_in)

    def catch_up(self) -> None:
        """Brings pending writes to ``values`` into the tensors, which are about to be read."""
        if self.writes is not None and self.writes.new and self.take_in is not None:
            self.take_in()

    def stand_in(self, parameter: Tensor) -> StandIn | None:
        """Returns what receives the gradient of the coming operation on a tapped tensor; None if it is not wanted."""
        self.catch_up()
        site = site_of(parameter)
        inside = torch._C._current_graph_task_id() != -1
        if not inside:
            self._discard_dead_task()
        if not torch.is_grad_enabled():
            if not inside and self._training():  # This may be a checkpointed segment, which the backward runs again.
                self._count(site.index)
                self.served += self._receiver.wanted(site.index)
            return None
        if not (self.checked or inside):
            self.check()
        if not self._receiver.wanted(site.index):
            return None
        self.served += 1
        if inside:  # A checkpointed segment is being recomputed: the running backward is the outermost one.
            self._open()
        if site.stand_in is None or not _fits(site.stand_in, parameter):
            site.stand_in = self._new_stand_in(site, parameter)
            if not inside:
                self._count(site.index)
        if site.stand_in.pending is not None:
            site.stand_in.pending.uses += 1
        return site.stand_in

    def _new_stand_in(self, site: Site, parameter: Tensor) -> StandIn:
        entries, pending = self._receiver.entries(site.index), None
        if entries is None:
            if parameter.ndim != 2 or not self._receiver.factored(site.index):
                ordinary = isinstance(parameter, TappedParameter)
                whole = parameter if ordinary else _zeros(parameter, parameter.shape, parameter.dtype)
                return StandIn(Tap.apply(self._anchor, whole, self, site.index, None, None))
            pending = PendingGradient()
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        zeros = _zeros(parameter, (1 if entries is None else entries.flat.numel(),), wide)
        return StandIn(Tap.apply(self._anchor, zeros, self, site.index, entries, pending), entries, pending)

    def _count(self, index: int) -> None:
        self._uses[index] += 1
        if self._uses[index] > 1:
            self._pieces.add(index)

    def hand_over(self, index: int, gradient: Tensor | Factors, entries: Entries | None) -> None:
        """Takes a gradient from the backward of a `Tap`; passes it on, or adds it to the pieces that came before."""
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

    def signal(self) -> None:
        """Counts the running backward, which brings no gradient, as one whose gradients are zero."""
        self._open()
        self._received = True

    def close(self) -> None:
        """Ends the outermost backward: passes on the sums of pieces, and tells the receiver."""
        self._task = None
        held, received = self._held, self._received or bool(self._held)
        for key in sorted(held):
            self._receiver.receive(key[0], *held.pop(key))
        self._renew()
        if received:
            self._receiver.end()

    def _open(self) -> None:
        """Begins the outermost backward, unless it has begun."""
        if self._task is not None and self._task() is not None:
            return
        self._discard_dead_task()
        callback = functools.partial(self.close)  # Autograd alone holds it, until the task ends or fails.
        self._task = weakref.ref(callback)
        torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
        self._receiver.begin()

    def _discard_dead_task(self) -> None:
        """Aborts a backward that failed; autograd has then dropped its callback, and the weak reference is dead."""
        if self._task is not None and self._task() is None:
            self._task = None
            self._renew()
            self._receiver.abort()


def _fits(stand_in: StandIn, parameter: Tensor) -> bool:
    """Returns True if a stand-in is that of the parameter as it is now; a user may have replaced the parameter's data."""
    proxy = stand_in.proxy
    if stand_in.alias and isinstance(parameter, TappedParameter):
        return proxy.data_ptr() == parameter.data_ptr() and proxy.dtype == parameter.dtype
    return proxy.device == parameter.device


def _zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Makes zeros that take no memory: one zero, expanded."""
    return torch.zeros((), dtype=dtype, device=like.device).expand(shape)


class Tap(torch.autograd.Function):
    """The identity on a weight or on a placeholder; its backward hands the gradient over and propagates none."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        anchor: Tensor,
        tensor: Tensor,
        taps: TapSet,
        index: int,
        entries: Entries | None,
        pending: PendingGradient | None,
    ) -> Tensor:
        ctx.taps, ctx.index, ctx.entries, ctx.pending = taps, index, entries, pending
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        whole = gradient.detach() if ctx.pending is None else ctx.pending.take()
        ctx.taps.hand_over(ctx.index, whole, ctx.entries)
        return (None,) * 6


class ByPlaceholder(torch.autograd.Function):
    """The weight, in the place of its placeholder; the backward passes the dense gradient on to the stand-in."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, weight: Tensor, stand_in: StandIn) -> Tensor:  # type: ignore[override]
        ctx.stand_in = stand_in
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.stand_in.pass_on(gradient.coalesce() if gradient.is_sparse else gradient), None, None


def in_pieces() -> SelectionError:
    """Makes the error of a receiver that needs whole gradients and gets one in pieces."""
    return SelectionError(
        "a tensor received its gradient in pieces within one backward, and cannot be ranked by it. If segments of reentrant "
        "checkpointing share a module, call model.train() or checkpoint with use_reentrant=False. If one loss contains "
        "forwards from before and after another backward, run its backward by itself."
    )


def stale() -> SelectionError:
    """Makes the error of a receiver that needs whole gradients and gets some entries."""
    return SelectionError(
        "this backward goes through a forward that ran before the last optimizer step. The current step selects by whole "
        "gradients, which that forward does not give. Run the forward again, or use select(..., gradients='dense')."
    )
