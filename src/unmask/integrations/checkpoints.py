"""Writes and examines checkpoint folders that are whole or not there: a manifest, written last, lists all files.

A checkpoint is a folder ``checkpoint-N``. It holds the states of the selection, the optimizer, the schedule, the RNG and the
Trainer. `seal` writes its ``manifest.json``. `examine` compares a folder with its manifest and says what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from unmask import __version__
from unmask.errors import SelectionError
from unmask.files import discard, sweep_up, to_disk, write_json
from unmask.selection.state import read_state

MANIFEST, STATE_FILE, TRAINER_STATE = "manifest.json", "selection.safetensors", "trainer_state.json"
VERSION = 1
_ADAPTER = "adapter_model.safetensors"  # PEFT writes it instead of a selection's state; it does not tell the step
_NEEDED = (TRAINER_STATE, "optimizer.pt", "scheduler.pt")
# A Trainer reads these files if they are there.
_READ = re.compile(
    r"(selection\.safetensors|trainer_state\.json|optimizer\.(pt|bin)|(scheduler|scaler)\.pt|rng_state.*\.pth)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, as `examine` found it.

    Attributes:
        path: The folder.
        fault: The reason why no run can go on from it; None if it is whole.
        step: The number of optimizer steps taken before it was written; -1 if that cannot be known.
        settings: The settings that it was sealed with; None if there are none.
        note: A remark for the user on a whole checkpoint: it has no manifest.
    """

    path: Path
    fault: str | None
    step: int = -1
    settings: Mapping[str, Any] | None = None
    note: str | None = None

    @property
    def whole(self) -> bool:
        """True if a run can go on from it."""
        return self.fault is None


class _Fault(Exception):
    """Carries the reason why a checkpoint is not whole."""


