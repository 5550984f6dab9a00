"""Refuses what cannot go together: a method, a model and the options of ``unmask.select``. Every rule stands here.

Two kinds of rules stand elsewhere: what is wrong with a method alone (`unmask.Method`), and what is wrong with a model's memory
(`unmask.selection.storage`).
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass

from torch import nn

from unmask.distributed.sharding import is_sharded
from unmask.errors import MethodError
from unmask.gradients.wrappers import named_parameters
from unmask.methods.method import Accumulation, ClipScope, Exchange, Gradients, Method, check_word
from unmask.selection.eligible import ModelFacts
from unmask.selection.storage import refuse_overlaps


@dataclass(frozen=True)
class Options:
    """The option words of ``unmask.select``; see there.

    Raises:
        MethodError: A word is not known, or ``clip_scope="all"`` meets ``gradients="sampled"``.
    """

    accumulation: Accumulation
    gradients: Gradients
    exchange: Exchange
    clip_scope: ClipScope

    def __post_init__(self) -> None:
        for name, words in (("accumulation", Accumulation), ("gradients", Gradients), ("clip_scope", ClipScope)):
            check_word(name, getattr(self, name), words)
        if self.clip_scope == "all" and self.gradients == "sampled":
            raise MethodError("clip_scope='all' needs the whole gradient at every step; leave gradients='auto'.")


def refuse(method: Method, facts: ModelFacts, options: Options) -> None:
    """Raises a `MethodError` for a selection that cannot work, before anything is changed."""
    refuse_renormalized(facts.model, facts.dense)
    if facts.sharded:
        _refuse_sharded(method, facts, options)
    refuse_overlaps(facts.model, facts.trained)
    method.schedule.check(facts.budget)
    budgeted = sorted(facts.quantised & set(facts.trained))
    if method.whole and budgeted:
        raise MethodError(f"{budgeted[0]!r} is quantised and cannot be trained whole; leave it out with exclude=.")
    if method.heuristic.needs == "calibration" and budgeted:
        raise MethodError(
            f"{budgeted[0]!r} is quantised, and the calibration of {method.heuristic.name!r} would take one float per weight of "
            "it; leave it out with exclude=, or take another method, such as unmask.static_d3."
        )
    # Without quantised weights, the checkpoint need not be read for what it lacks.
    fresh = sorted(facts.quantised & facts.absent) if facts.quantised else []
    if fresh:
        raise MethodError(
            f"{fresh[0]!r} is quantised but not in the base checkpoint, and a delta cannot carry quantised weights; keep new "
            "layers out of the quantisation (transformers: llm_int8_skip_modules=[...] or modules_to_not_convert=[...])."
        )
    _refuse_avoided(method, facts)
    base = sorted(set(facts.eligible) - facts.new()) if method.unselected == "zero" else []
    if base:
        raise MethodError(
            f"{base[0]!r} is a tensor of the base model, and this method prunes what it does not select to zero, which a delta "
            "to that base cannot hold. Select inside added modules only (include='lora_' for a peft LoRA), or name tensors "
            "that the base checkpoint lacks with new=."
        )


def _refuse_avoided(method: Method, facts: ModelFacts) -> None:
    """Refuses to train weights that deltas to avoid set, other than those of a new head, which each task has for itself."""
    set_by_others = {*facts.avoided.entries, *facts.avoided.whole}
    shared = sorted(set(facts.dense) & set_by_others)
    shared = sorted(set(shared) - facts.new()) if shared else []
    if shared:
        raise MethodError(
            f"{shared[0]!r} would be trained whole, and a delta to avoid sets weights of it. Leave it out of dense= (for "
            "unmask.full: of the scope), or leave that delta out of avoid=."
        )
    if method.unselected == "zero" and set_by_others:
        raise MethodError(
            "this method prunes what it does not select to zero, so it cannot leave the weights alone that the deltas in avoid= "
            "set; use pruned='kept'."
        )


def check_exchange(exchange: str, method: Method) -> None:
    """Raises a `MethodError` for an exchange that is not known, or that does not go with the method."""
    check_word("exchange", exchange, Exchange)
    heuristic = method.heuristic
    ranks = heuristic.needs == "gradient" or method.strategy == "repeat"
    if exchange == "candidates" and ranks and not method.by_entry:
        raise MethodError(
            f"exchange = 'candidates' scores single entries by their gradient, which heuristic {heuristic.name!r} under "
            f"allocation {method.allocation!r} does not allow; use exchange='exact'."
        )


def refuse_renormalized(model: nn.Module, dense: Iterable[str]) -> None:
    """Raises a `MethodError` for an embedding with ``max_norm``: every forward rewrites rows of it, selected or not.

    To tensors that are trained, and stored, whole (``dense``), ``max_norm`` does no harm.
    """
    parameters = named_parameters(model)
    whole = {id(parameters[name]) for name in dense}
    for name, module in model.named_modules():
        bounded = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        if bounded and id(module.weight) not in whole:
            raise MethodError(
                f"{name or 'the model'} has max_norm = {module.max_norm}, so every forward rewrites weights that are not "
                "selected; set its max_norm to None, or train it whole with dense=."
            )


def refuse_dead_lora(model: nn.Module, trained: Set[str]) -> None:
    """Raises a `MethodError` for a fixed selection of A alone in LoRAs whose B is zero: no gradient ever reaches A."""
    names = {id(p): name for name, p in named_parameters(model).items()}
    dead = set()
    for module in model.modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict):
            for key in down.keys() & up.keys():
                b = up[key].weight
                if names.get(id(b)) not in trained and not b.detach().any():  # type: ignore[operator, union-attr]
                    dead.add(names.get(id(down[key].weight)))
    if trained and trained <= dead:
        raise MethodError(
            "the selection holds entries of LoRA's A alone, while B starts at zero and stays there, so that nothing can ever be "
            "learnt. Take allocation='tensor' (method.but(...)), which spreads the budget over A and B, or a larger budget."
        )


def _refuse_sharded(method: Method, facts: ModelFacts, options: Options) -> None:
    """Refuses what a model that ``fully_shard`` has sharded does not allow."""
    parameters, heuristic = named_parameters(facts.model), method.heuristic
    whole_tensors = [name for name in facts.dense if is_sharded(parameters[name])]
    plain = [name for name in facts.eligible if not is_sharded(parameters[name])]
    if options.exchange != "exact":
        raise MethodError(f"exchange = {options.exchange!r}; a model sharded by fully_shard needs exchange='exact'.")
    if whole_tensors:
        raise MethodError(
            f"{whole_tensors[0]!r} is sharded and would be trained whole; keep such tensors out of the sharding "
            "(fully_shard(model, ignored_params={...})), and unmask.select reduces their gradients itself."
        )
    if plain:
        raise MethodError(f"{plain[0]!r} is not sharded, others are; leave such tensors out with exclude=.")
    if method.unselected == "zero":
        raise MethodError(
            "a pruned adapter of a sharded model is not supported; use pruned='kept', or do not shard it."
        )
    if method.leaving == "kept":
        raise MethodError(
            "leaving='kept' holds a number for every eligible weight in each process, which sharding is there to avoid; use "
            "leaving='restored', or do not shard the model."
        )
    if not heuristic.elementwise or heuristic.needs == "calibration" or method.allocation != "global":
        raise MethodError(
            f"heuristic {heuristic.name!r} under allocation {method.allocation!r} needs whole tensors, which no process of a "
            "sharded model holds; use an elementwise heuristic without calibration, and allocation='global'."
        )
