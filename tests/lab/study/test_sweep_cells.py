"""Tests the cells of a sweep: their order, rules, ids and filters, and the values that are refused."""

from __future__ import annotations

import pytest
import yaml
from helpers import ROOT

from unmask.errors import ConfigError
from unmask.lab.study import expand, parse, read_sweep
from unmask.lab.study.cells import canonical, distinct

BASE = {"model": "m", "task": "rte", "method": "id3", "budget": "1%"}


def sweep(**values):
    return parse({"settings": BASE, "methods": {"id3": {}}, **values})


def labels_of(cells, *keys):
    return [tuple(cell.labels.get(key) for key in keys) for cell in cells]


def test_seeds_are_outermost_unless_the_order_says_otherwise():
    values = {
        "axes": {"task": ["rte", "cola"], "seed": [0, 1]},
        "methods": {"id3": {}, "pafi": {"settings": {"method": "pafi"}}},
    }
    assert labels_of(expand(sweep(**values)), "seed", "task", "method") == [
        (seed, task, method) for seed in (0, 1) for task in ("rte", "cola") for method in ("id3", "pafi")
    ]
    assert labels_of(expand(sweep(**values, order=["method"])), "method", "seed", "task") == [
        (method, seed, task) for method in ("id3", "pafi") for seed in (0, 1) for task in ("rte", "cola")
    ]


def test_rules_override_settings_and_axes_and_methods_override_rules():
    cells = expand(
        sweep(
            axes={"task": ["rte", "cola"]},
            rules=[
                {"when": {"task": "cola"}, "settings": {"epochs": 10, "exp": 1}},
                {"when": {"task": ["cola", "rte"], "method": "id3"}, "settings": {"batch_size": 8}},
            ],
            methods={"id3": {}, "flat": {"settings": {"exp": 0}}},
        )
    )
    found = {(c.labels["task"], c.labels["method"]): c.settings for c in cells}
    assert found["cola", "id3"] == {**BASE, "task": "cola", "epochs": 10.0, "exp": 1.0, "batch_size": 8}
    assert found["cola", "flat"] == {**BASE, "task": "cola", "epochs": 10.0, "exp": 0.0}
    assert found["rte", "id3"] == {**BASE, "batch_size": 8}
    rules = [{"when": {"method": "id3"}, "settings": {"exp": 1, "epochs": 5}}]
    (over,) = expand(sweep(settings={**BASE, "epochs": 7}, axes={"exp": [0]}, rules=rules))
    assert over.settings == {**BASE, "epochs": 5.0, "exp": 0.0}


def test_a_rules_grid_replaces_that_of_the_row():
    rules = [{"when": {"method": "full"}, "grid": {"lr": ["1e-5", "2e-5"]}}]
    rows = {
        "id3": {"grid": {"lr": ["1e-3"]}},
        "full": {"settings": {"method": "full", "budget": None}, "grid": {"lr": ["1e-2"]}},
    }
    cells = expand(sweep(rules=rules, methods=rows))
    assert labels_of(cells, "method", "lr") == [("id3", "1e-3"), ("full", "1e-5"), ("full", "2e-5")]


def test_full_fine_tuning_is_run_once_for_all_budgets():
    full = {"settings": {"method": "full", "budget": None}}
    cells = expand(sweep(axes={"budget": [100, 200]}, methods={"id3": {}, "full": full}, order=["method"]))
    assert labels_of(cells, "method", "budget") == [("id3", 100), ("id3", 200), ("full", None)]


def test_a_lora_takes_the_rank_that_matches_and_loses_its_budget():
    lora = {"settings": {"into": "lora", "method": "full", "lora_r": "match", "lora_alpha": "match"}}
    cells = expand(
        sweep(axes={"budget": [100, 150, 400]}, methods={"lora": lora}), rank=lambda s: int(s["budget"]) // 100
    )
    assert labels_of(cells, "budget") == [(100,), (150,), (400,)]
    assert [c.settings["lora_r"] for c in cells] == [1, 1, 4]
    assert [c.settings.get("lora_alpha") for c in cells] == [1.0, 1.0, 4.0]
    assert all("budget" not in c.settings for c in cells)
    assert len({c.id for c in cells}) == len(distinct(cells)) == 2  # The budgets 100 and 150 share a run.
    assert cells[0].id.startswith("rte-lora_full-")


def test_ids_depend_on_the_settings_alone():
    (cell,) = expand(sweep())
    (spelled,) = expand(sweep(settings={**BASE, "lr": "auto", "stride": 1, "dense": ["new"]}, name="other"))
    assert cell.id == spelled.id == "rte-id3-" + cell.id[-10:]
    (other,) = expand(sweep(settings={**BASE, "lr": "2e-3"}))
    assert other.id != cell.id
    assert canonical({**BASE, "output": "elsewhere"}) == cell.settings


