"""From a live selection to a frozen delta, and which of a model's tensors its base checkpoint lacks."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unmask.delta.added import added_tensors, checkpoint_name
from unmask.delta.delta import SparseDelta, SparseTensor, base_tensors, refuse_diverged
from unmask.delta.fingerprint import digest, fingerprint, same_bits
from unmask.distributed.sharding import gathered, reshard
from unmask.errors import SelectionError
from unmask.gradients.entries import put, take
from unmask.gradients.wrappers import bare, plain_names
from unmask.quantised.layers import weights
from unmask.quantised.tensor import QuantisedTensor
from unmask.reading import fields, mapping, parse_json, read_json, refusing, text
from unmask.version import __version__

if TYPE_CHECKING:
    from unmask.selection.selection import Selection


def record_delta(selection: Selection, base: str | None, order: bool = False) -> SparseDelta:
    """Reads a selection's changes off the model; see `Selection.delta`."""
    selection._identity.check_result()
    slots = _order(selection) if order else {}
    reshard(selection.model)
    tensors = {name: gathered(tensor) for name, tensor in base_tensors(selection.model).items()}
    changed_buffers = {n for n, b in selection._buffers.items() if not same_bits(b, tensors[n])}
    current = {d.name for d in selection.dense} | changed_buffers
    whole_names = current | new_tensors(selection.model, selection._new)
    indices = {name: flat for name, flat in selection.indices.items() if name not in current}
    sparse = {
        name: SparseTensor(flat, take(tensors[name], flat).cpu(), tuple(tensors[name].shape), slots.get(name))
        for name, flat in indices.items()
    }
    originals = _originals(selection, tensors)
    digests = {name: digest(originals.get(name, tensors[name])) for name in tensors if name not in whole_names}
    refuse_diverged({name: tensors[name] for name in sorted(current)})
    # of a tensor that the base lacks, what it was before training: its trained entries lie over that
    whole = {name: originals.get(name, tensors[name]).cpu().clone() for name in sorted(whole_names)}
    return SparseDelta(sparse, whole, fingerprint(digests), _metadata(selection, base))


def _order(selection: Selection) -> dict[str, Tensor]:
    """Each unmasked weight's slot, by tensor name, in the order of `Selection.indices`."""
    if selection.method.strategy == "repeat":
        raise SelectionError(
            f"{selection.method.name} picks weights at every selecting step, the same ones again among them, so there is no "
            "order of unmasking from which a smaller budget could be read; leave order=False."
        )
    positions = selection._table.positions[: selection.used]
    return {selection._layout.names[i]: places.cpu() for i, _, places in selection._layout.split(positions)}


def _originals(selection: Selection, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base's version of every tensor that has trained entries (buffers that changed are stored whole)."""
    table, layout = selection._table, selection._layout
    originals: dict[str, Tensor] = {}
    for index, flat, slots in layout.split(table.positions[: selection.used]):
        name = layout.names[index]
        originals[name] = tensors[name].clone()
        put(originals[name], flat, table.base[slots])
    return originals


def _metadata(selection: Selection, base: str | None) -> dict[str, Any]:
    tensors = weights(selection.model)
    kinds = sorted({t.sidecar.source.kind for t in tensors.values() if isinstance(t, QuantisedTensor)})
    return {
        "method": selection.method.describe(),
        "budget": selection.budget,
        "used": selection.used,
        "step": selection.step,
        "eligible": {"tensors": len(selection._layout.names), "weights": selection._layout.total},
        "dense": [d.name for d in selection.dense],
        "base_id": base or name_or_path(selection.model),
        "parameters": sum(p.numel() for p in tensors.values()),
        **({"quantised": kinds} if kinds else {}),
        "versions": {"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def name_or_path(model: nn.Module) -> str | None:
    """The id or folder a transformers model was loaded from, if it says."""
    config = getattr(model, "config", None)
    return getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None) or None


def new_tensors(model: nn.Module, named: Iterable[str] | None) -> set[str]:
    """Tensors that the base checkpoint lacks, so that a delta must hold every value of theirs.

    Args:
        model: The model, as it trains.
        named: Those that the user named; None for those that the checkpoint is found to lack.
    """
    return added_tensors(model) | (missing_from_checkpoint(model) if named is None else set(named))


def missing_from_checkpoint(model: nn.Module) -> set[str]:
    """Names of parameters and buffers that a transformers model's safetensors checkpoint lacks, such as a new head.

    Empty where this cannot be found out (no such checkpoint), and where the checkpoint's names differ throughout from the
    model's (a converted layout), so that they tell nothing: name such tensors with ``unmask.select(..., new=...)``. Of a module
    that holds transformers models, the tensors that these lack. What a
    PEFT library added is none of it: see `unmask.delta.added.added_tensors`.
    """
    model = bare(model)
    if not name_or_path(model):
        inside = _pretrained_inside(model)
        return {f"{place}.{name}" for place, part in inside.items() for name in missing_from_checkpoint(part)}
    source = name_or_path(model)
    stored = _stored_names(source) if source else set()
    if not stored:
        return set()
    prefix = str(getattr(model, "base_model_prefix", "") or "") + "."
    added = added_tensors(model)
    tensors = {name: tensor for name, tensor in base_tensors(model).items() if name not in added}

    def is_stored(name: str) -> bool:
        name = checkpoint_name(name)
        return name in stored or name.removeprefix(prefix) in stored or prefix + name in stored

    missing = {name for name in tensors if not is_stored(name)}
    share = sum(tensors[name].numel() for name in missing) / max(1, sum(t.numel() for t in tensors.values()))
    return missing if share < 0.5 else set()


def _pretrained_inside(model: nn.Module) -> dict[str, nn.Module]:
    """The transformers models that another module holds (a LightningModule, say), by their place in it."""
    found: dict[str, nn.Module] = {}
    plain = plain_names(model)
    for place, module in model.named_modules():
        inner = bare(module)
        outermost = not any(f"{plain(place)}.".startswith(f"{outer}.") for outer in found)
        if outermost and hasattr(inner, "base_model_prefix") and name_or_path(inner):
            found[plain(place)] = inner
    return found


def _stored_names(source: str) -> set[str]:
    names: set[str] = set()
    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = _local_file(source, file)
        if path is None:
            continue
        with refusing(SelectionError, f"the base's checkpoint {str(path)!r}", "Take another copy of the base."):
            if path.suffix == ".json":
                return set(fields({"weight_map": mapping(text)})(read_json(path), "the index")["weight_map"])
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                held = stream.read(min(length, path.stat().st_size))
            names = set(fields({})(parse_json(held), "its header")) - {"__metadata__"}
    return names


def _local_file(source: str, file: str) -> Path | None:
    if Path(source).is_dir():
        path = Path(source, file)
        return path if path.is_file() else None
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, file)
    except HFValidationError:  # a folder that has since gone
        return None
    return Path(cached) if isinstance(cached, str) else None
