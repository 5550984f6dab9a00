"""Holds the cases of a fuzz test for each reader: a case is a function of its seed, and ends as "same", "other" or "refused".

"same" means that the value read is the value written. "other" means that it is another value, which is valid by the rules and
was taken as it stands (a plain second reading checks this). "refused" means that an `UnmaskError` was raised, and nothing was
changed. Any other end raises an error.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import math
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_nets
import pyarrow
import pyarrow.parquet
import torch
import yaml
from delta_reader import read_delta
from helpers import assert_same_tensors, batches, mean_square, mlp, snapshot, train, trained, travelling
from mutating import Mutator, dumps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peft
import unmask
from unmask import SparseDelta, UnmaskError, files
from unmask.delta.checkpoint import open_checkpoint
from unmask.lab.report.context import failures, runs_table
from unmask.lab.report.reading import read_study
from unmask.lab.study import expand, parse
from unmask.lab.study.parsing import read_sweep
from unmask.lab.study.records import records
from unmask.lab.study.tables import markdown, tables
from unmask.lab.tasks import load_glue
from unmask.lab.tasks.math.answers import extract, is_right
from unmask.lab.tasks.math.outputs import OutputFile, is_of
from unmask.lab.tasks.math.problems import load_arithmetic, load_problems
from unmask.lab.tasks.tables import suffix_of
from unmask.lab.tasks.tags.conll import read_conll
from unmask.lab.tasks.tags.ner import load_tagged
from unmask.lab.tasks.tags.spans import is_tag
from unmask.lab.tasks.text.files import load_files
from unmask.lab.training.settings import build, read_yaml
from unmask.selection.state import read_state, write_state

Case = Callable[[int], str]
REFUSED, SAME, OTHER = "refused", "same", "other"


def equal(left: Any, right: Any) -> bool:
    """Returns True if two states or trees of tensors and plain values are the same, bit for bit."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        alike = isinstance(left, Tensor) and isinstance(right, Tensor) and left.dtype == right.dtype
        return alike and left.shape == right.shape and files.tensor_bytes(left) == files.tensor_bytes(right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    return bool(left == right)


# Deltas.

_ID3, _RANDOM = unmask.id3(60, steps=3), unmask.random_mask(60)


def delta_file(folder: Path) -> Case:
    """Damages the bytes of a delta's file, coded, drawn or plain: any file that can be read is the same delta."""
    path, written = folder / "delta.safetensors", []
    for method, compress in ((_ID3, True), (_RANDOM, True), (_ID3, False)):
        delta = trained(method=method, dense="head")[2].delta("some/base", order=True)
        written.append((delta.save(path, compress).read_bytes(), _plain(SparseDelta.load(path))))

    def case(seed: int) -> str:
        data, whole = written[seed % 3]
        path.write_bytes(Mutator(seed).damaged(data))
        try:
            found = SparseDelta.load(path)
        except UnmaskError:
            return REFUSED
        assert equal(_plain(found), whole)
        return SAME

    return case


def signed_coded(folder: Path) -> Case:
    """Changes a compressed delta's header or tensors and signs it again: it is applied as it stands, or refused."""
    bases, written, path = [], [], folder / "delta.safetensors"
    for method in (_ID3, _RANDOM):
        base, _, selection = trained(method=method, dense="head")
        bases.append((base, snapshot(base)))
        written.append(files.read_tensors(selection.delta("some/base", order=True).save(path))[0])
    headers = [json.loads(zlib.decompress(tensors["header"].numpy().tobytes())) for tensors in written]

    def case(seed: int) -> str:
        mutator, which = Mutator(seed), seed % 2
        (base, original), tensors, header = bases[which], written[which], headers[which]
        changed = mutator.changed(header) if mutator.draw.random() < 0.6 else header
        text = dumps(changed).encode()
        given = {**tensors, "header": torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8)}
        given = given if changed is not header else mutator.changed_tensors(tensors)
        _sign(path, given, {"format_version": 3})
        if _applied_and_undone(path, base, original, lambda: _read_apart(original, path.read_bytes())) is None:
            return REFUSED
        return SAME if changed == header and equal(given, tensors) else OTHER

    return case


def _applied_and_undone(
    path: Path, base: nn.Module, original: dict[str, Tensor], expected: Callable[[], dict[str, Tensor]]
) -> SparseDelta | None:
    """Applies a delta's file, checks what the base then holds, and takes it off again; None if the file is refused."""
    try:
        delta = SparseDelta.load(path)
        displaced = delta.apply(base)
    except UnmaskError:
        assert_same_tensors(snapshot(base), original)
        return None
    assert_same_tensors(snapshot(base), expected())
    displaced.apply(base)
    assert_same_tensors(snapshot(base), original)
    return delta


