"""Runs the Python code of every page, and checks that its commands, names, files and links exist."""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pages
import pytest
import torch
import typer.main
from helpers import ROOT, assert_same_tensors, batches, mean_square, mlp, snapshot
from lora_nets import sentences, tiny_bert
from models import bert_classifier
from vllm_stand_in import Engine, Patch, Served

import unmask
from unmask.cli.app import app
from unmask.lab.training.config import TrainConfig

Names = dict[str, Any]

ELSEWHERE = {
    "distributed.md": ("support/engine_runs.py", "its code needs several processes"),
    "lightning.md": ("integrations/test_lightning.py", "three tests share its run"),
}
"""The pages whose code other tests run, with the file that runs it and the reason."""

LIBRARIES = {"peft.md": "trl", "quantised.md": "bitsandbytes", "trainer.md": "trl"}
"""The optional library that a page's code needs. Without it, the page's test is skipped."""

FILE = re.compile(r"(?!checkpoints/)[\w-]+(/[\w-]+)+\.(py|yaml|csv|md|sh)")
"""A file of this project, as the prose names it: from the checkout or from ``src/unmask``."""

given: dict[str, Callable[[Path], Names]] = {}
"""The names that a page takes as given, made by a function of an empty folder."""
true_of: dict[str, Callable[[Names, str], None]] = {}
"""The assertions about a page whose code has run, as a function of its names and its output."""


def of(table: dict[str, Any], page: str) -> Callable[[Any], Any]:
    """Enters a function for a page into a table."""
    return lambda function: table.setdefault(page, function)


# README.md


@of(given, "README.md")
def _(folder: Path) -> Names:
    model, fresh = (bert_classifier(20, hidden_size=192, intermediate_size=768) for _ in range(2))
    return {"model": model, "loader": sentences(3), "fresh_model": fresh, "base": snapshot(fresh)}


@of(true_of, "README.md")
def _(page: Names, printed: str) -> None:
    delta = unmask.SparseDelta.load("delta.safetensors")
    assert len(delta) == 3 * 320  # three steps of a thousand
    assert_same_tensors(snapshot(page["fresh_model"]), page["base"])
    delta.apply(page["fresh_model"])
    assert_same_tensors(snapshot(page["fresh_model"]), snapshot(page["model"]))


# analysis.md


@of(true_of, "analysis.md")
def _(page: Names, printed: str) -> None:
    analysis, selection = page["analysis"], page["selection"]
    assert analysis.turnover(page["masks"]) == [0, 0, 0, 0, 0]
    assert len(page["early"]) == 10
    assert analysis.overlap(page["early"], page["masks"][0]).jaccard == 1  # ten a step
    assert analysis.gradient_updates(selection.method, budget=60) == 210
    assert analysis.overlap(analysis.changed(page["base"], page["model"]), selection).jaccard == 1
    assert [shot["used"] for shot in analysis.snapshots(page["delta"], points=3)] == [20, 40, 60]
    assert page["both"].expected == 60 * 60 / sum(tensor.numel() for tensor in page["base"].values())


# cli.md


@of(true_of, "cli.md")
def _(page: Names, printed: str) -> None:
    score = unmask.heuristic("gradient_over_weight").score(torch.tensor([2.0, 1.0]), torch.tensor([-4.0, 3.0]))
    assert score.tolist() == [2.0, 3.0]


# delta.md


