"""Checks that a delta between two checkpoints in files gives the tuned one bit for bit, in the memory of a tensor."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from checkpoints import FLOATS, INDEX, OTHERS, save, stored, there_and_back, values
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import unmask
from unmask import DeltaError, SparseDelta
from unmask.delta.between import index_bits
from unmask.delta.fingerprint import digest, fingerprint
from unmask.delta.rebuild import write_tuned
from unmask.files import tensor_bytes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_changed_entries_of_floats_are_held_one_by_one_by_their_bits(dtype, tmp_path):
    base = torch.randn(40, 50).to(dtype)
    base[0, 1], base[2, 0] = 0.0, torch.nan
    tuned = base.clone()
    tuned[0, 1] = -0.0  # another sign is a change
    tuned[2, 0] = 1.5
    tuned[39, 49] = 3
    for name, tensor in (("base", base), ("tuned", tuned)):
        save(tmp_path / name, {"w": tensor, "same": torch.full((3,), torch.nan)})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert delta.whole == {}
    assert delta.sparse["w"].indices.tolist() == [1, 100, 1999]
    made = delta.provenance.between
    assert made["weights"] == 2003
    assert made["bytes"] == 2000 * dtype.itemsize + 12


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_tensor_with_a_new_value_that_is_not_finite_is_held_whole(dtype, value, tmp_path):
    base = torch.randn(40, 50).to(dtype)
    tuned = base.clone()
    tuned[3, 4] = value
    save(tmp_path / "base", {"w": base})
    save(tmp_path / "tuned", {"w": tuned})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert list(delta.whole) == ["w"]
    assert not delta.sparse


def test_another_payload_of_a_nan_is_a_change(tmp_path):
    bits = torch.full((100,), 0x7FC00000, dtype=torch.int32)
    other = bits.clone()
    other[7] += 1
    save(tmp_path / "base", {"w": bits.view(torch.float32)})
    save(tmp_path / "tuned", {"w": other.view(torch.float32)})
    assert list(there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path).whole) == ["w"]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_other_dtypes_are_held_whole_if_a_bit_differs(dtype, tmp_path):
    draw = torch.Generator().manual_seed(1)
    base, same = values(dtype, (64, 8), draw), values(dtype, (4,), draw)
    tuned = base.clone()
    tuned[5] = values(dtype, (8,), draw)
    save(tmp_path / "base", {"w": base, "same": same, "f": torch.zeros(2)})
    save(tmp_path / "tuned", {"w": tuned, "same": same, "f": torch.zeros(2)})
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    assert list(delta.whole) == ["w"]


def test_a_tensor_goes_whole_where_its_entries_would_take_more_than_three_quarters_of_it():
    """The bits of an index are those of the best Golomb-Rice code of random gaps, counted here by coding drawn gaps."""
    draw = random.Random(0)
    for density in (0.002, 0.05, 0.3, 0.8):
        gaps = [0] * 20_000
        for i in range(len(gaps)):
            while draw.random() > density:
                gaps[i] += 1
        coded = min(sum(k + 1 + (gap >> k) for gap in gaps) / len(gaps) for k in range(14))
        assert index_bits(density) == pytest.approx(coded, rel=0.02)
    base = torch.zeros(1000, dtype=torch.bfloat16)
    held = {}
    for changed in range(1, 1001, 9):
        tuned = base.clone()
        tuned[:changed] = 1
        delta = SparseDelta.between({"w": base}, {"w": tuned})
        assert len(delta) == (changed if delta.sparse else 0)
        held[changed] = bool(delta.sparse)
        assert held[changed] == (changed * (16 + index_bits(changed / 1000)) <= 0.75 * 16_000)
    assert set(held.values()) == {True, False}


def random_pair(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[str]]]:
    """Returns a base, a tuned checkpoint, and the names of the tensors that were added, removed and replaced."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    prefix = draw.choice(["", "net.", "a.b."])
    base, tuned = {}, {}
    kinds: dict[str, list[str]] = {"added": [], "removed": [], "replaced": []}
    for i in range(draw.randrange(3, 14)):
        dtype = draw.choice([*FLOATS, *FLOATS, *OTHERS])
        shape = draw.choice([(), (0,), (1,), (7,), (5, 9), (3, 4, 5), (64, 32)])
        name, value = f"layer.{i}.weight", values(dtype, shape, torch_draw)
        kind = (
            draw.choice(["same", "same", "few", "few", "many", "added", "removed", "shape", "dtype"]) if i else "same"
        )
        if kind != "added":
            base[name] = value
        if kind == "added":
            kinds["added"].append(prefix + name)
        if kind == "removed":
            kinds["removed"].append(prefix + name)
            continue
        if kind in ("few", "many"):
            other = values(dtype, shape, torch_draw)
            where = torch.rand(shape, generator=torch_draw) < (0.05 if kind == "few" else 0.95)
            value = torch.where(where, other, value) if dtype in FLOATS else other
        if kind == "shape":
            value = values(dtype, (2, 3), torch_draw)
            kinds["replaced"].append(prefix + name)
        if kind == "dtype":
            value = values(torch.float16 if dtype is torch.float32 else torch.float32, shape, torch_draw)
            kinds["replaced"].append(prefix + name)
            if value.dtype == dtype:
                kinds["replaced"].pop()
        tuned[prefix + name] = value
    return base, tuned, kinds