def _read_apart(original: dict[str, Tensor], data: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a base under a delta's file, by a reader that shares no code with the package."""
    sparse, whole, _, _ = read_delta(data)
    expected = dict(original)
    for name, part in whole.items():
        expected[name] = _vector(part, original[name].dtype).reshape(original[name].shape)
    for name, (_, indices, part) in sparse.items():
        flat = expected[name].reshape(-1).clone()
        flat[torch.tensor(indices, dtype=torch.int64)] = _vector(part, flat.dtype)
        expected[name] = flat.reshape(original[name].shape)
    expected["out.weight"] = expected["embed.weight"]
    return expected


def _vector(data: bytes, dtype: torch.dtype) -> Tensor:
    """Returns the numbers that these bytes are."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def signed_delta(folder: Path) -> Case:
    """Changes a plain delta's header or tensors and signs it again: it is applied as it stands, or refused."""
    base, _, selection = trained(dense="head")
    path = selection.delta("some/base", order=True).save(folder / "delta.safetensors", compress=False)
    tensors, header = files.read_tensors(path)
    original = snapshot(base)

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        in_tensors = mutator.draw.random() < 0.5
        given = mutator.changed_tensors(tensors) if in_tensors else tensors
        changed = header if in_tensors else mutator.changed(header)
        _sign(path, given, changed)
        delta = _applied_and_undone(path, base, original, lambda: _applied(original, load_file(path)))
        if delta is None:
            return REFUSED
        assert json.dumps(delta.metadata)
        return SAME if equal(given, tensors) and changed == header else OTHER

    return case


def _sign(path: Path, tensors: dict[str, Tensor], header: Any) -> None:
    """Writes a delta with a right checksum, if there is one for such a header."""
    text = dumps(header)
    try:
        signed = {**header, "checksum": files.checksum(json.loads(text), tensors)}
        text = dumps(signed)
    except (TypeError, RecursionError, ValueError):  # not a mapping, or too deep for Python's own reader
        pass
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata={"unmask": text})


