"""Tests `unmask inspect`, its figure, and the allocation that a run of `unmask train` records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import run, train_words
from tiny import tiny_world

import unmask
from unmask.analysis import changed, mask_of, overlap, snapshot, sparsity_entropy, tensor_sparsity
from unmask.errors import ConfigError
from unmask.files import read_tensors
from unmask.lab.figures import allocation_maps
from unmask.lab.training.config import TrainConfig

# These tests are not about the Trainer's own warnings.
pytestmark = pytest.mark.filterwarnings("default")

SETTINGS = ("--set", "eval_steps=6", "--set", "order=true")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tiny_world(tmp_path_factory.mktemp("world"))
    run(*train_words("run", *SETTINGS), cwd=root)
    return root


@pytest.fixture
def delta(world: Path) -> unmask.SparseDelta:
    return unmask.SparseDelta.load(world / "run" / "delta.safetensors")


def course(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "allocation.jsonl").read_text().splitlines()]


def test_the_counts_of_inspect_add_up(world, delta):
    facts = json.loads(run("inspect", "run/delta.safetensors", "--json", cwd=world).stdout)
    for view in ("layers", "kinds", "tensors"):
        assert sum(row["changed"] for row in facts[view].values()) == 120
    assert sum(row["unmasked"] for row in facts["allocation"]) == 120
    assert (
        facts["tensor_sparsity"] == tensor_sparsity(delta) == 1 - len(facts["tensors"]) / facts["eligible"]["tensors"]
    )
    printed = run("inspect", "run/delta.safetensors", cwd=world).stdout
    assert f"in {len(facts['tensors'])} of {facts['eligible']['tensors']} tensors" in printed
    assert facts["sparsity_entropy"] == sparsity_entropy(delta, of="density")
    assert facts["sparsity_entropy_share"] == sparsity_entropy(delta, of="share")
    words = f"entropy {facts['sparsity_entropy']:.3f} nats of the densities, {facts['sparsity_entropy_share']:.3f} of"
    assert words in " ".join(printed.split())


@pytest.mark.parametrize("compress", [True, False])
def test_the_parts_of_the_file_add_up(compress, delta, tmp_path):
    path = delta.save(tmp_path / "delta.safetensors", compress)
    facts = json.loads(run("inspect", str(path), "--json", cwd=tmp_path).stdout)
    tensors = read_tensors(path)[0]
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
    whole = sum(size for key, size in sizes.items() if key.endswith("::whole"))
    indices = sizes["indices"] if compress else 4 * 120
    assert sum(facts["parts"].values()) == facts["bytes"] == path.stat().st_size
    assert {**facts["parts"], "header": 0} == {
        "indices": indices, "values": 4 * 120, "slots": 4 * 120, "whole": whole, "header": 0,
    }  # fmt: skip
    assert f"indices at {8 * indices / 120:.2f} bits each; bytes: indices {indices}, values 480" in " ".join(
        run("inspect", str(path), cwd=tmp_path).stdout.split()
    )


def test_a_random_mask_of_a_file_names_its_seed(tmp_path):
    model = torch.nn.Linear(8, 8)
    selection = unmask.select(model, unmask.random_mask(20, seed=7))
    model(torch.ones(1, 8)).sum().backward()
    torch.optim.SGD(selection.parameters(), lr=0.1).step()
    path = selection.delta().save(tmp_path / "delta.safetensors")
    facts = json.loads(run("inspect", str(path), "--json", cwd=tmp_path).stdout)
    assert (facts["format"], facts["seed"], facts["parts"]["indices"], facts["parts"]["values"]) == (3, 7, 0, 80)
    assert "format 3, indices drawn again from seed 7;" in run("inspect", str(path), cwd=tmp_path).stdout


def test_the_allocation_along_the_run_is_that_of_the_slots(world, delta):
    rows = course(world / "run")
    assert [(row["step"], row["used"]) for row in rows] == [(1, 5), (6, 30), (12, 60), (18, 90), (24, 120)]
    for row in rows:
        read_off = snapshot(mask_of(delta, row["used"]))
        for measure in ("tensor_sparsity", "sparsity_entropy", "sparsity_entropy_share"):
            assert row[measure] == read_off[measure]
        assert [r for r in row["rows"] if r["unmasked"]] == [
            {**r, "of": known["of"]}
            for r in read_off["rows"]
            if r["unmasked"]
            for known in row["rows"]
            if (known["layer"], known["kind"]) == (r["layer"], r["kind"])
        ]


def test_repeat_s_records_its_allocation_too(world):
    run(*train_words("repeat", "--method", "repeat_d3", "--set", "eval_steps=12"), cwd=world)
    assert [(row["step"], row["used"]) for row in course(world / "repeat")] == [(1, 120), (12, 120), (24, 120)]
    records = [
        {"name": name, "method": name, "task": "toy", "model": "tiny", "budget": 120, "share": 0.01, "seed": 0, "lr": 0.05,
         "score": 1.0, "allocation": course(world / folder)}
        for name, folder in (("id3", "run"), ("repeat_d3", "repeat"))
    ]  # fmt: skip
    assert len(allocation_maps(records).axes) == 8  # panels and their colour bars


def test_repeat_s_that_keeps_weights_records_its_picks_too(world):
    run(*train_words("kept", "--method", "repeat_d3", "--set", "leaving=kept", "--set", "eval_steps=12"), cwd=world)
    rows = course(world / "kept")
    assert [row["step"] for row in rows] == [1, 12, 24]
    assert rows[0]["used"] == 120 < rows[1]["used"] <= rows[2]["used"]
    for row in rows:
        assert sum(cell["unmasked"] for cell in row["picked"]) == 120
        assert sum(cell["unmasked"] for cell in row["rows"]) == row["used"]
    printed = " ".join(run("inspect", "kept/delta.safetensors", cwd=world).stdout.split())
    assert f"{rows[2]['used']} tuned at a budget of 120 a step after 24 steps" in printed


def test_a_merged_checkpoint_shows_the_same_mask(world, delta):
    """Compares the folders of base and merged model. The base has no head, and its names lack the prefix."""
    run("apply", "base", "run/delta.safetensors", "--output", "merged", cwd=world)
    found = overlap(changed(world / "base", world / "merged"), delta)
    assert (found.common, found.a) == (found.a, found.b)


def test_plot_draws_files_and_prints_the_tables(world):
    done = run("inspect", "run/delta.safetensors", "--plot", "figure", cwd=world)
    assert "by module kind" in done.stdout
    assert [name for name in ("figure.png", "figure-dark.png", "figure.svg") if not (world / name).stat().st_size] == []
    svg = (world / "figure.svg").read_text()
    assert "allocation of the first 12 weights, %" in svg
    assert "allocation of all 120 weights, %" in svg
    run("inspect", "run/delta.safetensors", "--plot", "one.png", "--json", cwd=world)
    assert (world / "one.png").stat().st_size > 10_000
    refused = run("inspect", "run/delta.safetensors", "--plot", "one.pdf", cwd=world, check=False)
    assert refused.returncode == 1
    assert "must end in .png or .svg" in refused.stderr


def test_plot_of_a_delta_without_order_draws_the_end_alone(world):
    run(*train_words("plain", "--method", "pafi", "--set", "max_steps=2"), cwd=world)
    run("inspect", "plain/delta.safetensors", "--plot", "plain.svg", cwd=world)
    svg = (world / "plain.svg").read_text()
    assert "allocation of all 120 weights" in svg
    assert "the first" not in svg


def test_whole_tensors_are_not_drawn_and_have_no_order(world):
    run(*train_words("full", "--method", "full", "--set", "budget=none", "--set", "max_steps=1"), cwd=world)
    assert json.loads(run("inspect", "full/delta.safetensors", "--json", cwd=world).stdout)["allocation"] == []
    refused = run("inspect", "full/delta.safetensors", "--plot", "full.png", cwd=world, check=False)
    assert refused.returncode == 1
    assert "whole tensors only" in refused.stderr
    for method in ("full", "repeat_d3"):
        with pytest.raises(ConfigError, match="no order of unmasking"):
            TrainConfig(model="m", output="o", task="rte", budget="1%", method=method, order=True)