@pytest.mark.parametrize("seed", range(40))
def test_a_random_pair_of_checkpoints_comes_back_bit_for_bit(seed, tmp_path):
    base, tuned, kinds = random_pair(seed)
    shards = 1 + seed % 3 if len(base) >= 3 else 1
    save(tmp_path / "base", base, shards)
    save(tmp_path / "tuned", tuned, 1 + seed % 2)
    delta = there_and_back(tmp_path / "base", tmp_path / "tuned", tmp_path)
    made = delta.provenance.between
    assert {kind: made[kind] for kind in kinds} == {kind: sorted(names) for kind, names in kinds.items()}
    assert made["weights"] == sum(tensor.numel() for tensor in tuned.values())
    assert made["bytes"] == sum(len(tensor_bytes(tensor)) for tensor in tuned.values())
    if shards > 1:
        index = json.loads((tmp_path / "again" / INDEX).read_text())
        assert index["metadata"] == {"total_size": made["bytes"], "total_parameters": made["weights"]}
        for name, place in index["weight_map"].items():
            with safe_open(tmp_path / "again" / place, framework="pt") as file:
                assert name in file.keys()  # noqa: SIM118 (not a dict)
                assert file.metadata() == {"format": "pt"}
        assert index["weight_map"].keys() == tuned.keys()
    forms = {name: (tuple(t.shape), t.dtype) for name, t in tuned.items()}
    kept = {name: t for name, t in base.items() if forms.get(name) == (tuple(t.shape), t.dtype)}
    if kept == base and base.keys() == tuned.keys():  # the delta fits tensors in memory too
        assert fingerprint({n: digest(t) for n, t in base.items() if n not in delta.whole}) == delta.base


# Refusals.


def refused(match: str, base: object, tuned: object) -> None:
    with pytest.raises(DeltaError, match=match):
        SparseDelta.between(base, tuned)


def test_what_is_no_pair_of_checkpoints_is_refused(tmp_path):
    one, two = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    good = save(tmp_path / "good", one)
    (tmp_path / "empty").mkdir()
    refused("holds no safetensors file", tmp_path / "empty", good)
    refused("no checkpoint at", tmp_path / "absent", good)
    refused("no checkpoint at", str(tmp_path / "absent.safetensors"), good)
    (tmp_path / "note.txt").write_text("hello")
    refused("is no checkpoint; give a folder", tmp_path / "note.txt", good)
    torch.save(one, tmp_path / "empty" / "pytorch_model.bin")
    refused(r"pickled.*save_pretrained", good, tmp_path / "empty")
    refused(r"pickled.*save_pretrained", good, tmp_path / "empty" / "pytorch_model.bin")
    refused("give two", good, tmp_path / "good" / "model.safetensors")
    model = nn.Linear(2, 2)
    refused("give two", model, model)
    refused("no tensor of one name and shape", one, {"v": torch.zeros(3)})
    refused("no tensor of one name and shape", one, {"w": torch.zeros(4)})
    refused("meta device", nn.Linear(2, 2, device="meta"), model)
    refused("only ordinary tensors", {"w": torch.zeros(3).to_sparse()}, two)
    selection = unmask.select(model, unmask.random_mask(2))
    refused("live selection", nn.Linear(2, 2), model)
    selection.release()