def _applied(base: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a delta by a second, plain reading of its file."""
    found = {name: tensor.clone() for name, tensor in base.items()}
    found |= {key.removesuffix("::whole"): tensor for key, tensor in tensors.items() if key.endswith("::whole")}
    for key, values in tensors.items():
        name, _, kind = key.rpartition("::")
        if kind == "values":
            flat = found[name].reshape(-1).clone()
            flat[tensors[f"{name}::indices"].long()] = values
            found[name] = flat.reshape(found[name].shape)
    for tied, name in (("out.weight", "embed.weight"),):
        found[tied] = found[name]
    return found


def _plain(delta: SparseDelta) -> dict[str, Any]:
    sparse = {name: {**vars(entry)} for name, entry in delta.sparse.items()}
    return {"sparse": sparse, "whole": dict(delta.whole), "base": delta.base, "metadata": dict(delta.metadata)}


# Checkpoints of any origin.


def checkpoint_files(folder: Path) -> Case:
    """Damages an index, a header or the bytes of a checkpoint in two files; there is no checksum over its values."""
    tensors = {
        f"layers.{i}.weight": torch.randn(2, 3).to(dtype) for i, dtype in enumerate((torch.float32, torch.bfloat16))
    }
    tensors |= {"count": torch.tensor(7), "scale": torch.ones(4).to(torch.float8_e4m3fn), "empty": torch.zeros(0, 2)}
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for place in set(places.values()):
        save_file({n: tensors[n] for n in tensors if places[n] == place}, folder / place, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    written = {path: path.read_bytes() for path in sorted(folder.iterdir())}

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        for path, data in written.items():
            path.write_bytes(data)
        path = sorted(written)[seed % len(written)]
        data = written[path]
        if path.suffix == ".json":
            path.write_text(dumps(mutator.changed(index)), encoding="utf-8", errors="surrogatepass")
        elif mutator.draw.random() < 0.5:
            path.write_bytes(mutator.damaged(data))
        else:
            length = int.from_bytes(data[:8], "little")
            head = dumps(mutator.changed(json.loads(data[8 : 8 + length]))).encode("utf-8", "surrogatepass")
            path.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
        try:
            found = {name: tensor.read() for name, tensor in open_checkpoint(folder).tensors.items()}
        except UnmaskError:
            return REFUSED
        for name, tensor in found.items():
            place = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"][name]
            data = (folder / place).read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            low, high = json.loads(data[8:start])[name]["data_offsets"]
            assert bytes(files.tensor_bytes(tensor)) == data[start + low : start + high]
        return SAME if equal(found, tensors) else OTHER

    return case


def _rungs() -> list[SparseDelta]:
    """Returns the deltas of a run that unmasks its budget step by step, and trains a head whole."""
    model, found = travelling(), []
    selection = unmask.select(model, unmask.id3(60, steps=3), dense="head")
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for batch in batches(3):
        train(model, optimizer, [batch])
        found.append(selection.delta("some/base", order=True))
    return found


def ladder_file(folder: Path) -> Case:
    """Damages the bytes of a ladder's file: any file that can be read is the same ladder."""
    rungs, path = _rungs(), folder / "ladder.safetensors"
    data = unmask.Ladder(rungs).save(path).read_bytes()

    def case(seed: int) -> str:
        path.write_bytes(Mutator(seed).damaged(data))
        try:
            found = unmask.Ladder.load(path)
        except UnmaskError:
            return REFUSED
        assert list(found.rungs) == rungs
        return SAME

    return case


def signed_ladder(folder: Path) -> Case:
    """Changes a ladder's header or tensors and signs it again: its rungs are deltas that can be written, or it is refused."""
    rungs, path = _rungs(), folder / "ladder.safetensors"
    tensors, header = files.read_tensors(unmask.Ladder(rungs).save(path))

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        if mutator.draw.random() < 0.6:
            _sign(path, tensors, mutator.changed(header))
        else:
            _sign(path, mutator.changed_tensors(tensors), header)
        try:
            found = unmask.Ladder.load(path)
        except UnmaskError:
            return REFUSED
        if list(found.rungs) == rungs:
            return SAME
        for rung in found.rungs:  # each is a delta by the rules: it can be written and read
            assert SparseDelta.load(rung.save(folder / "rung.safetensors")) == rung
        return OTHER

    return case


# Selection states.

METHODS = {
    "id3": lambda: unmask.id3(17, steps=5),
    "kept": lambda: unmask.repeat_d3(9, leaving="kept"),
    "random": lambda: unmask.random_mask(17).but(strategy="increment", schedule=unmask.Schedule.of("uniform", 5)),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = mlp(), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def _selection(which: str, steps: int) -> unmask.Selection:
    torch.manual_seed(0)
    model = _Net()
    selection = unmask.select(model, METHODS[which](), dense="head")
    train(model, torch.optim.SGD(selection.parameters(), lr=0.1), batches(steps))
    return selection


def _states() -> dict[str, tuple[unmask.Selection, dict[str, Any]]]:
    """Returns, by method, a selection that has trained on and an earlier state of it."""
    return {which: (_selection(which, 2), _selection(which, 3).state_dict()) for which in METHODS}


def _load(selection: unmask.Selection, state: Any, original: dict[str, Any]) -> str:
    """Loads a state; the selection is then that state, or as it was."""
    before, weights = selection.state_dict(), snapshot(selection.model)
    try:
        selection.load_state_dict(state)
    except UnmaskError:
        assert equal(selection.state_dict(), before)
        assert_same_tensors(snapshot(selection.model), weights)
        return REFUSED
    loaded = selection.state_dict()
    held = loaded["positions"] >= 0
    for key in before:
        if key == "base":
            assert equal(loaded[key][held], state[key][held])
        elif key == "values":
            assert equal(loaded[key][: state["used"]], state[key][: state["used"]])
            assert not loaded[key][state["used"] :].any()
        elif key == "buffers":
            assert equal({n: b for n, b in state[key].items() if n in loaded[key]}, loaded[key])
        else:
            assert equal(loaded[key], state[key]), key
    outcome = SAME if equal(loaded, original) else OTHER
    if outcome == OTHER:  # a state that was taken can be trained on
        mean_square(selection.model, batches(1)[0]).backward()
        selection.load_state_dict(before)
        selection.model.zero_grad()
    return outcome


def state_dict(folder: Path) -> Case:
    """Changes a state dict: it is loaded as it stands, or refused with the selection as it was."""
    states = _states()

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        selection, original = states[sorted(states)[seed % len(states)]]
        return _load(selection, _changed_state(mutator, original), original)

    return case


def _changed_state(mutator: Mutator, state: dict[str, Any]) -> dict[str, Any]:
    groups = {key: dict(state[key]) for key in ("dense", "buffers")}
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    values = {key: value for key, value in state.items() if key not in tensors and key not in groups}
    which = mutator.draw.randrange(4)
    if which == 0:
        values = mutator.changed(values)
        values = values if isinstance(values, dict) else {"version": values}
    elif which == 1:
        key = mutator.draw.choice(sorted(groups))
        groups[key] = mutator.hostile() if mutator.draw.random() < 0.2 else mutator.changed_tensors(groups[key])
    elif which == 2:
        key = mutator.draw.choice(sorted(tensors))
        tensors[key] = mutator.hostile()
    else:
        tensors = mutator.changed_tensors(tensors)
    return {**values, **tensors, **groups}


def state_file(folder: Path) -> Case:
    """Damages the bytes of a state's file; every second case is of a version that wrote no checksum."""
    states, path = _states(), folder / "state.safetensors"
    written = {}
    for which, (_, state) in states.items():
        data = write_state(state, path).read_bytes()
        tensors, header = files.read_tensors(path)
        files.write_tensors(path, tensors, {key: value for key, value in header.items() if key != "checksum"})
        written[which] = (data, path.read_bytes())

    def case(seed: int) -> str:
        which = sorted(states)[seed % len(states)]
        selection, original = states[which]
        older = seed // len(states) % 2
        path.write_bytes(Mutator(seed).damaged(written[which][older]))
        try:
            state = read_state(path)
        except UnmaskError:
            return REFUSED
        assert older or equal(state, original)
        return _load(selection, state, original)

    return case


# PEFT.


def adapter_weights(folder: Path) -> Case:
    """Changes entries of an adapter's file: it loads as the same adapter, or is refused with the model as it was."""
    _, model = peft_nets.wrapped()
    entries = peft.get_peft_model_state_dict(peft_nets.run(model))
    _, fresh = peft_nets.wrapped()
    empty, weights = peft.get_peft_model_state_dict(fresh), snapshot(fresh.get_base_model())

    def held(peft_model: Any) -> dict[str, Any]:
        adapter = peft_model.base_model.deltas.adapters["default"]
        slots = adapter.slots()
        placed = adapter.layout.split(slots.positions[: slots.used])
        found = {adapter.layout.names[i]: {"flat": flat, "values": slots.values[places]} for i, flat, places in placed}
        return {"entries": found, "whole": dict(adapter.whole), "used": adapter.used}

    before = held(fresh)
    peft.set_peft_model_state_dict(fresh, dict(entries))
    whole = held(fresh)

    def case(seed: int) -> str:
        peft.set_peft_model_state_dict(fresh, dict(empty))
        given = Mutator(seed).changed_tensors(dict(entries))
        try:
            peft.set_peft_model_state_dict(fresh, dict(given))
        except UnmaskError:
            assert equal(held(fresh), before)
            assert_same_tensors(snapshot(fresh.get_base_model()), weights)
            return REFUSED
        assert equal(held(fresh), whole)
        return SAME

    return case


def adapter_config(folder: Path) -> Case:
    """Changes values in an adapter_config.json."""
    config = peft_nets.config()
    own = {f.name for f in dataclasses.fields(config)} - {f.name for f in dataclasses.fields(peft.PeftConfig)}
    values = {key: value for key, value in json.loads(json.dumps(config.to_dict(), default=str)).items() if key in own}

    def case(seed: int) -> str:
        changed = Mutator(seed).changed(values)
        given = {key: value for key, value in changed.items() if key in own} if isinstance(changed, dict) else {}
        given = json.loads(json.dumps(given).replace('"@deep@"', "[[[]]]"))
        try:
            found = unmask.peft.SelectiveConfig(**given)
            found.build(found.budget)
        except UnmaskError:
            return REFUSED
        return SAME if given == values else OTHER

    return case


# Settings and sweeps.

SETTINGS = {
    "model": "base",
    "output": "run",
    "data": "train.csv",
    "eval": "dev.csv",
    "method": "id3",
    "budget": "0.1%",
    "lr": 0.001,
    "dense_lr": "auto",
    "max_steps": 24,
    "dense": ["new", "head"],
    "bf16": False,
    "seed": 3,
}


def write_changed_yaml(path: Path, values: Any, mutator: Mutator, damaged: bool) -> None:
    """Writes the values as YAML, with either the file's bytes damaged or a value changed."""
    if damaged:
        path.write_bytes(mutator.damaged(yaml.safe_dump(values).encode()))
    else:
        path.write_text(dumps(mutator.changed(values)), encoding="utf-8", errors="surrogatepass")


def settings_file(folder: Path) -> Case:
    """Changes the bytes or the values of a YAML file of settings."""
    path = folder / "config.yaml"
    whole = build(SETTINGS)

    def case(seed: int) -> str:
        write_changed_yaml(path, SETTINGS, Mutator(seed), damaged=seed % 2 == 1)
        try:
            found = build(read_yaml(path))
        except UnmaskError:
            return REFUSED
        assert build(dataclasses.asdict(found)) == found
        return SAME if found == whole else OTHER

    return case


SWEEP = {
    "name": "s",
    "title": "A sweep",
    "notes": ["a note"],
    "settings": {"model": "base", "data_dir": "glue", "max_steps": 60},
    "axes": {"task": ["mrpc"], "budget": ["0.05%"], "seed": [0, 1]},
    "methods": {
        "id3": {"settings": {"method": "id3"}, "grid": {"lr": ["3e-4", 1e-3]}},
        "full": {"settings": {"method": "full", "budget": None}, "grid": {"lr": ["5e-5"]}},
    },
    "rules": [{"when": {"task": "mrpc"}, "settings": {"warmup": 0.1}}],
    "choose": {"seeds": [0]},
    "protocol": {"kind": "seeds", "level": 0.9, "best": 2},
    "figures": ["fig1"],
    "claims": {
        "model": "roberta",
        "rows": [
            {"method": "id3", "budget": "0.05%", "count": "1K", "scores": {"mrpc": "91.2 0.3"}, "average": "91.2"}
        ],
    },
}


def sweep_file(folder: Path) -> Case:
    """Changes the bytes or the values of a YAML file of a sweep."""
    path = folder / "sweep.yaml"
    whole = expand(parse(SWEEP))

    def case(seed: int) -> str:
        write_changed_yaml(path, SWEEP, Mutator(seed), damaged=seed % 3 == 0)
        try:
            found = expand(read_sweep(path))
        except UnmaskError:
            return REFUSED
        return SAME if found == whole else OTHER

    return case


def sweep_record(folder: Path) -> Case:
    """Changes a sweep's plan or one of its results, by bytes or by values: it is shown in full, or refused."""
    from studies import write_study

    values = {**SWEEP, "figures": []}
    store = write_study(folder / "study", values, failing=1)
    paths = [store.folder / "sweep.json", *sorted(store.folder.glob("results/*.json"))]
    texts = {path: path.read_bytes() for path in paths}

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        path = mutator.draw.choice(paths)
        if seed % 4 == 0:
            path.write_bytes(mutator.damaged(texts[path]))
        else:
            path.write_text(dumps(mutator.changed(json.loads(texts[path]))), encoding="utf-8")
        try:
            show(folder / "study")
        except UnmaskError:
            return REFUSED
        finally:
            changed = path.read_bytes() != texts[path]
            path.write_bytes(texts[path])
        return OTHER if changed else SAME

    return case


def show(folder: Path) -> str:
    """Returns all the text of a report of a study."""
    study = read_study(folder)
    parts = [
        markdown(found) for found in tables(study.cells, study.results, study.protocol, study.choice, study.claims)
    ]
    parts += [str(runs_table(study)), str(failures(study))]
    parts += map(str, records(study.cells, study.results, study.protocol, study.choice))
    return "".join(parts)


def run_folder(folder: Path) -> Case:
    """Changes the files of a finished run, as the report reads them."""
    row = {"layer": "0", "kind": "query", "unmasked": 3, "of": 10}
    shot = {"step": 1, "used": 3, "tensor_sparsity": 0.5, "sparsity_entropy": 0.1, "tensors": 2, "rows": [row]}
    metrics = [{"step": s, "used": s, "epoch": 0.1, "eval_loss": 0.5, "eval_accuracy": 0.6} for s in (0, 4)]
    summary = {
        "task": "custom",
        "main_metric": "accuracy",
        "main": 0.6,
        "greater_is_better": True,
        "method": {"name": "id3", "strategy": "increment", "parameters": {"eps": 1.0}},
        "budget": 10,
        "used": 10,
        "head": 0,
        "parameters": 100,
        "seconds": 1.5,
        "lr": 0.01,
        "after": {"accuracy": 0.6, "loss": 0.5},
        "into": None,
    }
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    contents = {"summary.json": [summary], "metrics.jsonl": metrics, "allocation.jsonl": [shot, shot]}
    for name, rows in contents.items():
        (run / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    show(folder / "runs")

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        name = mutator.draw.choice(sorted(contents))
        path = run / name
        whole = path.read_bytes()
        if seed % 3 == 0:
            path.write_bytes(mutator.damaged(whole))
        else:
            rows = list(contents[name])
            place = mutator.draw.randrange(len(rows))
            rows[place] = mutator.changed(rows[place])
            path.write_text("".join(dumps(each) + "\n" for each in rows), encoding="utf-8")
        try:
            show(folder / "runs")
        except UnmaskError:
            return REFUSED
        finally:
            changed = path.read_bytes() != whole
            path.write_bytes(whole)
        return OTHER if changed else SAME

    return case


def outputs(folder: Path) -> Case:
    """Changes the per-item outputs of an evaluation, and its settings."""
    file, settings = OutputFile(folder / "x.jsonl"), {"model": "a", "limit": None}
    file.append([{"row": 0, "generated": "a"}, {"row": 1, "generated": "b"}])
    data, whole = file.path.read_bytes(), file.read()

    def case(seed: int) -> str:
        mutator = Mutator(seed)
        (folder / "settings.json").write_bytes(mutator.damaged(json.dumps(settings).encode()))
        rows = [json.loads(line) for line in data.splitlines()]
        text = "".join(dumps(mutator.changed(row)) + "\n" for row in rows).encode()
        file.path.write_bytes(mutator.damaged(data) if seed % 2 else text)
        try:
            is_of(folder, settings)
            found = file.read()
        except UnmaskError:
            return REFUSED
        return SAME if found == whole else OTHER

    return case


# The user's data. A second, plain reading checks the value that was read; an error names the file.

_SECONDS = 10  # that one small file may take
_LONGEST = 3000  # characters of an error, for every content of the file


def data_case(paths: list[Path], written: Callable[[Path, Mutator], bytes], read: Callable[[Path], Any]) -> Case:
    """Takes one case of files of data by its seed; every other case damages the bytes, and some are gzipped.

    Args:
        paths: The files, as they are to be read.
        written: A file's bytes with its values changed by the mutator.
        read: Reads a file, and checks the value.
    """
    original = {path: path.read_bytes() for path in paths}
    whole = {path: read(path) for path in paths}

    def case(seed: int) -> str:
        mutator, path = Mutator(seed), paths[seed % len(paths)]
        if seed // len(paths) % 2:
            data = mutator.damaged(original[path])
        else:
            data = written(path, mutator)
            data = gzip.compress(data) if path.suffix == ".gz" else data
        path.write_bytes(data)
        start, refusal, found = time.monotonic(), None, None
        try:
            found = read(path)
        except UnmaskError as error:
            refusal = str(error)
        finally:
            path.write_bytes(original[path])
        assert time.monotonic() - start < _SECONDS
        if refusal is not None:
            assert path.name in refusal
            assert len(refusal) < _LONGEST
            return REFUSED
        return SAME if found == whole[path] else OTHER

    return case


_TABLE = [
    {"text": f'{word}, a "{i}"', "n": i, "label": "good" if i % 3 else "bad"}
    for i, word in enumerate(("fine", "na\u00efve", "cold", "warm", "dull", "great", "poor", "new"))
]


def _rows_changed(mutator: Mutator, rows: list[Any]) -> list[Any]:
    changed = mutator.changed(rows)
    return changed if isinstance(changed, list) else [changed]


def _as_cells(row: Any) -> list[str]:
    return [str(cell) for cell in row.values()] if isinstance(row, dict) else [str(row)]


def as_file(path: Path, rows: list[Any]) -> bytes:
    """Returns rows in the format that the path's name tells, without the gzip."""
    suffix = suffix_of(path)
    if suffix == ".json":
        return dumps(rows).encode()
    if suffix == ".jsonl":
        return "".join(f"{dumps(row)}\n" for row in rows).encode()
    if suffix == ".parquet":
        return _as_parquet(rows)
    lines = [list(_columns(rows)), *map(_as_cells, rows)]
    if suffix == ".csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows(lines)
        return out.getvalue().encode(errors="surrogatepass")
    return "".join("\t".join(line) + "\n" for line in lines).encode(errors="surrogatepass")


def _columns(rows: list[Any]) -> dict[str, None]:
    return dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)


def _as_parquet(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    columns = {}
    for name in _columns(rows):
        cells = [row.get(name) if isinstance(row, dict) else row for row in rows]
        try:
            columns[name] = pyarrow.array(cells)
        except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError):  # of several types, or too large
            columns[name] = pyarrow.array([repr(cell) for cell in cells])
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
    except (pyarrow.ArrowException, UnicodeError):  # values that parquet cannot hold
        pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), out)
    return out.getvalue()