@of(given, "delta.md")
def _(folder: Path) -> Names:
    def trained(seed: int) -> unmask.SparseDelta:
        model = bert_classifier()
        selection = unmask.select(model, unmask.random_mask(50, seed=seed))
        model(**sentences(1)[0]).loss.backward()
        torch.optim.SGD(selection.parameters(), lr=0.1).step()
        return selection.delta()

    def load(task: str) -> torch.nn.Module:
        torch.manual_seed(0)
        model = bert_classifier()
        torch.manual_seed(len(task))
        torch.nn.init.normal_(model.classifier.weight)
        return model

    def train(model: torch.nn.Module, parameters: list[Any], task: str) -> None:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for batch in sentences(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = bert_classifier()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        model.classifier.weight[0, :4] += 1
    model.save_pretrained(folder / "tuned")
    return {
        "first": trained(1),
        "second": trained(2),
        "served": bert_classifier(),
        "BASE": folder / "base",
        "TUNED": folder / "tuned",
        "tuned": model,
        "live": bert_classifier(),
        "load": load,
        "train": train,
    }


@of(true_of, "delta.md")
def _(page: Names, printed: str) -> None:
    assert_same_tensors(snapshot(page["live"]), snapshot(page["tuned"]))
    assert [list(each.sparse) for each in (page["delta"], page["displaced"])] == [["classifier.weight"]] * 2
    assert printed.startswith("0.0")
    deltas, merged = page["deltas"], page["merged"]
    assert len(merged) == sum(len(each) for each in deltas)
    assert merged.whole["classifier.weight"].equal(deltas[2].whole["classifier.weight"])
    assert not merged.whole["classifier.weight"].equal(deltas[0].whole["classifier.weight"])
    assert merged - unmask.combine(*deltas[:2], heads=deltas[0]) == deltas[2]
    assert len({len(each) for each in deltas}) == 1
    assert_same_tensors(snapshot(page["served"]), snapshot(bert_classifier()))
    assert page["undo"].sparse.keys() == page["second"].sparse.keys()


# inside.md


@of(given, "inside.md")
def _(folder: Path) -> Names:
    base = tiny_bert().base_model
    base.save_pretrained(folder / "model")
    return {"MODEL": str(folder / "model"), "loader": sentences(20)}


@of(true_of, "inside.md")
def _(page: Names, printed: str) -> None:
    assert len(unmask.SparseDelta.load("delta.safetensors")) == 100
    batch = sentences(1)[0]
    with torch.no_grad():
        assert torch.equal(page["again"].eval()(**batch).logits, page["model"].eval()(**batch).logits)


# methods.md


@of(given, "methods.md")
def _(folder: Path) -> Names:
    model = tiny_bert()
    selection = unmask.select(model, unmask.random_mask(40), dense="classifier")
    return {"budget": 40, "total": 20_000, "selection": selection}


@of(true_of, "methods.md")
def _(page: Names, printed: str) -> None:
    values, head = page["optimizer"].param_groups
    assert values["params"] == [page["selection"].values]
    assert (values["lr"], head["lr"]) == pytest.approx((1e-2, 1e-2), rel=0.05)  # as the page says of 0.2%
    assert page["method"].scope == unmask.Scope("linear")


# peft.md


@of(true_of, "peft.md")
def _(page: Names, printed: str) -> None:
    line = "default (id3): 320 weights selected of a budget of 320, step 4 of 4; 66 numbers trained whole in modules_to_save"
    assert line in printed.splitlines()
    straight, resumed = (page[name].model.base_model for name in ("straight", "resumed"))
    assert straight.deltas.active.used == 50
    assert_same_tensors(snapshot(straight.model), snapshot(resumed.model))


# quantised.md


@of(given, "quantised.md")
def _(folder: Path) -> Names:
    bert_classifier(hidden_size=64, intermediate_size=128, initializer_range=0.02).save_pretrained(folder / "base")
    ids = torch.arange(32)[:, None] + torch.arange(12)
    rows = [ids[i : i + 8] % 50 for i in (0, 8, 16, 24)]
    return {"folder": str(folder / "base"), "batches": [{"input_ids": x, "labels": torch.arange(8) % 2} for x in rows]}


@of(true_of, "quantised.md")
def _(page: Names, printed: str) -> None:
    from unmask.quantised.layers import has_sidecars

    assert page["selection"].used == 200
    assert not has_sidecars(page["fresh"])
    unmask.SparseDelta.load("delta.safetensors").apply(page["fresh"])
    batch = page["batches"][0]
    with torch.no_grad():
        assert torch.equal(page["fresh"].eval()(**batch).logits, page["model"].eval()(**batch).logits)


# serving.md


@of(given, "serving.md")
def _(folder: Path) -> Names:
    model = mlp(dtype=torch.bfloat16)
    engine = Engine(Served(model))
    return {"model": model, "loader": batches(6, dtype=torch.bfloat16), "engine": engine, "SparseWeightPatch": Patch}


@of(true_of, "serving.md")
def _(page: Names, printed: str) -> None:
    assert len(page["delta"]) == 40
    assert page["receiver"].version == 6
    assert_same_tensors(page["engine"].served.checkpoint, snapshot(page["model"]))
    page["publisher"].publish()
    page["receiver"].receive()
    assert_same_tensors(snapshot(page["served"]), snapshot(page["model"]))


# trainer.md


@of(true_of, "trainer.md")
def _(page: Names, printed: str) -> None:
    straight, resumed = page["callback"].selection, page["again"].selection
    assert (straight.used, straight.step, straight.dense_numel) == (100, 8, 34)
    assert_same_tensors(snapshot(straight.model), snapshot(resumed.model))
    assert page["selection"].used == 100
    assert len(straight.delta()) == 100
    assert Path("delta.safetensors").stat().st_size > 0
    assert not list(Path().rglob("model.safetensors"))


# training.md


@of(given, "training.md")
def _(folder: Path) -> Names:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 6))

    def step() -> None:
        mean_square(model, batches(1)[0]).backward()
        optimizer.step()

    model, method = network(), unmask.id3(20, steps=4)
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    step()
    names = {"torch": torch, "unmask": unmask, "selection": selection, "optimizer": optimizer, "method": method}
    return {**names, "model": model, "fresh_model": network(), "evaluate": lambda model: 0.0}


