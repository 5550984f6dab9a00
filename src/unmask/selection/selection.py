"""Selection: a budget of scalar weights as one trainable vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unmask.delta.base import base_tensors, name_or_path
from unmask.delta.delta import SparseDelta, refuse_diverged
from unmask.delta.fingerprint import digest, fingerprint, same_bits
from unmask.delta.provenance import provenance_of
from unmask.delta.record import before_training, record_delta
from unmask.distributed.sharding import gathered, reshard
from unmask.errors import SelectionError
from unmask.gradients.entries import take
from unmask.gradients.factors import total_norm
from unmask.gradients.sampled import release_buffers
from unmask.gradients.tapped import owner_of
from unmask.gradients.unreached import unwatch_forwards
from unmask.gradients.wrappers import named_parameters
from unmask.methods.method import ClipScope
from unmask.quantised.layers import settle, stored_in, weights
from unmask.selection.parts import Parts
from unmask.selection.state import StateKeeper
from unmask.selection.stepping import unwatch, watch
from unmask.selection.steps import Steps


class Selection:
    """A budget of scalar weights of one model, as one flat trainable vector. `unmask.select` makes it.

    Attributes:
        model: The model. It is frozen, all but ``dense``.
        method: The method.
        ledger: Which weight each slot holds, and what it was before training.
        values: (B,) trainable float32 (float64 for a float64 model), one slot per scalar weight that is or will be
            unmasked, in order of unmasking; slots not in use are 0. It is the master copy of the selected weights: a write into
            it, by an optimizer or by other means, is in the model at the next forward, `delta` and `state_dict` (see
            `writing`). An optimizer's step spends its ``grad``, which is None afterwards: a logger that reads norms takes
            the return value of `unmask.clip_grad_norm_`, or reads before the step. ``model.zero_grad()`` does not reach
            ``values``, and need not. Under ``leaving="kept"`` the vector is (N,), where N counts all eligible weights, since
            any of them may be tuned: it then takes the memory of full fine-tuning, as the paper's repeat-S needs.
        budget: B; for `unmask.full` the number of weights it trains.
        dense: The tensors that are trained whole, outside the budget.
        clip_scope: The norm by which `unmask.clip_grad_norm_` clips.
        facts: The model's tensors as they were when the selection was made: eligible, trained whole, new, quantised, buffers.
        released: True after `release`.
    """

    def __init__(self, parts: Parts, clip_scope: ClipScope, untie: Callable[[], None]) -> None:
        self.facts = parts.facts
        self.model, self.method, self.budget = parts.facts.model, parts.method, parts.facts.budget
        self.ledger, self.values = parts.ledger, parts.ledger.values
        self.dense, self.clip_scope = parts.dense, clip_scope
        self._parts, self._window, self._taps = parts, parts.window, parts.taps
        self._identity, self._outside, self._reducer = parts.identity, parts.outside, parts.reducer
        self._states = StateKeeper(parts)
        self._steps = Steps(parts, self.check_model, self.owns)
        self._untie, self.released = untie, False

    def start(self) -> None:
        """Plans the first step, and serves optimizers and forwards from now on. `unmask.select` calls this last.

        Raises:
            SelectionError: Another process has another selection; this one is released then.
        """
        # Strong references. The tapped tensors keep the taps alive and the taps keep the selection alive, so a run goes on even
        # if the user drops the selection.
        self._taps.owner = self
        for tensor in self.dense:
            tensor.owner = self
        self._taps.check = partial(self._identity.check, places=False)
        self._identity.watch_forwards(self.check_model)
        self._steps.begin()
        self.watch()
        try:
            self._reducer.join()
        except SelectionError:
            self.release()
            raise

    @property
    def step(self) -> int:
        """The number of optimizer steps taken; the next one is step t = ``step``."""
        return self.ledger.step

    @property
    def used(self) -> int:
        """The number of slots in use: b(step - 1), or fewer as long as fewer weights have had a gradient.

        Under ``leaving="kept"`` it is the number of weights ever tuned, in order of first pick.
        """
        return self.budget if self.method.whole else self.ledger.used

    @property
    def in_use(self) -> int:
        """The number of slots that the coming optimizer step trains: the first ``in_use`` of ``values``."""
        return self._steps.in_use

    def parameters(self) -> list[nn.Parameter]:
        """Returns what an optimizer trains: ``values``, then the dense tensors (their float32 masters, if they are half)."""
        return self._steps.parameters()

    def pacing_parameter(self) -> Tensor:
        """Returns the first trained parameter. Each step of an optimizer that holds it advances the schedule by one."""
        return self._steps.pacing_parameter()

    @property
    def indices(self) -> dict[str, Tensor]:
        """Unmasked weights by tensor name: sorted int64 flat (row-major) indices, on the CPU. Tensors with none are left out."""
        if self.method.whole:
            return {d.name: torch.arange(d.parameter.numel()) for d in self.dense}
        return self._named(self.ledger.positions[: self.used])

    @property
    def picked(self) -> dict[str, Tensor]:
        """The weights that had a gradient in the last step, as `indices`.

        Under ``leaving="kept"`` they are the B last picked, of all that were ever tuned; for every other method they are
        ``indices``.

        Example:
            >>> import unmask
            >>> selection = unmask.select(nn.Linear(8, 4), unmask.repeat_d3(budget=3, leaving="kept"))
            >>> optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
            >>> for column in range(2):
            ...     selection.model(torch.eye(8)[column]).sum().backward()
            ...     optimizer.step()
            >>> sum(flat.numel() for flat in selection.picked.values()), selection.budget, selection.used >= 3
            (3, 3, True)
        """
        picked = self.ledger.picked
        return self.indices if picked is None else self._named(self.ledger.positions[picked])

    def _named(self, positions: Tensor) -> dict[str, Tensor]:
        layout = self.ledger.layout
        return {layout.names[index]: flat.cpu() for index, flat, _ in layout.split(positions)}

    @property
    def dense_numel(self) -> int:
        """The number of weights that are trained outside the budget."""
        return 0 if self.method.whole else sum(d.parameter.numel() for d in self.dense)

    def delta(self, base: str | None = None, order: bool = False) -> SparseDelta:
        """Returns what training changed, as an exact delta to the base model.

        Args:
            base: The base model's id or folder, for the metadata; None for the one that the model's config names.
            order: True to keep the order of unmasking too (4 bytes a weight), so that `unmask.analysis` can read off smaller
                budgets.

        Raises:
            SelectionError: ``order`` is asked of repeat-S, which picks weights more than once, the selection was released, or
                the model is no longer what was selected from (`unmask.selection.identity`).
            DeltaError: A trained weight is NaN or infinite.
        """
        self._alive("delta")
        self.check_model()
        self._outside.refuse_uncounted()
        self._identity.check_result()
        if order and self.method.strategy == "repeat":
            raise SelectionError(
                f"{self.method.name} picks weights at every selecting step, the same ones again among them, so there is no "
                "order of unmasking from which a smaller budget could be read; leave order=False."
            )
        reshard(self.model)
        facts, layout, slots = self.facts, self.ledger.layout, self.ledger.snapshot()
        tensors = {name: gathered(tensor) for name, tensor in base_tensors(self.model).items()}
        changed_buffers = {name for name, b in facts.buffers.items() if not same_bits(b, tensors[name])}
        current = {d.name for d in self.dense} | changed_buffers
        refuse_diverged({name: tensors[name] for name in sorted(current)})
        # a tensor that the base lacks is stored as it was before training; its trained entries lie over that
        originals = tensors | before_training(layout, slots, tensors)
        whole = {name: originals[name] for name in current | facts.new()}
        provenance = provenance_of(
            self.model,
            self.method,
            layout,
            budget=self.budget,
            used=self.used,
            step=self.step,
            dense=[d.name for d in self.dense],
            base_id=base or name_or_path(self.model),
            parameters=sum(tensor.numel() for tensor in weights(self.model).values()),
        )
        digests = {name: digest(tensor) for name, tensor in originals.items() if name not in whole}
        return record_delta(layout, slots, whole, fingerprint(digests), provenance, order)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that an exact resume needs next to the optimizer's own state: O(B) tensors and plain values.

        The state is safe for ``torch.save`` and ``torch.load(weights_only=True)``. Take it between steps: the gradients of an
        unfinished accumulation are not part of it.
        """
        self._alive("state_dict")
        # A model that is no longer what was selected from is left alone: ``values`` still hold what was trained.
        if _passes(self._identity.check_structure):
            self.catch_up()
            if _passes(self._identity.check):
                self._outside.refuse_uncounted()
        self._identity.check_dense()
        return self._states.save() | ({"copied": True} if self._outside.copied else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a saved selection on this model, exactly. Nothing is changed if the state does not fit.

        Raises:
            SelectionError: The state is of another method, budget or model.
        """
        self._alive("load_state_dict")
        with self._reducer.loading(state):
            self._identity.check_structure()
            self._states.restore(state)
            self._identity.renew()
        self._outside.copied = bool(state.get("copied", False))
        self._steps.begin()

    def clip_grad_norm_(self, max_norm: float, loss_scale: float = 1.0, others: Sequence[Tensor] = ()) -> Tensor:
        """Scales the gradient of what is trained; see `unmask.clip_grad_norm_`."""
        trained = [*self.parameters(), *others]
        if self.clip_scope == "selected" or self.method.whole:
            return torch.nn.utils.clip_grad_norm_(trained, max_norm)
        measured = self._window.norm
        if measured is None:
            raise SelectionError(
                "there is no gradient to clip: the order is loss.backward(), clip_grad_norm_(selection, ...), optimizer.step()."
            )
        whole = [*(tensor.master for tensor in self.dense), *others]
        norm = total_norm([measured / loss_scale, *(p.grad for p in whole if p.grad is not None)])
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's own clipping uses this formula
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad))
        return norm

    def writing(self) -> AbstractContextManager[None]:
        """Says that a write into ``values`` inside the block puts back no copy from before some weight was unmasked.

        Where the order of unmasking is known from the start (`unmask.pafi`, `unmask.random_mask`, `unmask.fish`), writes need no
        such block. Where gradients pick the weights, a copy of ``values`` made earlier (an average's, Lookahead's) holds 0 for
        the weights that were unmasked since, and writing it back drags them towards 0; so writes outside this block are refused.

        Raises:
            SelectionError: A backward has selected weights that no optimizer step has unmasked yet.

        Example:
            >>> import unmask
            >>> model = nn.Linear(8, 4)
            >>> selection = unmask.select(model, unmask.id3(budget=6, steps=2))
            >>> optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
            >>> model(torch.ones(8)).sum().backward()
            >>> optimizer.step()
            >>> with selection.writing(), torch.no_grad():
            ...     _ = selection.values.clamp_(-0.1, 0.1)
            >>> len(selection.delta())
            3
        """
        self._alive("writing")
        return self._outside.writing()

    @torch.no_grad()
    def weights_of(self, model: nn.Module) -> Tensor:
        """Returns what a copy of the model (an average of it, say) holds where this selection has slots.

        Args:
            model: A module that has the selected tensors under their names.

        Returns:
            (B,), of the dtype of ``values``; 0 for slots not in use. Under `writing`, ``values.copy_(...)`` takes it over.

        Raises:
            SelectionError: A selected tensor is missing, or has another shape.

        Example:
            >>> import copy, unmask
            >>> selection = unmask.select(nn.Linear(8, 4), unmask.random_mask(budget=6))
            >>> torch.equal(selection.weights_of(copy.deepcopy(selection.model)), selection.values)
            True
        """
        layout, parameters = self.ledger.layout, dict(model.named_parameters())
        held = torch.zeros_like(self.values.detach())
        for index, flat, slots in layout.split(self.ledger.positions[: self.ledger.used]):
            name, tensor = layout.names[index], layout.tensors[index]
            other = parameters.get(name)
            if other is None or other.shape != tensor.shape:
                given = "lacks it" if other is None else f"has it with shape {tuple(other.shape)}"
                raise SelectionError(
                    f"{name!r} has selected weights and shape {tuple(tensor.shape)}; the given model {given}. Give a copy of the "
                    "model that was selected from (of an AveragedModel: its .module)."
                )
            held[slots] = take(other.detach(), flat).to(held)
        return held

    def catch_up(self) -> None:
        """Brings writes into ``values``, and into the masters of dense tensors, to the model.

        Forwards, `delta`, `state_dict` and `release` do this by themselves.

        Raises:
            SelectionError: Gradients pick the weights, and the write was not made under `writing`.
        """
        self._outside.catch_up()

    def check_model(self) -> None:
        """Refuses a model that is no longer what was selected from; see `unmask.selection.identity`."""
        self.catch_up()
        self._identity.check()

    def owns(self, parameter: Tensor) -> bool:
        """Returns True if ``parameter`` is a tensor of the model that another parameter stands for in the optimizer."""
        if owner_of(parameter) is self or self.ledger.layout.holds(parameter):
            return True
        rounded = [d.parameter for d in self.dense if d.master is not d.parameter]
        return any(parameter is p for p in [*rounded, *stored_in(self.ledger.layout.tensors)])

    def pause(self) -> None:
        """Lets the model's tensors hold other weights until `resume`; the PEFT method does so for its base.

        A forward takes the tensors for ordinary frozen ones; a backward that waits still arrives.
        """
        self._taps.pause()

    def resume(self) -> None:
        """Ends a `pause`."""
        self._taps.resume()

    def watch(self) -> None:
        """Serves every optimizer's step from now on."""
        watch(self._steps)

    def unwatch(self) -> None:
        """Leaves optimizers alone until `watch`: a step changes nothing of the selection."""
        unwatch(self._steps)

    def leave_forwards(self) -> None:
        """Leaves it to a wrapper, such as a PEFT model, to call `check_model` before each forward."""
        self._identity.leave_to_peft()

    def release(self) -> None:
        """Ends the selection: the model is an ordinary model again, with the trained weights and its own requires_grad flags.

        A quantised layer keeps its sidecar; ``unmask.quantised.detach(model)`` takes it off.
        """
        if self.released:
            return
        self.catch_up()
        self.unwatch()
        self._reducer.leave()
        reshard(self.model)
        self._taps.remove()
        self._parts.dense_gradients.remove()
        settle(self.model, self.ledger.layout.tensors)
        unwatch_forwards(self.model)
        for hook in self._parts.hooks:
            hook.remove()
        for tensor in self.dense:
            tensor.release()
        for name, parameter in named_parameters(self.model).items():
            parameter.requires_grad_(self.facts.flags.get(name, parameter.requires_grad))
        self._identity.release()
        self._untie()
        self.released = True
        release_buffers()  # another selection makes its own again

    def __repr__(self) -> str:
        dense = f", dense={self.dense_numel:,}" if self.dense_numel else ""
        of = f"of {self.budget:,}" if self.ledger.picked is None else f"at {self.budget:,} a step"
        return f"Selection({self.method.name}, used={self.used:,} {of}, step={self.step}{dense})"

    def _alive(self, what: str) -> None:
        if self.released:
            raise SelectionError(f"{what}() after release(): this selection has ended; call it before.")


def _passes(check: Callable[[], None]) -> bool:
    """Returns False if the check raises a `SelectionError`."""
    try:
        check()
    except SelectionError:
        return False
    return True