def _plainly(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a table by a second, plain reading."""
    data = path.read_bytes()
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    if suffix == ".json":
        loaded = json.loads(text)
        return list(loaded.values()) if isinstance(loaded, dict) else loaded
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if suffix == ".csv":
        lines = [line for line in csv.reader(io.StringIO(text, newline="")) if line]
    else:
        lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.removesuffix("\r")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def _read_table(path: Path) -> Any:
    """Returns training and evaluation data of a file; together they are its rows."""
    data = load_files(path, None, "text", "label")
    parts = [data.train, data.evals["eval"]]
    texts = [text for part in parts for text in part.texts]
    labels = [label for part in parts for label in part.labels]
    assert sorted(texts) == sorted(row["text"] for row in _plainly(path))
    assert all(text.strip() and text.encode() for text in texts)
    names = data.spec.label_names
    if names is None:
        assert all(isinstance(label, float) and math.isfinite(label) for label in labels)
    else:
        assert all(label in range(len(names)) for label in labels)
    return texts, labels, data.spec


def _table(suffix: str) -> Callable[[Path], Case]:
    def table(folder: Path) -> Case:
        paths = [folder / f"train{suffix}"]
        paths += [] if suffix == ".parquet" else [folder / f"other{suffix}.gz"]
        for path in paths:
            data = as_file(path, _TABLE)
            path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return data_case(paths, lambda path, mutator: as_file(path, _rows_changed(mutator, _TABLE)), _read_table)

    table.__name__ = f"data_{suffix[1:]}"
    table.__doc__ = f"A {suffix} file of texts and labels."
    return table


_SENTENCES = [
    [["Ann", "NNP", "B-PER"], ["saw", "VBD", "O"], ["New", "NNP", "B-LOC"], ["York", "NNP", "I-LOC"]],
    [["\u00c5sa", "NNP", "B-PER"], [".", ".", "O"]],
    [["Rain", "NN", "O"]],
]


def _column_file(sentences: Any, sign: str) -> bytes:
    lines = []
    for sentence in sentences if isinstance(sentences, list) else [sentences]:
        for row in sentence if isinstance(sentence, list) else [sentence]:
            lines.append(sign.join(map(str, row)) if isinstance(row, list) else str(row))
        lines.append("")
    return "\n".join(lines).encode(errors="surrogatepass")


def _read_columns(path: Path) -> Any:
    sentences, notes = read_conll(path)
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    lines = [line for line in text.split("\n") if line.strip(" \t\r\ufeff") and not line.startswith("-DOCSTART-")]
    words = [line.split("\t")[0] if "\t" in line else line.lstrip(" ").split(" ")[0] for line in lines]
    assert [word for sentence in sentences.words for word in sentence] == words
    assert all(is_tag(tag) and tag.encode() for tags in sentences.tags for tag in tags)
    return sentences, notes


def data_conll(folder: Path) -> Case:
    """Reads a column file of tagged words, split at blanks or at tabs."""
    signs = {folder / "a.conll": " ", folder / "b.tsv": "\t", folder / "c.txt.gz": " "}
    for path, sign in signs.items():
        data = _column_file(_SENTENCES, sign)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)

    def written(path: Path, mutator: Mutator) -> bytes:
        return _column_file(mutator.changed(_SENTENCES), signs[path])

    return data_case(list(signs), written, _read_columns)


_TAGGED = [
    {"id": i, "tokens": [*(cell[0] for cell in sentence), str(i)], "ner_tags": [*(cell[2] for cell in sentence), "O"]}
    for i, sentence in enumerate(_SENTENCES * 4)
]


def _read_tagged(path: Path) -> Any:
    data = load_tagged(path, None)
    parts = [data.train, data.evals["eval"]]
    words = sorted(sentence for part in parts for sentence in part.words)
    assert words == sorted(row["tokens"] for row in _plainly(path) if row["tokens"])
    assert all(word.encode() for sentence in words for word in sentence)
    assert all(is_tag(tag) for part in parts for tags in part.tags for tag in tags)
    return data


def data_tagged(folder: Path) -> Case:
    """Reads a table of tagged sentences: jsonl, json, parquet."""
    paths = [folder / name for name in ("a.jsonl", "b.json", "c.parquet", "d.jsonl.gz")]
    for path in paths:
        data = as_file(path, _TAGGED)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return data_case(paths, lambda path, mutator: as_file(path, _rows_changed(mutator, _TAGGED)), _read_tagged)


_PAIRS = [
    {"index": i, "sentence1": f"it is {i}", "sentence2": f"{i} it is", "label": ("entailment", "not_entailment")[i % 2]}
    for i in range(8)
]


def _read_rte(path: Path) -> Any:
    train = load_glue("rte", path.parent).train
    rows = _plainly(path)
    assert train.texts == [row["sentence1"] for row in rows]
    assert train.pairs == [row["sentence2"] for row in rows]
    assert all(label in (0, 1) for label in train.labels)
    return train


def _read_cola(path: Path) -> Any:
    train = load_glue("cola", path.parent).train
    text = path.read_bytes().decode("utf-8-sig")
    lines = [line.removesuffix("\r").split("\t") for line in text.split("\n") if line.removesuffix("\r")]
    headed = len({"source", "label", "mark", "sentence"} & set(lines[0])) > 1
    at = lines[0].index("sentence") if headed else 3
    assert train.texts == [line[at] for line in lines[headed:]]
    assert all(label in (0, 1) for label in train.labels)
    return train


_JUDGED = [{"source": "gj04", "label": i % 2, "mark": "*", "sentence": f"it is {i}"} for i in range(8)]


def data_glue(folder: Path) -> Case:
    """Reads a training file of RTE (with a header, tsv and json) and of CoLA (without one), in their folders."""
    paths = [
        folder / kind / place
        for kind, place in (("a", "RTE/train.tsv"), ("b", "RTE/train.json"), ("c", "CoLA/train.tsv"))
    ]

    def written(path: Path, rows: list[Any]) -> bytes:
        data = as_file(path, rows)
        return data.partition(b"\n")[2] if path.parent.name == "CoLA" else data

    for path in paths:
        path.parent.mkdir(parents=True)
        data = written(path, _JUDGED if path.parent.name == "CoLA" else _PAIRS)
        for file in (path, path.with_name(f"dev{path.suffix}")):
            file.write_bytes(data)

    def changed(path: Path, mutator: Mutator) -> bytes:
        return written(path, _rows_changed(mutator, _JUDGED if path.parent.name == "CoLA" else _PAIRS))

    return data_case(paths, changed, lambda path: (_read_cola if path.parent.name == "CoLA" else _read_rte)(path))


_PROBLEMS = {
    "gsm8k/train.jsonl": [
        {"question": f"What is {i} + 1?", "answer": f"{i} + 1 = <<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
        for i in range(20)
    ],
    "Math10K/train.json": [
        {"instruction": f"Twice {i}?", "input": "", "output": f"The answer is {2 * i}.", "answer": str(2 * i)}
        for i in range(20)
    ],
    "AQuA/test.json": [
        {"instruction": f"Which? (A) {i} (B) 2", "input": "", "output": "", "answer": "AB"[i % 2]} for i in range(8)
    ],
}


def _read_problems(path: Path) -> Any:
    name, split = path.parent.name.lower(), path.stem
    problems = load_problems(name, split, path.parents[1])
    questions = [row["instruction" if "instruction" in row else "question"].strip() for row in _plainly(path)]
    assert [problem.question for problem in problems] == questions
    for problem in problems:
        assert problem.question.encode()
        assert is_right(extract(f"The answer is {problem.answer}.", problem.kind), problem.answer, problem.kind)
    return (problems, load_arithmetic(name, path.parents[1])) if split == "train" else problems


def data_problems(folder: Path) -> Case:
    """Reads word problems: GSM8K's jsonl, and lists of instructions."""
    paths = [folder / place for place in _PROBLEMS]
    for path, rows in zip(paths, _PROBLEMS.values(), strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(as_file(path, rows))

    def written(path: Path, mutator: Mutator) -> bytes:
        return as_file(path, _rows_changed(mutator, _PROBLEMS[path.relative_to(folder).as_posix()]))

    return data_case(paths, written, _read_problems)


READERS: dict[str, Callable[[Path], Case]] = {
    reader.__name__: reader
    for reader in (
        *(delta_file, signed_delta, signed_coded, ladder_file, signed_ladder, checkpoint_files),
        *(state_dict, state_file, adapter_weights, adapter_config),
        *(settings_file, sweep_file, sweep_record, run_folder, outputs),
        *map(_table, (".csv", ".tsv", ".json", ".jsonl", ".parquet")),
        *(data_conll, data_tagged, data_glue, data_problems),
    )
}


def run_case(case: Case, name: str, seed: int) -> str:
    """Runs one case; a foreign error or a wrong result names the case."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return case(seed)
    except BaseException as error:
        error.add_note(f"reader {name}, seed {seed}: tests/soak/readers.py --only {name} --seed {seed} shows it again")
        raise


__all__ = ["READERS", "run_case"]