def test_ids_stay_the_same():
    """A change here would run every finished sweep again."""
    assert expand(sweep())[0].id == "rte-id3-a89b917321"


def test_a_row_that_has_the_name_of_a_method_and_names_none_has_that_method():
    plain = {key: value for key, value in BASE.items() if key != "method"}
    rows = {"pafi": {}, "mine": {}, "id3": {"settings": {"method": "static_d3"}}}
    cells = expand(parse({"settings": plain, "methods": rows}))
    assert [c.settings["method"] for c in cells] == ["pafi", "random_mask", "static_d3"]


def test_filters_keep_some_cells_and_given_settings_replace_axes():
    values = sweep(
        axes={"task": ["rte", "cola"], "seed": [0, 1, 2]},
        methods={"id3": {"grid": {"lr": ["1e-3"]}}, "pafi": {"settings": {"method": "pafi"}}},
        choose={"seeds": [0]},
    )
    assert labels_of(expand(values.only({"method": ["pafi"], "seed": ["1", "2"]})), "method", "seed") == [
        ("pafi", 1), ("pafi", 1), ("pafi", 2), ("pafi", 2),
    ]  # fmt: skip
    assert values.only({"seed": ["1", "2"]}).choice.seeds == (1,)
    given = values.with_settings({"task": "mrpc", "lr": "5e-4"})
    assert {(c.settings["task"], c.settings["lr"]) for c in expand(given)} == {("mrpc", 5e-4)}
    assert {c.settings["budget"] for c in expand(values.with_axis("budget", [10, 20]))} == {"10", "20"}
    rules = [{"when": {"task": task}, "settings": {"epochs": e}} for task, e in (("rte", 5), ("cola", 7))]
    ruled = sweep(axes={"task": ["rte", "cola"]}, rules=rules)
    assert [c.settings["epochs"] for c in expand(ruled.with_settings({"task": "cola"}))] == [7.0]
    with pytest.raises(ConfigError, match="method 'lora' is not in this sweep; there are id3, pafi"):
        values.only({"method": ["lora"]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"axis": {}}, "unknown key 'axis'"),
        ({"methods": {}}, "needs methods"),
        ({"methods": {"id3": {"lr": 1}}}, "unknown key 'lr'"),
        ({"axes": {"seed": 3}}, "axes.seed must be a list"),
        ({"axes": {"seed": []}}, "at least one value"),
        ({"order": ["lr"]}, "order names 'lr'"),
        ({"rules": [{"when": {"lr": 1}}]}, "a rule asks for 'lr'"),
        ({"choose": {"seeds": [0]}}, "needs an axis seed"),
        ({"choose": {"seeds": [7]}, "axes": {"seed": [0, 1]}}, "must be among the seeds"),
        ({"choose": {"report": "none"}, "axes": {"seed": [0]}}, "all or others"),
        ({"protocol": {"kind": "best"}}, "protocol.kind = 'best'"),
        ({"notes": "text"}, "notes must be a list"),
        ({"settings": [1]}, "settings must be a mapping"),
    ],
)
def test_values_that_are_no_sweep_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        sweep(**values)


def test_a_run_that_cannot_work_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"the run of method id3, task nope: unknown task"):
        expand(sweep(axes={"task": ["rte", "nope"]}))
    with pytest.raises(ConfigError, match=r"the run of method full: budget = '1%': method 'full' trains every weight"):
        expand(sweep(methods={"full": {"settings": {"method": "full"}}}))
    with pytest.raises(ConfigError, match="needs a budget to match"):
        expand(sweep(methods={"lora": {"settings": {"lora_r": "match", "budget": None}}}))


def test_a_sweep_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("settings: {model: m, task: rte, budget: 1%}\nmethods:\n  id3: {grid: {lr: [1e-3, 3e-3]}}\n")
    sweep = read_sweep(path)
    assert (sweep.name, len(expand(sweep))) == ("mine", 2)


def test_the_example_on_the_docs_page_is_a_sweep():
    page = ROOT / "docs" / "reproduce.md"
    text = page.read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    sweep = parse(yaml.safe_load(text)).with_settings({"model": "m"})
    cells = expand(sweep, rank=lambda settings: 2)
    assert (sweep.choice.seeds, len(sweep.rows), cells[0].labels["budget"]) == ((0,), 4, None)
    assert [c.labels["lr"] for c in cells if c.group("lr", "seed") == (("method", "id3"), ("budget", "0.05%"))][:3] == [
        "1e-3", "3e-3", "1e-2",
    ]  # fmt: skip
