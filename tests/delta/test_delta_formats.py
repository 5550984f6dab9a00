"""Checks the formats of a delta's file: those of every format are read, and a reader that shares no code reads format 3."""

from __future__ import annotations

import json
import resource
import zlib
from dataclasses import replace

import pytest
import torch
from delta_reader import read_delta
from helpers import mlp, trained
from make_files import FILES, deltas, main
from peft_nets import run, wrapped
from torch import nn

import unmask
from unmask import DeltaError, SparseDelta, SparseTensor, files
from unmask.delta.drawn import Draw
from unmask.delta.file import pack
from unmask.delta.fingerprint import same_bits


def assert_same(found: SparseDelta, expected: SparseDelta) -> None:
    """Checks that two deltas have the same bits everywhere."""
    assert (found.base, found.places, dict(found.metadata)) == (expected.base, expected.places, dict(expected.metadata))
    assert found.sparse.keys() == expected.sparse.keys()
    for name, entry in expected.sparse.items():
        own = found.sparse[name]
        assert own.shape == entry.shape
        assert same_bits(own.indices, entry.indices)
        assert same_bits(own.values, entry.values)
        assert (own.slots is None) == (entry.slots is None)
        assert own.slots is None or same_bits(own.slots, entry.slots)
    assert found.whole.keys() == expected.whole.keys()
    assert all(same_bits(found.whole[name], expected.whole[name]) for name in found.whole)


# Committed files.


@pytest.mark.parametrize("name", deltas())
def test_a_file_of_each_format_is_read_as_the_delta_that_it_holds(name, tmp_path):
    assert_same(SparseDelta.load(FILES / f"{name}.safetensors"), deltas()[name])
    main(tmp_path)
    assert_same(SparseDelta.load(tmp_path / f"{name}.safetensors"), deltas()[name])
    version = files.read_tensors(FILES / f"{name}.safetensors")[1]["format_version"]
    assert version == files.read_tensors(tmp_path / f"{name}.safetensors")[1]["format_version"] == int(name[6])


@pytest.mark.parametrize("name", ["format3_coded", "format3_drawn"])
def test_a_reader_that_shares_no_code_reads_the_same(name):
    data = (FILES / f"{name}.safetensors").read_bytes()
    sparse, whole, header, slots = read_delta(data)
    expected = deltas()[name]
    assert len(data) < 1024
    assert ("draw" in header) == (name == "format3_drawn")
    assert sparse == {
        name: (list(entry.shape), entry.indices.tolist(), bytes(files.tensor_bytes(entry.values)))
        for name, entry in expected.sparse.items()
    }
    assert whole == {name: bytes(files.tensor_bytes(tensor)) for name, tensor in expected.whole.items()}
    assert (header["base"], header.get("places", ""), header["metadata"]) == (
        expected.base,
        expected.places,
        expected.metadata,
    )
    order = [entry.slots for _, entry in sorted(expected.sparse.items()) if entry.slots is not None]
    assert slots == [slot for part in order for slot in part.tolist()]


# The choice of a code.


def is_drawn(delta: SparseDelta, folder) -> bool:
    """Saves and loads a delta, and returns True if its file has a seed in the place of indices."""
    path = delta.save(folder / "delta.safetensors")
    loaded = SparseDelta.load(path)
    assert_same(loaded, delta)
    assert_same(SparseDelta.load(loaded.save(folder / "again.safetensors")), delta)
    assert path.stat().st_size == (folder / "again.safetensors").stat().st_size
    assert ("indices" in files.read_tensors(path)[0]) == (loaded.draw is None)
    return loaded.draw is not None


@pytest.mark.parametrize("seed", [0, 5, -1, 2**62])
@pytest.mark.parametrize("order", [False, True])
def test_a_random_mask_is_stored_as_its_seed(seed, order, tmp_path):
    """Checks a model with tensors in which nothing was drawn, with a dense head and with one that the base lacks."""
    for method in (unmask.random_mask(30, seed), unmask.random_mask(9, seed)):
        for options in ({"dense": "head"}, {"new": "head"}, {"include": "embed|turned"}):
            delta = trained(method=method, **options)[2].delta(order=order)
            assert is_drawn(delta, tmp_path)


def test_a_random_mask_of_an_adapter_is_stored_as_its_seed(tmp_path):
    _, model = wrapped(method="random_mask")
    run(model)
    delta = unmask.peft.delta(model)
    assert len(delta) > 0
    assert is_drawn(delta, tmp_path)


def test_a_random_mask_that_is_unmasked_step_by_step_is_the_start_of_its_draw(tmp_path):
    method = unmask.random_mask(40).but(strategy="increment", schedule=unmask.Schedule.of("uniform", steps=8))
    selection = trained(method=method)[2]
    assert 0 < selection.used < 40
    assert is_drawn(selection.delta(order=True), tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        unmask.id3(60, steps=3),
        unmask.random_mask(60).but(allocation="tensor"),
        unmask.random_mask("90%"),
        unmask.repeat_d3(20).but(heuristic=unmask.heuristic("random"), name="random"),
    ],
    ids=str,
)
def test_any_other_mask_is_coded(method, tmp_path):
    assert not is_drawn(trained(method=method)[2].delta(), tmp_path)


