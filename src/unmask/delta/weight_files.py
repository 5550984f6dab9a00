"""Finds the safetensors files that hold a checkpoint's weights: in a folder, in the Hub's cache, or on the Hub."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from unmask.delta.tensor_file import read_header
from unmask.errors import DeltaError, need
from unmask.reading import Malformed, fields, mapping, read_json, refusing, text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers looks for them in this order
_INDEX_ENDING = ".safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
"""The endings of a checkpoint's small files: its configuration, tokenizer and code."""


def cached_weights(source: str) -> Path | None:
    """Returns a checkpoint's weights, or the index of them, in a folder or in the Hub's cache; None if neither has them."""
    if Path(source).is_dir():
        return next((path for path in (Path(source, WEIGHTS), Path(source, INDEX)) if path.is_file()), None)
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(source, name) for name in (WEIGHTS, INDEX)]
    except HFValidationError:  # ``source`` is a folder that no longer exists
        return None
    return next((Path(path) for path in cached if isinstance(path, str)), None)


def stored_names(weights: Path) -> set[str]:
    """Returns the names of the tensors in a safetensors file, or in the files of an index.

    Raises:
        Malformed: The file is damaged.
    """
    return set(parts(weights)) if is_index(weights) else read_header(weights).keys() - {"__metadata__"}


def is_index(path: Path) -> bool:
    """Returns True for the index of a checkpoint in several files."""
    return path.name.endswith(_INDEX_ENDING)


def parts(index: Path) -> dict[str, str]:
    """Returns the file name of each tensor by an index.

    Raises:
        Malformed: The index is damaged.
    """
    return fields({"weight_map": mapping(text)})(read_json(index), "the index")["weight_map"]


def find_weights(source: str) -> Path:
    """Returns the weights of a checkpoint: a safetensors file, or the index of several that are all there.

    Args:
        source: A folder, a safetensors file, an index, or the id of a model on the Hub, which is downloaded if it is not in
            the cache.

    Raises:
        DeltaError: There is no such checkpoint, a file of it is missing, or its weights are pickled.
        MissingExtraError: The source is an id, and `huggingface_hub` is not installed.
    """
    path = Path(source)
    if path.is_dir():
        return _whole(_in_folder(path))
    if path.is_file():
        if path.suffix in _PICKLED:
            raise DeltaError(_pickled(path))
        if path.suffix != ".safetensors" and not is_index(path):
            raise DeltaError(f"{source!r} is no checkpoint; give a folder, a .safetensors file or a hub id.")
        return _whole(path)
    if not _HUB_ID.fullmatch(source) or path.suffix == ".safetensors":
        raise DeltaError(f"there is no checkpoint at {source!r}; give a folder, a .safetensors file or a hub id.")
    return _on_hub(source)


def _in_folder(folder: Path) -> Path:
    """Returns the weights in a folder, of transformers' name or the only ones."""
    found = cached_weights(str(folder))
    if found is not None:
        return found
    files = sorted(folder.glob("*.safetensors"))
    candidates = sorted(folder.glob(f"*{_INDEX_ENDING}")) or files
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DeltaError(
            f"{str(folder)!r} has {len(candidates)} safetensors files ({candidates[0].name}, ...) and no {INDEX} that "
            "connects them; give one of the files, or add the index."
        )
    pickled = [path for path in sorted(folder.iterdir()) if path.suffix in _PICKLED]
    if pickled:
        raise DeltaError(_pickled(pickled[0]))
    raise DeltaError(f"{str(folder)!r} is no checkpoint: it holds no safetensors file. Give a model's folder.")


def _pickled(path: Path) -> str:
    return (
        f"{str(path)!r} is pickled, and reading it could run any code; unmask reads safetensors only. Convert a model that you "
        "trust with transformers: AutoModel.from_pretrained(folder).save_pretrained(new_folder), with the class of its head."
    )


def _whole(weights: Path) -> Path:
    """Refuses an index some of whose files are missing, or are no safetensors files in its folder."""
    if is_index(weights):
        with refusing(DeltaError, repr(str(weights)), "Take another copy."):
            files = sorted(set(parts(weights).values()))
            outside = [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]
            if outside:
                raise Malformed(f"the index names {outside[0]!r}, which is no safetensors file in its folder")
        missing = [file for file in files if not (weights.parent / file).is_file()]
        if missing:
            raise DeltaError(
                f"{str(weights.parent)!r} lacks {len(missing)} of the {len(files)} files that {weights.name} names "
                f"({missing[0]}, ...). Take a complete copy."
            )
    return weights


def _on_hub(model: str) -> Path:
    """Returns the weights of a model on the Hub, from the cache if it has all of them."""
    hub = need("huggingface_hub", "hf")
    wanted = {"allow_patterns": ["*.safetensors", *(f"*{ending}" for ending in COPIED)], "ignore_patterns": ["*/*"]}
    reason: DeltaError | None = None
    try:
        return _whole(_in_folder(Path(hub.snapshot_download(model, local_files_only=True, **wanted))))
    except DeltaError as error:  # The cache lacks some of the weights, or has pickled ones.
        reason = error
    except (OSError, ValueError):  # The cache lacks the model.
        pass
    try:
        folder = Path(hub.snapshot_download(model, **wanted))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise reason or DeltaError(
            f"there is no folder {model!r}, and no such model was found on the Hub: {said} Give a folder, or a hub id."
        ) from error
    return _whole(_in_folder(folder))
