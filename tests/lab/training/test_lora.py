"""Tests a selection inside a peft LoRA: it is the paper's, leaves the base as it is, and gives a complete delta."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    as_lists,
    assert_same_tensors,
    assert_unselected_is_base,
    d3_scores,
    dense_gradients,
    first_k,
    snapshot,
    train,
)
from lora_nets import lora_bert, sentences, tiny_bert
from safetensors.torch import load_file
from torch import Tensor, nn

import unmask
from peft import PeftModel
from unmask import DeltaError, SparseDelta, SparseTensor
from unmask.delta.base import added_tensors
from unmask.files import read_tensors

KINDS = {
    "r8": {"r": 8, "lora_alpha": 8},
    "r32": {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
}
HEAD = "modules_to_save.*classifier|classifier.*modules_to_save"

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(sentences(3)[2]["input_ids"]).logits


def tuned(seed: int = 0, budget: int = 60, method: unmask.Method | None = None, **settings: object):
    """Returns a model with a LoRA after 5 steps of ID3 inside it, and its selection."""
    model = lora_bert(seed, **settings)
    selection = unmask.select(model, method or unmask.id3(budget, steps=5), include="lora_", dense=HEAD)
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.03), sentences(5), loss)  # type: ignore[arg-type]
    return model, selection


# Selecting and training.


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_the_best_by_d3_of_the_dense_gradient(kind: str) -> None:
    model, batch = lora_bert(init_lora_weights=False, **KINDS[kind]), sentences(1)[0]
    gradients = dense_gradients(model, lambda m: loss(m, batch))
    scores = {name: score for name, score in d3_scores(model, gradients).items() if "lora_" in name}
    selection = unmask.select(model, unmask.static_d3(50), include="lora_")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    loss(model, batch).backward()
    optimizer.step()
    assert as_lists(selection.indices) == first_k(scores, 50)
    before = lora_bert(init_lora_weights=False, **KINDS[kind])
    for name, flat in selection.indices.items():
        stepped = before.get_parameter(name).detach() - 0.1 * gradients[name]
        moved = model.get_parameter(name).detach().reshape(-1)[flat]
        torch.testing.assert_close(moved, stepped.reshape(-1)[flat])


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_is_not_selected_stays_bitwise(kind: str) -> None:
    base = snapshot(lora_bert(**KINDS[kind]))
    model = lora_bert(**KINDS[kind])
    selection = unmask.select(model, unmask.id3(60, steps=5), include="lora_")
    train(model, torch.optim.AdamW(selection.parameters(), lr=0.03), sentences(5), loss)  # type: ignore[arg-type]
    assert selection.used == 60
    assert all("lora_" in name for name in selection.indices)
    assert_unselected_is_base(model, base, selection)


@pytest.mark.parametrize("kind", ["r8", "dora"])
def test_gradients_at_the_selected_entries_agree_with_dense_ones(kind: str) -> None:
    runs = []
    for gradients in ("dense", "sampled"):
        model = lora_bert(**KINDS[kind])
        selection = unmask.select(model, unmask.id3(60, steps=4, stride=2), include="lora_", gradients=gradients)
        train(model, torch.optim.SGD(selection.parameters(), lr=0.5), sentences(6), loss)  # type: ignore[arg-type]
        runs.append((as_lists(selection.indices), selection.values.detach()))
    assert runs[0][0] == runs[1][0]
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-4, atol=1e-6)


# The delta is complete.


def test_added_tensors_finds_what_peft_added() -> None:
    plain = set(tiny_bert().state_dict())
    model = lora_bert(use_dora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", model.peft_config["default"])
    added = added_tensors(model)
    assert {name for name in added if "modules_to_save" in name} == {
        f"base_model.model.classifier.modules_to_save.{adapter}.{kind}"
        for adapter in ("default", "second")
        for kind in ("weight", "bias")
    }
    assert {name for name in added if "modules_to_save" not in name} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    assert len(set(model.state_dict()) - added) == len(plain)
    assert added_tensors(tiny_bert()) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_onto_another_random_init_gives_the_same_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, selection = tuned(**KINDS[kind])
    fresh = lora_bert(seed=1, **KINDS[kind])
    before = snapshot(fresh)
    delta = SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    displaced = delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
    assert torch.equal(logits(fresh), logits(model))
    assert len(delta) == 60
    displaced.apply(fresh)
    assert_same_tensors(snapshot(fresh), before)


def test_tensors_that_the_user_names_as_new_do_not_hide_what_peft_added() -> None:
    model = lora_bert()
    selection = unmask.select(model, unmask.random_mask(20), include="lora_", new="bert.pooler")
    whole = set(selection.delta().whole)
    assert added_tensors(model) < whole
    assert {name for name in whole if "pooler" in name} == {
        f"base_model.model.bert.pooler.dense.{kind}" for kind in ("weight", "bias")
    }


def test_the_delta_holds_the_initial_values_and_what_was_trained_over_them() -> None:
    model, selection = tuned()
    delta, initial = selection.delta(), snapshot(lora_bert())
    assert delta.overlaid == sorted(selection.indices)
    for name in added_tensors(model):
        if "lora_" in name:
            assert torch.equal(delta.whole[name], initial[name])
    assert torch.equal(
        delta.whole["base_model.model.classifier.modules_to_save.default.weight"],
        snapshot(model)["base_model.model.classifier.modules_to_save.default.weight"],
    )


def test_a_fresh_process_reproduces_the_outputs(tmp_path: Path) -> None:
    model, selection = tuned()
    selection.delta().save(tmp_path / "delta.safetensors")
    script = (
        "import sys, torch, unmask; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "from lora_nets import lora_bert, sentences; folder = Path(sys.argv[1]); model = lora_bert(seed=9)\n"
        "unmask.SparseDelta.load(folder / 'delta.safetensors').apply(model)\n"
        "with torch.no_grad(): torch.save(model.eval()(sentences(3)[2]['input_ids']).logits, folder / 'logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path, ROOT / "tests" / "support"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))


def test_another_base_under_the_same_lora_is_refused() -> None:
    _, selection = tuned()
    with pytest.raises(DeltaError, match="not the delta's base"):
        selection.delta().apply(lora_bert(base=tiny_bert(seed=1)))


# An ordinary LoRA.


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("kind", ["r8", "dora"])
def test_the_model_exports_as_an_ordinary_lora(kind: str, released: bool, tmp_path: Path) -> None:
    model, selection = tuned(**KINDS[kind])
    if released:
        selection.release()
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))
    lora_bert(**KINDS[kind]).save_pretrained(tmp_path / "never-selected")
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("lora", "never-selected")]
    assert saved[0].keys() == saved[1].keys()


def test_the_model_merges_like_an_ordinary_lora() -> None:
    model, selection = tuned()
    expected = logits(model)
    selection.release()
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


# The file.


def test_a_plain_file_has_version_2_with_overlaid_tensors_and_3_with_places(tmp_path: Path) -> None:
    _, inside = tuned()
    outside = unmask.select(tiny_bert(), unmask.random_mask(20))
    deltas = [replace(selection.delta(), places="") for selection in (inside, outside)]
    deltas.append(replace(deltas[0], places="sha256:0"))
    versions = [
        read_tensors(delta.save(tmp_path / f"{i}.safetensors", compress=False))[1]["format_version"]
        for i, delta in enumerate(deltas)
    ]
    assert versions == [2, 1, 3]


def test_an_overlay_of_another_shape_or_dtype_is_refused() -> None:
    entry = SparseTensor(torch.tensor([1]), torch.tensor([2.0]), (3,))
    for whole in (torch.zeros(4), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(DeltaError, match="as a whole and"):
            SparseDelta({"w": entry}, {"w": whole}, "sha256:0")