def test_a_delta_that_is_no_longer_its_draw_is_coded(tmp_path):
    delta = trained(method=unmask.random_mask(30))[2].delta()
    name, entry = next(iter(delta.sparse.items()))
    fewer = SparseTensor(entry.indices[1:], entry.values[1:], entry.shape)
    assert not is_drawn(replace(delta, sparse={**delta.sparse, name: fewer}), tmp_path)
    assert not is_drawn(replace(delta, sparse={f"{n}.x": each for n, each in delta.sparse.items()}), tmp_path)
    assert not is_drawn(replace(delta, draw=replace(delta.draw, seed=1)), tmp_path)


@pytest.mark.parametrize("compress", [True, False])
def test_tensors_of_any_density_shape_and_dtype_come_back(compress, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        sparse = {}
        for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64) * 2):
            shape = [(0,), (), (1,), (7, 9), (300,), (0, 4), (20, 1, 30)][(trial + number) % 7]
            chosen = torch.rand(torch.Size(shape).numel(), generator=generator) < [0, 0.01, 0.2, 0.7, 1][trial % 5]
            flat = chosen.nonzero().reshape(-1)
            sparse[f"{number}"] = SparseTensor(flat, torch.randn(flat.shape, generator=generator).to(dtype), shape)
        whole = {"a": torch.arange(3), "0::whole": torch.zeros(2, 0), "header": torch.tensor([True])}
        delta = SparseDelta(sparse, whole, "sha256:0", {"note": "é"}, places="sha256:1")
        assert_same(SparseDelta.load(delta.save(tmp_path / "delta.safetensors", compress)), delta)


def test_only_whole_tensors_or_nothing_at_all(tmp_path):
    for whole in ({}, {"w": torch.ones(3)}):
        delta = SparseDelta({}, whole, "sha256:0")
        assert_same(SparseDelta.load(delta.save(tmp_path / "delta.safetensors")), delta)


# Sizes.

LAYERS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
SMOLLM2 = {f"model.layers.{i}.{name}.weight": shape for i in range(30) for name, shape in LAYERS.items()}


@pytest.mark.parametrize(("seeded", "most"), [(False, 3.4), (True, 2.1)])
def test_a_delta_of_two_thousandths_of_106m_weights_takes_few_bytes(seeded, most, tmp_path):
    """Checks the linear layers of SmolLM2-135M in bfloat16, header and provenance included."""
    with torch.device("meta"):
        model = nn.ParameterDict({name.replace(".", "|"): torch.empty(shape) for name, shape in SMOLLM2.items()})
    total, start, starts, sparse = sum(p.numel() for p in model.parameters()), 0, {}, {}
    budget = round(0.002 * total)
    positions = torch.from_numpy(unmask.methods.draw.draw(budget, total, seed=3)).sort().values
    for name, shape in sorted(SMOLLM2.items()):
        starts[name], end = start, start + torch.Size(shape).numel()
        flat = positions[(positions >= start) & (positions < end)] - start
        sparse[name], start = SparseTensor(flat, torch.randn(flat.shape).bfloat16(), shape), end
    small = mlp()
    metadata = unmask.select(small, unmask.random_mask(3)).delta("HuggingFaceTB/SmolLM2-135M").metadata
    delta = SparseDelta(sparse, {}, f"sha256:{'0123456789abcdef' * 4}", metadata, f"sha256:{'0123456789abcdef' * 4}")
    delta = replace(delta, draw=Draw(3, total, starts) if seeded else None)
    path = delta.save(tmp_path / "delta.safetensors")
    assert len(delta) == budget == 212_337
    assert path.stat().st_size / budget < most
    assert_same(SparseDelta.load(path), delta)


# Hostile files.


def signed(path, tensors, header=None, outer=None):
    """Writes a compressed file with a right checksum; ``header`` is JSON, or bytes to take the place of the compressed JSON."""
    if header is not None:
        data = header if isinstance(header, bytes) else zlib.compress(json.dumps(header).encode())
        tensors = {**tensors, "header": torch.tensor(list(data), dtype=torch.uint8)}
    outer = {"format_version": 3, **(outer or {})}
    return files.write_tensors(path, tensors, outer | {"checksum": files.checksum(outer, tensors)})


@pytest.fixture(params=["format3_coded", "format3_drawn"])
def compressed(request):
    """Returns (the tensors of a compressed file, its header)."""
    tensors, _ = files.read_tensors(FILES / f"{request.param}.safetensors")
    return tensors, json.loads(zlib.decompress(tensors["header"].numpy().tobytes()))


