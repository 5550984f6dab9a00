"""Taps: the points of autograd's graph at which the gradient of a frozen tensor is seen once, handed over, and freed."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.gradients.backend import backend_of
from unmask.gradients.collector import Collector
from unmask.gradients.entries import Entries, take_gradient
from unmask.gradients.factors import Factors, PendingGradient, add
from unmask.gradients.receiver import Receiver
from unmask.gradients.tapped import Handler, Site, StandIn, TappedParameter, attach, detach, site_of
from unmask.gradients.writes import Writes


class TapSet:
    """The taps of one selection; it gives operations a *proxy* in the place of each tapped tensor.

    Usually the proxy is an alias that requires grad, so autograd differentiates any operation on it. Its backward hands the
    dense gradient over and frees it. Where the receiver asks for some entries only, the proxy is a *placeholder*, a vector of
    as many zeros, whose gradient is that of the entries; a `Collector` makes it. An operation then uses the weight through
    `ByPlaceholder`, or is one of ``linear.py`` and ``embedding.py``, which form no dense gradient. A placeholder of one zero
    stands for a whole tensor, whose uses add their gradients to a `PendingGradient`.

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
        entries_only: True if the coming backward brings the gradients of some entries; False if it brings whole ones.
        in_graph: Runs an operation inside a compiled graph if ``entries_only`` is True; where it is None, the graph breaks there.
        running: True while a forward of the model runs whose hook has looked after the tensors.
        dense: Allows a product of a linear layer to be dense where only some entries are wanted.
        sampled: True if a placeholder stands for a tensor of which some entries are wanted; otherwise an alias does, and the
            entries are taken from its dense gradient.
        served: True if an operation was given something that brings a gradient since the model's forward began.
        writes: The writes to ``values``, from which the tensors get their weights.
        take_in: Brings such writes into the tensors.
        check: Raises an error if the model is no longer the one that was selected from.
        checked: True if `check` has run since the last backward.
        paused: True between `pause` and `resume`, and after `remove`: the tensors are not tapped.
    """

    def __init__(self, tensors: Sequence[Tensor], receiver: Receiver, training: Callable[[], bool]) -> None:
        self.owner: object = None
        self.handlers: dict[Any, Handler] = {}
        self.in_graph: Callable[..., Any] | None = None
        self.running = self.entries_only = False
        self.sampled = self.dense = True
        self.served = False
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
        self._held: dict[int, Tensor | Factors] = {}  # Their sums so far.
        self._received = False
        self._collector: Collector | None = None
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

    def prepare(self, moved: bool = False) -> None:
        """Asks the receiver what it wants until the next call; a step begins, or tensors have moved or were converted."""
        entries = self._receiver.at_entries()
        self.entries_only = entries is not None
        if entries is None:
            if self._collector is not None:
                self._collector = None
                for site in self._sites:
                    site.part = None
        elif moved or self._collector is None or self._collector.entries is not entries:
            self._collector = Collector(entries, self._tensors, self._collect)
            for site in self._sites:
                site.part = self._collector.parts.get(site.index)

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

    def stand_in(self, parameter: Tensor, whole: Callable[[Entries], bool] | None = None) -> StandIn | None:
        """Returns what receives the gradient of the coming operation on a tapped tensor; see `Interceptor.stand_in`."""
        self.catch_up()
        site = site_of(parameter)
        inside = torch._C._current_graph_task_id() != -1
        if not inside:
            self._discard_dead_task()
        if not torch.is_grad_enabled():
            if not inside and self._training():  # This may be a checkpointed segment, which the backward runs again.
                self._count(site.index)
                self.served |= self._receiver.wanted(site.index)
            return None
        if not (self.checked or inside):
            self.check()
        if self._collector is None:
            if not self._receiver.wanted(site.index):
                return None
        elif site.part is None:
            return None
        self.served = True
        if inside:  # A checkpointed segment is being recomputed: the running backward is the outermost one.
            self._open()
        if site.part is not None and (stand_in := self._of_entries(site, parameter, whole)):
            return stand_in
        if site.stand_in is None or not _fits(site.stand_in, parameter):
            site.stand_in = self._new_stand_in(site, parameter)
            if not inside:
                self._count(site.index)
        if site.stand_in.pending is not None:
            site.stand_in.pending.uses += 1
        return site.stand_in

    def _of_entries(self, site: Site, parameter: Tensor, whole: Callable[[Entries], bool] | None) -> StandIn | None:
        """Returns a stand-in for the entries of a tensor; None if an alias that a `Tap` watches is to stand for all of it."""
        part, ordinary = site.part, type(parameter) is TappedParameter
        assert part is not None, "the tensor has one"
        assert part.entries is not None, "a part stands for entries"
        if self.sampled and not (ordinary and whole is not None and whole(part.entries)):
            if part.proxy.device != parameter.device:
                self.prepare(moved=True)
                part = site.part
            return part
        return self._leaf(site, parameter) if ordinary and not backend_of(parameter.device).asks else None

    def _new_stand_in(self, site: Site, parameter: Tensor) -> StandIn:
        ordinary = type(parameter) is TappedParameter
        if site.part is None and parameter.ndim == 2 and self._receiver.factored(site.index):
            pending = PendingGradient()
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            zero = torch.zeros(1, dtype=wide, device=parameter.device)
            return StandIn(Tap.apply(self._anchor, zero, self, site.index, pending), None, pending)
        if ordinary and not backend_of(parameter.device).asks:
            return self._leaf(site, parameter)
        zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device)  # One zero, expanded, takes no memory.
        tensor = parameter if ordinary else zeros.expand(parameter.shape)
        return StandIn(Tap.apply(self._anchor, tensor, self, site.index, None))

    def _leaf(self, site: Site, parameter: Tensor) -> StandIn:
        """Returns an alias that is a leaf of autograd's graph, and is kept: it takes less of the host's time than a `Tap`."""
        if torch._C._functorch.maybe_current_level() is not None:  # `Tap` refuses a functorch transform
            return StandIn(Tap.apply(self._anchor, parameter, self, site.index, None))
        if site.leaf is None or not _fits(site.leaf, parameter):
            leaf = parameter.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(functools.partial(self._arrived, site))
            site.leaf = StandIn(leaf)
        return site.leaf

    def _arrived(self, site: Site, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None, "autograd has just accumulated it"
        if site.part is None or site.part.entries is None:
            return self.hand_over(site.index, gradient.detach())
        gradient = gradient.detach().coalesce() if gradient.is_sparse else gradient.detach()
        return self._collect(site.part.entries.slots, take_gradient(gradient, site.part.entries))

    def _collect(self, slots: Tensor, gradient: Tensor) -> None:
        self._open()
        self._received = True
        self._receiver.collect(slots, gradient)

    def _count(self, index: int) -> None:
        self._uses[index] += 1
        if self._uses[index] > 1:
            self._pieces.add(index)

    def hand_over(self, index: int, gradient: Tensor | Factors) -> None:
        """Takes a whole gradient from a backward; passes it on, or adds it to the pieces that came before."""
        self._open()
        if isinstance(gradient, Tensor) and gradient.is_sparse:
            gradient = gradient.coalesce()
        if index in self._pieces:
            held = self._held.get(index)
            self._held[index] = gradient if held is None else add(held, gradient)
        else:
            self._received = True
            self._receiver.receive(index, gradient)

    def signal(self) -> None:
        """Counts the running backward, which brings no gradient, as one whose gradients are zero."""
        self._open()
        self._received = True

    def close(self) -> None:
        """Ends the outermost backward: passes on the sums of pieces, and tells the receiver."""
        self._task = None
        held, received = self._held, self._received or bool(self._held)
        for index in sorted(held):
            self._receiver.receive(index, held.pop(index))
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


class Tap(torch.autograd.Function):
    """The identity on a weight or on a placeholder; its backward hands the gradient over and propagates none."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        anchor: Tensor,
        tensor: Tensor,
        taps: TapSet,
        index: int,
        pending: PendingGradient | None,
    ) -> Tensor:
        ctx.taps, ctx.index, ctx.pending = taps, index, pending
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        whole = gradient.detach() if ctx.pending is None else ctx.pending.take()
        ctx.taps.hand_over(ctx.index, whole)
        return (None,) * 5


class ByPlaceholder(torch.autograd.Function):
    """The weight, in the place of its placeholder; the backward passes the dense gradient on to the stand-in."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, weight: Tensor, stand_in: StandIn) -> Tensor:  # type: ignore[override]
        ctx.stand_in = stand_in
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.stand_in.pass_on(gradient.coalesce() if gradient.is_sparse else gradient), None, None
