"""Tests selection inside the bottleneck adapters (Pfeiffer, Houlsby) of the `adapters` library, under transformers 4.57."""

from __future__ import annotations

import json
from pathlib import Path

import adapters
import pytest
import torch
from commands import run, train_words
from helpers import (
    as_lists,
    assert_same_tensors,
    assert_unselected_is_base,
    d3_scores,
    dense_gradients,
    first_k,
    snapshot,
)
from helpers import train as train_steps
from inside_runs import DATA, assert_seeds_give_the_same_model, delta_of, outputs
from lora_nets import sentences, tiny_bert
from tiny import tiny_world
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import unmask
from unmask.delta.base import added_tensors
from unmask.lab.inside import NAME
from unmask.lab.models import load_tuned

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

KINDS = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn"}
INSIDE = rf"\.adapters\.{NAME}\."


def adapted_bert(kind: str = "houlsby", seed: int = 0) -> nn.Module:
    """Returns the one base with new adapters; ``seed`` is that of the adapters' initialisation."""
    model = tiny_bert()
    adapters.init(model)
    torch.manual_seed(100 + seed)
    model.add_adapter(NAME, config=adapters.AdapterConfig.load(KINDS[kind], reduction_factor=4))
    model.set_active_adapters(NAME)
    return model.train()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


# The library.


@pytest.mark.parametrize("kind", KINDS)
def test_the_added_tensors_are_found_by_the_librarys_own_listing(kind: str) -> None:
    model = adapted_bert(kind)
    added = added_tensors(model)
    assert added == {name for name, _ in model.named_parameters() if f".adapters.{NAME}." in name}
    places = {"pfeiffer": 1, "houlsby": 2}[kind]
    assert (
        len(added) == 2 * places * 4
    )  # two encoder layers, `places` adapters in each, weight and bias of two linear layers
    names = {name for name, _ in model.named_parameters()}
    assert names - added == {name for name, _ in tiny_bert().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_selection_is_the_best_by_d3_of_the_dense_gradient(kind: str) -> None:
    model, batch = adapted_bert(kind), sentences(1)[0]
    base = snapshot(model)
    scores = d3_scores(model, dense_gradients(model, lambda m: loss(m, batch)))
    expected = first_k({name: score for name, score in scores.items() if "adapters" in name}, 50)
    selection = unmask.select(model, unmask.static_d3(50), include=INSIDE)
    train_steps(model, torch.optim.AdamW(selection.parameters(), lr=0.05), [batch], loss)  # type: ignore[arg-type]
    assert as_lists(selection.indices) == expected
    assert_unselected_is_base(model, base, selection)


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_onto_another_random_init_gives_the_same_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, fresh = adapted_bert(kind), adapted_bert(kind, seed=1)
    before = snapshot(fresh)
    selection = unmask.select(model, unmask.id3(60, steps=5), include=INSIDE)
    train_steps(model, torch.optim.AdamW(selection.parameters(), lr=0.05), sentences(5), loss)  # type: ignore[arg-type]
    delta = unmask.SparseDelta.load(selection.delta().save(tmp_path / "delta.safetensors"))
    displaced = delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
    assert torch.equal(outputs(fresh), outputs(model))
    assert len(delta) == 60
    displaced.apply(fresh)
    assert_same_tensors(snapshot(fresh), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("criterion", ["random", "magnitude", "snip", "grasp", "synflow"])
def test_sparse_adapter_prunes_to_zero_and_trains_the_rest(kind: str, criterion: str) -> None:
    model = adapted_bert(kind)
    selection = unmask.select(model, unmask.sparse_adapter(80, criterion, sentences(2)), include=INSIDE)
    train_steps(model, torch.optim.AdamW(selection.parameters(), lr=0.05), sentences(3), loss)  # type: ignore[arg-type]
    nonzero = {name: int(p.count_nonzero()) for name, p in model.named_parameters() if "adapters" in name}
    assert selection.used == 80
    assert sum(nonzero.values()) <= 80  # a kept bias starts at zero, and stays zero without a gradient
    assert sum(nonzero.values()) > 40
    assert all(count <= selection.indices.get(name, torch.empty(0)).numel() for name, count in nonzero.items())


# The command line.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("bottlenecks"))
    for kind in KINDS:
        words = ("--into", kind, "--set", "reduction_factor=4", "--set", "save_steps=8")
        run(*train_words(kind), *words, cwd=root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_lies_inside_and_eval_gives_the_figure_of_training(kind: str, world: Path) -> None:
    delta, summary = delta_of(world / kind), json.loads((world / kind / "summary.json").read_text())
    assert len(delta) == summary["used"] == 120
    assert all(f".adapters.{NAME}." in name for name in delta.sparse)
    assert {name for name in delta.whole if "adapters" not in name} == {"classifier.weight", "classifier.bias"}
    assert summary["after"]["loss"] < summary["before"]["loss"]
    printed = run("eval", "base", f"{kind}/delta.safetensors", *DATA, cwd=world).stdout
    assert f"accuracy {summary['after']['accuracy']:.4f}" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_of_head_and_adapters_gives_the_same_outputs_bit_for_bit(kind: str, world: Path) -> None:
    assert_seeds_give_the_same_model(world, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_apply_writes_an_ordinary_adapter(kind: str, world: Path) -> None:
    run("apply", "base", f"{kind}/delta.safetensors", "--output", f"{kind}-adapter", "--adapter", cwd=world)
    model = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=2)
    adapters.init(model)
    name = model.load_adapter(str(world / f"{kind}-adapter"), set_active=True, use_safetensors=True)
    assert name == NAME
    assert torch.equal(outputs(model), outputs(load_tuned(str(world / "base"), delta_of(world / kind))[0]))


def test_bottlenecks_cannot_be_merged(world: Path) -> None:
    done = run("apply", "base", "houlsby/delta.safetensors", "--output", "merged", cwd=world, check=False)
    assert done.returncode == 1
    assert "cannot be merged" in done.stderr
    assert not (world / "merged").exists()


@pytest.mark.parametrize("criterion", ["snip", "grasp", "synflow"])
def test_sparse_adapter_runs_from_the_command_line(criterion: str, world: Path) -> None:
    words = (
        "--into",
        "pfeiffer",
        "--method",
        "sparse_adapter",
        "--set",
        f"criterion={criterion}",
        "--set",
        "max_steps=3",
    )
    run(*train_words(f"sparse-{criterion}"), *words, "--set", "reduction_factor=4", cwd=world)
    delta = delta_of(world / f"sparse-{criterion}")
    model = load_tuned(str(world / "base"), delta)[0]
    nonzero = sum(int(p.count_nonzero()) for name, p in model.named_parameters() if f".adapters.{NAME}." in name)
    assert len(delta) == 120
    assert nonzero <= 120
