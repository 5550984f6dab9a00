"""Finds the delta between two checkpoints of any origin, one tensor at a time."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unmask import __version__
from unmask.delta.checkpoint import Checkpoint, Source, open_checkpoint
from unmask.delta.fingerprint import digest, fingerprint, same_bits
from unmask.delta.live import has_selection
from unmask.delta.provenance import Provenance
from unmask.delta.renaming import SAME_NAMES, Renaming, renaming
from unmask.delta.sparse import FLOATS, SparseTensor
from unmask.delta.ties import tied_names
from unmask.errors import DeltaError
from unmask.gradients.entries import bits, take
from unmask.gradients.wrappers import bare

_LARGEST_SHARE = 3 / 4
"""The share of a whole tensor's bytes that its changed entries may take. In memory an entry also has an index of 8 bytes, and to
write entries is slower than to copy a tensor, so entries must save something."""


def between(base: Source, tuned: Source) -> tuple[dict[str, SparseTensor], dict[str, Tensor], str, dict[str, Any], str]:
    """Returns the ``sparse``, ``whole``, ``base``, ``metadata`` and ``places`` of the delta between two checkpoints.

    See `unmask.SparseDelta.between`.
    """
    old, new, rename = _opened(base, tuned)
    provenance = _provenance(old, new, rename)
    made: Any = provenance.between
    alone = {*made["added"], *made["replaced"]}  # with nothing in the base to compare them to
    sparse: dict[str, SparseTensor] = {}
    whole = {name: new.tensors[name].read().clone() for name in sorted(alone)}
    digests: dict[str, str] = {}
    places: dict[str, str] = {}
    for name in sorted(new.tensors.keys() - alone - made["tied"].keys()):
        before = old.tensors[name].read()
        change = _change(before, new.tensors[name].read())
        if isinstance(change, Tensor):
            whole[name] = change.clone()
            continue
        digests[name] = digest(before)
        if change is not None:
            sparse[name] = change
            places[name] = change.holding(take(before, change.indices)).digest
    return sparse, whole, fingerprint(digests), provenance.to_json(), fingerprint(places) if places else ""


def _provenance(old: Checkpoint, new: Checkpoint, rename: Renaming) -> Provenance:
    """Returns what the headers of the two checkpoints, and their tied tensors, say of the delta."""
    tied = tied_names(old, new)
    held = {name: tensor for name, tensor in new.tensors.items() if name not in tied}
    same = {
        n
        for n, t in held.items()
        if n in old.tensors and (old.tensors[n].dtype, old.tensors[n].shape) == (t.dtype, t.shape)
    }
    floats = [held[name].numel for name in same if held[name].dtype in FLOATS]
    weights = sum(tensor.numel for tensor in held.values())
    return Provenance(
        eligible={"tensors": len(floats), "weights": sum(floats)},
        base_id=old.source,
        parameters=weights,
        versions={"unmask": __version__, "torch": torch.__version__, "python": platform.python_version()},
        between={
            "tuned": new.source,
            "tensors": len(new.tensors),
            "weights": weights,
            "bytes": sum(tensor.nbytes for tensor in held.values()),
            "added": sorted(held.keys() - old.tensors.keys()),
            "removed": sorted(old.tensors.keys() - new.tensors.keys()),
            "replaced": sorted((held.keys() & old.tensors.keys()) - same),
            "tied": tied,
            "renamed": {"off": rename.off, "on": rename.on},
        },
    )


def _opened(base: Source, tuned: Source) -> tuple[Checkpoint, Checkpoint, Renaming]:
    """Opens two checkpoints, whose tensors have the tuned one's names (a live base's, if the tuned one is in files).

    Returns them and how the base's names became the tuned one's.
    """
    for given in (base, tuned):
        if isinstance(given, nn.Module) and has_selection(given):
            raise DeltaError("a model has a live selection; take selection.delta(), or call its release() first.")
    old, new = open_checkpoint(base), open_checkpoint(tuned)
    one = base is tuned or (isinstance(base, nn.Module) and isinstance(tuned, nn.Module) and bare(base) is bare(tuned))
    if one or (old.files and {f.path.resolve() for f in old.files} == {f.path.resolve() for f in new.files}):
        raise DeltaError(f"{old.label} is given as the base and as the tuned checkpoint; give two.")
    rename = SAME_NAMES
    if isinstance(base, nn.Module) and not isinstance(tuned, nn.Module):
        new = new.renamed(renaming(new.tensors, old.tensors))
    else:
        rename = renaming(old.tensors, new.tensors)
        old = old.renamed(rename)
    new = new.known_as(old.tensors)
    if not any(name in old.tensors and old.tensors[name].shape == t.shape for name, t in new.tensors.items()):
        raise DeltaError(
            f"{old.label} ({_some(old)}) and {new.label} ({_some(new)}) have no tensor of one name and shape; give a base and "
            "what was tuned from it."
        )
    return old, new, rename


def _some(checkpoint: Checkpoint) -> str:
    return f"{min(checkpoint.tensors)!r} and {len(checkpoint.tensors) - 1} more"


def _change(before: Tensor, after: Tensor) -> SparseTensor | Tensor | None:
    """Returns the changed entries of a tensor, or the tensor itself where that is better; None if no bit differs."""
    if after.dtype not in FLOATS:
        return None if same_bits(before, after) else after
    changed = bits(before.contiguous()) != bits(after.contiguous())
    count = int(changed.count_nonzero())
    if count == 0:
        return None
    width = 8 * after.element_size()
    if count * (width + index_bits(count / after.numel())) > _LARGEST_SHARE * width * after.numel():
        return after
    flat = changed.reshape(-1).nonzero().squeeze(1)
    values = take(after, flat)
    # A SparseTensor holds finite values only.
    return SparseTensor(flat, values, tuple(after.shape)) if bool(torch.isfinite(values).all()) else after


def index_bits(density: float) -> float:
    """Returns the expected bits of an index in a Golomb-Rice code of the gaps, if a share of the entries has changed at random.

    Example:
        >>> round(index_bits(0.002), 2), index_bits(0.5), index_bits(1.0)
        (10.49, 2.0, 1.0)
    """
    return min(k + 1 / (1 - (1 - density) ** 2**k) for k in range(40))


def refuse_other_class(made: Mapping[str, Any], whole: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuses a model that would not become the tuned checkpoint, because its class has other tensors.

    Args:
        made: The entry ``between`` of the delta's metadata; see `unmask.delta.provenance.Provenance`.
        whole: The delta's whole tensors.
        tensors: The model's tensors.

    Raises:
        DeltaError: The model has a tensor that the tuned checkpoint lacks, lacks one that it has, or has one in another form.
    """
    way = "Load the tuned checkpoint's class from the base, or write files: unmask apply BASE DELTA --output FOLDER."
    for name in made["removed"]:
        if name in tensors:
            raise DeltaError(f"the tuned checkpoint has no tensor {name!r}, and this model has one. {way}")
    for name in (*made["added"], *made["replaced"]):
        if name not in whole:
            raise DeltaError(f"the delta lacks the tensor {name!r}, which its metadata name; it is damaged.")
        if name not in tensors:
            raise DeltaError(f"the tuned checkpoint has a tensor {name!r}, which this model lacks. {way}")
        if (tensors[name].dtype, tensors[name].shape) != (whole[name].dtype, whole[name].shape):
            raise DeltaError(
                f"{name!r} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)} in this model and {whole[name].dtype} "
                f"of shape {tuple(whole[name].shape)} in the tuned checkpoint. {way}"
            )
    for name, first in made["tied"].items():
        if name in tensors:
            raise DeltaError(
                f"{name!r} is tied to {first!r} in the tuned checkpoint, so the delta holds it once; this model has both. {way}"
            )