def test_incomplete_and_damaged_files_are_refused(tmp_path):
    tensors = {f"w{i}": torch.randn(4) for i in range(6)}
    good, cut = save(tmp_path / "good", tensors), save(tmp_path / "cut", tensors, shards=3)
    (cut / "model-00002-of-00003.safetensors").unlink()
    refused(r"lacks 1 of the 3 files.*model-00002", good, cut)
    index = json.loads((cut / INDEX).read_text())
    index["weight_map"] = {"w0": "model-00001-of-00003.safetensors", "x": "model-00001-of-00003.safetensors"}
    (cut / INDEX).write_text(json.dumps(index))
    refused(r"lacks the tensor 'x'", good, cut)
    (cut / INDEX).write_text('{"weight_map": {"w0": "../good/model.safetensors"}}')
    refused(r"no safetensors file in its folder", good, cut)
    save_file(tensors, cut / "model.safetensors")  # transformers reads this one, if there are both
    assert len(SparseDelta.between(good, cut)) == 0
    (cut / "model.safetensors").unlink()
    (cut / INDEX).unlink()
    refused(r"has 2 safetensors files .* no model\.safetensors\.index\.json", good, cut)
    data = (good / "model.safetensors").read_bytes()
    short = save(tmp_path / "short", tensors)
    (short / "model.safetensors").write_bytes(data[:-3])
    refused(r"do not fit its shape or the file", short, good)
    (short / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F99"'))
    refused(r"dtype 'F99'", short, good)


def test_another_base_is_refused_and_nothing_is_written(tmp_path):
    base = {"a.weight": torch.randn(30, 4), "b.weight": torch.randn(8)}
    tuned = {**base, "a.weight": base["a.weight"].clone()}
    tuned["a.weight"][3, 2] = 9
    for name, tensors in (("base", base), ("tuned", tuned)):
        save(tmp_path / name, tensors)
    delta = SparseDelta.between(tmp_path / "base", tmp_path / "tuned")
    others = {
        "fingerprint": {**base, "b.weight": base["b.weight"] + 1},
        "has no tensor 'a.weight'": {"b.weight": base["b.weight"]},
        "of shape": {**base, "a.weight": torch.zeros(4, 4)},
        "bfloat16": {name: tensor.bfloat16() for name, tensor in base.items()},
    }
    for i, (words, tensors) in enumerate(others.items()):
        other = save(tmp_path / f"other{i}", tensors)
        with pytest.raises(DeltaError, match=words):
            write_tuned(delta, str(other), tmp_path / "out")
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["base", "other0", "other1", "other2", "other3", "tuned"]


# The Hub.


def test_a_hub_id_is_read_from_the_cache_and_else_downloaded(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    base = save(tmp_path / "snapshot", {f"w{i}": torch.randn(50) for i in range(4)}, shards=2)
    cached = save(tmp_path / "cached", {f"w{i}": torch.zeros(50) for i in range(4)}, shards=2)
    calls: list[tuple[str, bool]] = []
    broken: list[str] = []

    def download(model: str, local_files_only: bool = False, **wanted: object) -> str:
        calls.append((model, local_files_only))
        assert "*.safetensors" in wanted["allow_patterns"]
        if model in broken and not local_files_only:
            raise ConnectionError("no way to the Hub")
        if model == "some/cached":
            return str(cached)
        if local_files_only or model != "some/base":
            raise LocalEntryNotFoundError(f"no {model} here")
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    delta = SparseDelta.between("some/base", "some/cached")
    assert calls == [("some/base", True), ("some/base", False), ("some/cached", True)]
    assert delta.metadata["base_id"] == "some/base"
    assert len(delta.whole) == 4
    write_tuned(delta, "some/base", tmp_path / "out")
    assert stored(tmp_path / "out") == stored(cached)
    assert (tmp_path / "out" / "config.json").is_file()
    next(cached.glob("*.safetensors")).unlink()  # half of it is in the cache
    refused("lacks 1 of the 2 files", "some/base", "some/cached")
    assert calls[-2:] == [("some/cached", True), ("some/cached", False)]
    broken.append("some/cached")  # and the Hub cannot be reached: the cache's fault is named
    refused("lacks 1 of the 2 files", "some/base", "some/cached")
    refused(r"no such model was found on the Hub: no some/other here", "some/other", base)


# Memory.


def most_memory(work: Callable[[], object]) -> int:
    """Returns the most bytes that tensors on the CPU had at one moment of some work, as torch's profiler counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    found = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(found, key=lambda event: event.start_ns())))


def test_the_memory_needed_follows_the_largest_tensor(tmp_path):
    """Each checkpoint has 60 tensors of 256 KB, 15 MB in all."""
    size = 256 * 2**10
    tensors = {f"layers.{i}.weight": torch.randn(256, 256) for i in range(60)}
    save(tmp_path / "base", tensors)
    for tensor in tensors.values():
        tensor[::16, 5] += 1
    save(tmp_path / "tuned", tensors)
    made = []
    most = most_memory(lambda: made.append(SparseDelta.between(tmp_path / "base", tmp_path / "tuned")))
    assert len(made[0]) == 60 * 16
    assert 2 * size <= most < 3 * size
    most = most_memory(lambda: write_tuned(made[0], str(tmp_path / "base"), tmp_path / "again"))
    assert size <= most < 2 * size
    assert stored(tmp_path / "again") == stored(tmp_path / "tuned")