def damages(header):
    """Yields a word of the message, and a header that must be refused with it."""
    yield "ascend", header | {"names": header["names"][::-1]}
    yield "ascend", header | {"names": [header["names"][0]] * len(header["names"])}
    yield "columns", header | {"shapes": header["shapes"][1:]}
    yield "64 are read", header | {"shapes": [[3] * 65, *header["shapes"][1:]]}
    yield "unknown entry", header | {"more": 1}
    yield "lacks base", {key: value for key, value in header.items() if key != "base"}
    yield "dtypes", header | {"dtypes": ["int32"] * len(header["names"])}
    yield "values.float64", header | {"dtypes": ["float64"] * len(header["names"])}
    if "draw" not in header:
        counts, lengths = header["counts"], header["lengths"]
        yield "missing", {key: value for key, value in header.items() if key != "counts"}
        yield "counts", header | {"counts": [2**60, *counts[1:]]}
        yield "counts", header | {"lengths": [lengths[0] + 1, *lengths[1:]]}
        yield "for 5 indices|damaged", header | {"counts": [counts[0] + 1, counts[1] - 1, *counts[2:]]}
        yield "damaged", header | {"parameters": [99] * len(counts)}
        yield "damaged", header | {"shapes": [[2**62, 4], *header["shapes"][1:]]}
        yield (
            "belongs to nothing",
            {k: v for k, v in header.items() if k not in ("counts", "lengths", "parameters")}
            | {"draw": {"seed": 0, "total": 2**40, "skipped": [0] * len(counts), "sha256": ""}},
        )
        return
    draw = header["draw"]
    yield "another hash", header | {"draw": draw | {"sha256": "0" * 64}}
    yield "another hash|none of its", header | {"draw": draw | {"seed": 0}}
    yield "whole number", header | {"draw": draw | {"seed": 2**63}}
    yield "of a draw from", header | {"draw": draw | {"total": 2**41}}
    yield "of a draw from|more than", header | {"draw": draw | {"total": 47}}
    yield "more than the", header | {"draw": draw | {"total": 600}}
    yield "skipped", header | {"draw": draw | {"skipped": []}}
    yield "more than|none of its", header | {"draw": draw | {"skipped": [300, 0, 0]}}
    yield "outside", header | {"shapes": [[1], [9, 10], [4, 50]], "draw": draw | {"skipped": [0, 299, 30]}}


def test_a_signed_header_that_does_not_fit_is_refused(compressed, tmp_path):
    tensors, header = compressed
    assert SparseDelta.load(signed(tmp_path / "same.safetensors", tensors, header)).base == "sha256:3"
    for words, damaged in damages(header):
        with pytest.raises(DeltaError, match=words):
            SparseDelta.load(signed(tmp_path / "damaged.safetensors", tensors, damaged))


def test_a_signed_file_of_other_tensors_is_refused(compressed, tmp_path):
    tensors, _ = compressed
    for key, tensor in tensors.items():
        others = [tensor.reshape(1, -1), tensor.reshape(-1)[:-1], tensor.double(), None]
        for other in others if not key.endswith("::whole") else [None]:
            changed = {name: each for name, each in tensors.items() if name != key}
            changed |= {"x": tensor} if other is None else {key: other}
            with pytest.raises(DeltaError):
                SparseDelta.load(signed(tmp_path / "damaged.safetensors", changed))
    with pytest.raises(DeltaError, match="unknown entry"):
        SparseDelta.load(signed(tmp_path / "damaged.safetensors", tensors, outer={"base": "sha256:3"}))


@pytest.mark.parametrize("name", ["format1", "format2"])
def test_a_shape_that_takes_long_to_multiply_is_refused(name, tmp_path):
    """Checks a shape of 200,000 sizes, whose product once kept the reader busy for minutes."""
    tensors, header = files.read_tensors(FILES / f"{name}.safetensors")
    header["shapes"]["body.bias"] = [2**62] * 200_000
    header["checksum"] = files.checksum(header, tensors)
    with pytest.raises(DeltaError, match="has 200000 dimensions; at most 64 are read"):
        SparseDelta.load(files.write_tensors(tmp_path / "long.safetensors", tensors, header))


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (zlib.compress(bytes(2**29), 9), "more than 33,554,432 bytes"),
        (zlib.compress(b"[" + b"[]," * 9_000_000 + b"0]", 9), "about .* values"),
        (zlib.compress(b"[" * 2_000_000, 9), "about|nested"),
        (zlib.compress(b"{}", 9)[:-1], "too early"),
        (zlib.compress(b"{}", 9) + b"x", "too late"),
        (b"nothing", "cannot be decompressed"),
        (b"", "too early"),
    ],
)
def test_a_header_that_would_take_memory_is_refused_before_it_does(bomb, words, tmp_path):
    tensors, _ = files.read_tensors(FILES / "format3_coded.safetensors")
    path = signed(tmp_path / "bomb.safetensors", tensors, bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DeltaError, match=words):
        SparseDelta.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # in KB


def test_metadata_that_are_no_json_are_refused_in_both_forms():
    for compress in (True, False):
        with pytest.raises(DeltaError, match="Give JSON values"):
            pack({}, {}, "sha256:0", {"note": torch.zeros(1)}, compress=compress)