def seal(folder: Path, step: int, settings: Mapping[str, Any]) -> Path:
    """Writes the manifest of a complete checkpoint, once all its files are on the disk; returns the manifest's path.

    The manifest holds the number of optimizer steps taken so far, and the run's settings, as JSON values.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        to_disk(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    held = {"version": VERSION, "unmask": __version__, "step": step, "settings": dict(settings), "files": files}
    written = write_json(folder / MANIFEST, held | {"digest": _digest(held)})
    to_disk(folder.parent)
    return written


def examine(folder: Path) -> Checkpoint:
    """Examines whether a folder is a whole checkpoint: every file has the size and the SHA-256 that the manifest says.

    A checkpoint without a manifest (unmask 0.1 made it, or its run was killed just before the manifest) is whole if all its
    parts load and belong to the same step.
    """
    try:
        named = _step_of(folder)
        if (folder / MANIFEST).exists():
            manifest = _sealed(folder)
            step, settings, note = manifest["step"], manifest["settings"], None
        else:
            step, settings = _agreeing(folder), None
            note = f"{str(folder)!r} has no {MANIFEST}; its parts load and all belong to step {step}"
        if named not in (None, step):
            raise _Fault(f"its files belong to step {step}")
    except _Fault as fault:
        return Checkpoint(folder, str(fault))
    except OSError as error:
        return Checkpoint(folder, f"it cannot be read ({error})")
    return Checkpoint(folder, None, step, settings, note)


def folders(parent: Path) -> dict[int, Path]:
    """Finds the folders ``checkpoint-N`` in a folder, whole or not, by N in ascending order."""
    found = {_step_of(path): path for path in parent.glob("checkpoint-*") if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def newest(parent: Path) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """Finds the newest whole checkpoint in a folder (None if there is none), and the newer ones, which are not whole."""
    passed: list[Checkpoint] = []
    for path in reversed(folders(parent).values()):
        found = examine(path)
        if found.whole:
            return found, passed
        passed.append(found)
    return None, passed


def rotate(parent: Path, newest: Path, keep: int | None, best: str | None = None) -> None:
    """Removes all but ``keep`` checkpoints, the oldest first; it keeps the newest, which is whole, and the best.

    A checkpoint of a later step than the newest is from before the run was resumed from an earlier one: it is removed first.
    """
    if keep is None or keep <= 0:
        return
    last = _step_of(newest) or 0
    there = folders(parent)
    spared = {newest.resolve(), Path(best or newest).resolve()}
    others = [(step < last, step, path) for step, path in there.items() if path.resolve() not in spared]
    for _, _, path in sorted(others)[: max(0, len(there) - keep)]:
        discard(path)
    sweep_up(parent)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Lists every value in which two mappings differ, as ``name: old -> new``; the order of keys does not matter.

    Example:
        >>> differences({"b": {"steps": 2, "to": 1}, "a": 1}, {"a": 1, "b": {"to": 1, "steps": 4}})
        ['b.steps: 2 -> 4']
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        inner = [differences(old.get(k), new.get(k), f"{name}.{k}" if name else str(k)) for k in keys]
        return [line for lines in inner for line in lines]
    old, new = (list(value) if isinstance(value, tuple) else value for value in (old, new))
    before, after = ("none" if value is None else str(value) for value in (old, new))
    return [] if old == new else [f"{name}: {before} -> {after}"]


def _step_of(folder: Path) -> int | None:
    named = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(named[1]) if named else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(held: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()


def _sealed(folder: Path) -> dict[str, Any]:
    """Reads the manifest. Refuses files that differ from it, and further files that a Trainer would read."""
    try:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = held.pop("digest")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise _Fault(f"its {MANIFEST} is damaged") from error
    if held.get("version") != VERSION:
        raise _Fault(f"its {MANIFEST} has version {held.get('version')!r}, and this unmask reads version {VERSION}")
    if digest != _digest(held):
        raise _Fault(f"its {MANIFEST} is damaged: it was altered after it was written")
    files = held["files"]  # `seal` wrote it, as the digest shows; its form needs no check
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise _Fault(f"its file {name} is missing")
        if path.stat().st_size != expected["size"]:
            raise _Fault(f"its file {name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}")
        if _sha256(path) != expected["sha256"]:
            raise _Fault(
                f"its file {name} is damaged or belongs to another checkpoint (its SHA-256 is not the manifest's)"
            )
    for path in folder.iterdir():
        if path.name not in files and _READ.fullmatch(path.name):
            raise _Fault(f"its file {path.name} was not written with it (it is not in {MANIFEST})")
    return dict(held)


def _agreeing(folder: Path) -> int:
    """Loads all parts of a checkpoint without a manifest, and returns the step to which all of them belong."""
    adapters = sorted(folder.rglob(_ADAPTER))
    for name in _NEEDED if adapters else (STATE_FILE, *_NEEDED):
        if not (folder / name).is_file():
            raise _Fault(
                f"its file {name} is missing: it was stopped while it was written, or holds no selection state"
            )
    if not list(folder.glob("rng_state*.pth")):
        raise _Fault("its file rng_state.pth is missing: it was stopped while it was written")
    loaded = {path.name: _load(path) for path in sorted(folder.iterdir()) if _READ.fullmatch(path.name)}
    for path in adapters:
        _load(path)
    try:
        steps = {STATE_FILE: int(loaded[STATE_FILE]["step"])} if STATE_FILE in loaded else {}
        if "num_bad_epochs" not in loaded["scheduler.pt"]:  # ReduceLROnPlateau counts evaluations instead
            steps["scheduler.pt"] = int(loaded["scheduler.pt"]["last_epoch"])
        held = [state.get("step") for state in loaded["optimizer.pt"]["state"].values()]
        counts = [int(n) for n in held if isinstance(n, int | float) or (torch.is_tensor(n) and n.numel() == 1)]
        if counts:
            steps["optimizer.pt"] = max(counts)
        step = int(loaded[TRAINER_STATE]["global_step"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _Fault(f"its files do not form a checkpoint ({error!r})") from error
    if "scaler.pt" not in loaded:  # with a scaler, the Trainer counts skipped steps too
        steps[TRAINER_STATE] = step
    if len(set(steps.values())) > 1:
        named = ", ".join(f"{name} of step {step}" for name, step in steps.items())
        raise _Fault(f"its files belong to different steps ({named})")
    return step


def _load(path: Path) -> Any:
    try:
        if path.name == STATE_FILE:
            return read_state(path)
        if path.name == _ADAPTER:
            return load_file(path)
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        with zipfile.ZipFile(path) as archive:  # torch.load does not check checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        core = np._core if hasattr(np, "_core") else np.core
        # The state of numpy's RNG needs these.
        known = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SelectionError as error:
        raise _Fault(f"its file {path.name} is damaged: {error}") from error
    except Exception as error:  # torch.load raises errors of many classes, depending on the bytes
        raise _Fault(f"its file {path.name} is damaged ({type(error).__name__})") from error