@of(true_of, "training.md")
def _(page: Names, printed: str) -> None:
    assert len(unmask.SparseDelta.load("averaged.safetensors")) == 5
    assert page["selection"].model is page["fresh_model"]
    assert_same_tensors(snapshot(page["fresh_model"]), snapshot(page["model"]))


# All pages.


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory"
)  # of libraries
@pytest.mark.parametrize("name", [name for name in pages.PAGES if name in {*given, *true_of}])
def test_the_python_code_of_a_page_runs_and_does_what_the_page_says(name, tmp_path, monkeypatch, capsys, registry):
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    monkeypatch.chdir(tmp_path)
    names = given[name](tmp_path) if name in given else {}
    torch.manual_seed(0)
    page = pages.run_page(name, names)
    true_of[name](page, capsys.readouterr().out)


@pytest.mark.parametrize("name", pages.PAGES)
def test_no_pages_python_code_is_left_out(name):
    has_code = bool(pages.blocks(name, "python"))
    assert has_code == (name in true_of or name in ELSEWHERE)
    if name in ELSEWHERE:
        file, _ = ELSEWHERE[name]
        assert f'"{name}"' in (ROOT / "tests" / file).read_text(encoding="utf-8")


def command_of(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """Returns the command that some arguments of ``unmask`` name, and the arguments of that command."""
    group = typer.main.get_command(app)
    with click.Context(group, info_name="unmask") as context:
        name, command, rest = group.resolve_command(context, arguments)
    assert command is not None, name
    return command, rest


@pytest.mark.parametrize("name", [name for name in pages.PAGES if pages.blocks(name, "sh")])
def test_the_commands_of_a_page_are_accepted(name):
    """Checks options and settings of ``unmask``, and that the scripts, make targets and extras of the commands exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    settings = {field.name for field in fields(TrainConfig)}
    for program, *arguments in pages.commands(name):
        if program == "unmask":
            command, rest = command_of(arguments)
            parsed = command.make_context(command.name, rest).params
            assert {each.partition("=")[0] for each in parsed.get("set") or ()} <= settings, arguments
        elif program == "python":
            assert (ROOT / arguments[0]).is_file(), arguments
        elif program == "make":
            assert arguments[0] in targets, arguments
        else:
            assert program in ("pip", "tar"), program
            named = [each for text in arguments for each in re.findall(r"(?:unmask|\.)\[(.*)\]", text)]
            assert {extra for each in named for extra in each.split(",")} <= extras.keys(), arguments


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_names_in_the_prose_of_a_page_exist(name):
    """Checks dotted names of unmask, ``unmask`` commands with their options, and paths of files."""
    for code in pages.inline_code(name):
        if dotted := re.match(r"(unmask(?:\.\w+)+)(?!\.\w*\*)", code):
            assert exists(dotted[1]), code
        if re.match(r"unmask [a-z]+( |$)", code):
            command, rest = command_of(code.split()[1:])
            known = {each for parameter in command.get_params(click.Context(command)) for each in parameter.opts}
            assert {each for each in rest if each.startswith("--")} <= known, code
        if FILE.fullmatch(code):
            assert (ROOT / code).is_file() or (ROOT / "src" / "unmask" / code).is_file(), code


def exists(dotted: str) -> bool:
    """Returns True if a dotted name is a module or an attribute of one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    for path, anchor in pages.links(name):
        assert path.exists(), path
        assert not anchor or anchor in pages.anchors(path), f"{path.name}#{anchor}"


def test_the_readme_links_to_every_page():
    linked = {path for path, _ in pages.links("README.md")}
    assert {path for name, path in pages.PAGES.items() if name != "README.md"} <= linked
