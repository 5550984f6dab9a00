"""Compares presets, tables and budgets with the paper's figures (arXiv 2408.14470 v1), which are typed once, here."""

from __future__ import annotations

import re
from importlib.resources import files
from statistics import fmean

import pytest
import torch
import yaml
from models import bert_classifier

from unmask.lab.inside import Into, insert
from unmask.lab.models import quiet
from unmask.lab.study import expand
from unmask.lab.study.cells import distinct
from unmask.lab.study.choosing import due
from unmask.lab.study.columns import columns_of
from unmask.lab.study.paper import NAMES, load
from unmask.lab.tasks.tags.ner import NER
from unmask.lab.tasks.text.glue import GLUE
from unmask.lab.training.paper import PRESETS, preset, presets, read
from unmask.lab.training.settings import build
from unmask.methods.budget import Budget

TABLES = {
    "table1": """
    Budget|Method |MNLI-m    |MNLI-mm   |QQP       |QNLI      |SST-2     |STS-B     |CoLA      |MRPC      |RTE       |Avg
    184M  |Full-FT|90.34 0.18|90.51 0.19|92.11 0.28|94.24 0.10|96.33 0.11|91.04 0.48|71.43 0.72|89.95 1.07|83.75 1.81|88.86
    103K  |R-Mask |85.18 0.43|85.87 0.04|87.09 0.61|89.31 2.04|93.61 0.53|84.05 3.91|61.14 3.51|78.59 4.42|60.53 6.68|80.60
    103K  |Fish   |88.14 0.18|88.36 0.16|87.50 0.06|92.29 0.24|95.22 0.27|91.68 0.31|69.16 0.76|90.52 0.51|84.72 0.75|86.95
    103K  |PaFi   |88.21 0.15|88.29 0.19|89.30 0.35|93.63 0.31|95.84 0.13|89.97 0.70|68.45 1.09|90.20 0.65|81.83 1.26|86.97
    103K  |BitFit |88.64 0.10|88.39 0.18|88.94 0.26|93.26 0.22|95.38 0.13|89.80 1.12|69.08 1.07|89.54 1.35|80.87 2.60|86.43
    103K  |ID3    |89.38 0.07|89.64 0.10|89.97 0.01|93.67 0.17|95.64 0.23|92.10 0.13|70.62 0.44|91.01 0.14|87.12 2.17|88.13
    320K  |R-Mask |88.3 0.39 |88.33 0.17|89.07 0.47|92.3 0.54 |95.3 0.23 |88.26 0.66|66.19 0.98|86.11 0.75|74.73 2.53|85.40
    320K  |Fish   |88.99 0.05|89.70 0.08|88.92 0.28|93.99 0.06|95.60 0.06|92.09 0.13|69.79 1.04|90.69 0.49|87.85 0.55|88.07
    320K  |PaFi   |89.61 0.10|89.73 0.15|90.35 0.22|93.93 0.11|96.14 0.07|90.37 0.24|68.91 1.16|90.52 0.62|81.59 2.01|87.68
    320K  |ID3    |89.73 0.07|89.91 0.09|90.42 0.20|94.06 0.10|95.95 0.07|92.07 0.22|72.07 0.99|91.26 0.28|87.73 1.45|89.15
    """,
    "table2": """
    Budget|Method        |MNLI-m    |MNLI-mm   |QQP       |QNLI      |SST-2     |STS-B     |CoLA      |MRPC      |RTE       |Avg
    1.33M |LoRA(r=8)     |90.47 0.23|90.46 0.12|91.95 0.12|93.76 0.36|95.57 0.21|91.86 0.29|69.73 1.42|89.71 1.32|85.32 0.86|88.76
    320K  |PaFi+LoRA(r=8)|90.12 0.1 |90.06 0.42|91.61 0.34|94.31 0.12|96.03 0.06|91.19 0.18|70.5 0.59 |90.28 0.57|84.72 0.55|88.76
    320K  |ID3+LoRA(r=8) |90.26 0.25|90.18 0.21|91.48 0.26|94.17 0.07|95.76 0.12|91.65 0.21|69.07 0.55|90.69 0.25|87.12 0.21|88.93
    """,
    "table3": """
    Budget|Method                |STS-B|CoLA |MRPC |RTE  |Average
    201M  |Pfeiffer              |90.78|59.05|89.21|76.53|78.89
    8M    |SparseAdapter+Pfeiffer|90.88|58.95|89.41|77.03|79.07
    8M    |ID3+Pfeiffer          |90.71|59.84|89.95|79.42|79.98
    """,
    # The paper's columns are the methods. Here a method is a row, as in the other tables.
    "table4": """
    Budget|Method |CoNLL2003
    184M  |Full-FT|96.69 0.18
    103K  |Fish   |95.43 0.27
    103K  |PaFi   |95.23 0.2
    103K  |BitFit |94.62 0.84
    103K  |ID3    |95.86 0.07
    103K  |R-Mask |85.42 7.03
    320K  |Fish   |95.99 0.12
    320K  |PaFi   |96.04 0.29
    320K  |ID3    |96.17 0.14
    320K  |R-Mask |93.74 1.32
    """,
    "table5": """
    Budget|Method         |AddSub|MultiArith|SingleEq|GSM8K|AQuA|SVAMP|Avg.
    201M  |LoRA(r=32)     |81.3  |95.5      |81.7    |34.1 |17.7|46.7 |59.5
    3.5M  |LoRA(r=2)      |78.2  |96.7      |76.6    |35.3 |16.9|44.9 |58.1
    3.5M  |PaFi+LoRA(r=32)|78.7  |92.3      |76.8    |33.9 |16.9|43.2 |57.0
    3.5M  |ID3+LoRA(r=32) |80.7  |95.8      |79.3    |34.3 |15.7|45.7 |58.6
    7M    |LoRA(r=4)      |79.2  |94.8      |77.9    |36.9 |17.3|45.0 |58.5
    7M    |PaFi+LoRA(r=32)|75.7  |92.3      |76.2    |34.9 |16.5|42.9 |56.4
    7M    |ID3+LoRA(r=32) |79.5  |94.8      |79.7    |38.3 |15.0|47.2 |59.1
    """,
}
MODELS = {
    "table1": "DeBERTa-v3-base", "table2": "DeBERTa-v3-base", "table3": "RoBERTa-base", "table4": "DeBERTa-v3-base",
    "table5": "Llama-7B",
}  # fmt: skip
SEVENTH_A = """
    batch size    | 16                  | 16                  | 4
    learning rate | 1e-4 3e-4 5e-4 7e-4 | 1e-4 3e-4 5e-4 7e-4 | 3e-4
    seed          | 6 7 8 9             | 6 7 8 9             | 42
    exp           | 2                   | 2                   | 0
    eps           | 1                   | 1                   | 1
    num_samples   | 1024                | 1024                | -
    sample_type   | label               | label               | -
    grad_type     | square              | square              | -
    lora_r        | 8                   | -                   | 8
    lora_alpha    | 8                   | -                   | 16
"""
MODULES = {
    "nlu": ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"],
    "arithmetic": ["query_proj", "key_proj", "value_proj", "up_proj", "down_proj"],
}
FULL_RATES = "5e-6 7e-6 1e-5 3e-5"  # footnote 3
SEVENTH_B = """
    RTE        | Accuracy                         | 30 | 100  | 256
    MRPC       | Accuracy                         | 30 | 100  | 256
    CoLA       | Matthews Correlation             | 20 | 200  | 256
    STS-B      | Avg of Spearman and Pearson Corr.| 15 | 200  | 256
    SST-2      | Accuracy                         | 7  | 500  | 256
    QNLI       | Accuracy                         | 7  | 1000 | 256
    QQP        | Accuracy                         | 3  | 4000 | 256
    MNLI       | Accuracy                         | 3  | 4000 | 256
    CoNLL2003  | F1                               | 20 | 300  | 384
    Math10K    | -                                | 3  | -    | 256
    GSM8K      | Accuracy                         | -  | 80   | 256
    SVAMP      | Accuracy                         | -  | 80   | 256
    MultiArith | Accuracy                         | -  | 80   | 256
    AddSub     | Accuracy                         | -  | 80   | 256
    AQuA       | Accuracy                         | -  | 80   | 256
    SingleEq   | Accuracy                         | -  | 80   | 256
"""

# The names that this project has for the paper's rows and columns.
ROWS = {
    "Full-FT": "full", "R-Mask": "random_mask", "Fish": "fish", "PaFi": "pafi", "BitFit": "bitfit", "ID3": "id3",
    "LoRA(r=8)": "lora", "PaFi+LoRA(r=8)": "pafi+lora", "ID3+LoRA(r=8)": "id3+lora",
    "Pfeiffer": "pfeiffer", "SparseAdapter+Pfeiffer": "sparse_adapter", "ID3+Pfeiffer": "id3+pfeiffer",
    "LoRA(r=32)": "lora_r32", "LoRA(r=2)": "lora_r2", "LoRA(r=4)": "lora_r4",
    "PaFi+LoRA(r=32)": "pafi+lora", "ID3+LoRA(r=32)": "id3+lora",
}  # fmt: skip
WHOLE = {"full", "bitfit", "lora", "pfeiffer", "lora_r32", "lora_r2", "lora_r4"}  # these rows have no budget to choose
OF = {
    "table1": "of 184M", "table2": "of 1.33M eligible", "table3": "of 201M eligible", "table4": "of 184M",
    "table5": "of 56M eligible",
}  # fmt: skip
METRICS = {
    "Accuracy": "accuracy", "Matthews Correlation": "matthews", "Avg of Spearman and Pearson Corr.": "pearson_spearman",
    "F1": "f1",
}  # fmt: skip
PAIRS = {("1e-4", 6), ("3e-4", 7), ("5e-4", 8), ("7e-4", 9)}
FULL_PAIRS = {("5e-6", 6), ("7e-6", 7), ("1e-5", 8), ("3e-5", 9)}


def lines(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split("|")] for line in text.strip().splitlines()]


def key(name: str) -> str:
    """Returns this project's name for a task of the paper; MNLI's two columns keep their own names."""
    return name.lower() if name.startswith("MNLI-") else name.lower().replace("-", "")


def printed(table: str) -> list[tuple[str, str, dict[str, str], str | None]]:
    """Returns the budget, the method, the scores by column (mean and deviation) and the average of every printed row."""
    header, *rows = lines(TABLES[table])
    columns = [key(name) for name in header[2:] if not name.startswith("Av")]
    found = []
    for budget, method, *scores in rows:
        average = scores[len(columns)] if len(scores) > len(columns) else None
        found.append((budget, ROWS[method], dict(zip(columns, scores, strict=False)), average))
    return found


def as_texts(name: str) -> dict:
    """Reads a data file without converting numbers, so that every digit is compared."""
    package = "unmask.lab.training" if name in PRESETS else "unmask.lab.study"
    text = files(package).joinpath("data", f"{name}.yaml").read_text("utf-8")
    return yaml.load(text, yaml.BaseLoader)


def cells(name: str):
    sweep = load(name).with_settings({"model": "m", "data_dir": "d"})
    return sweep, expand(sweep)


@pytest.mark.parametrize("name", TABLES)
def test_the_claims_are_the_printed_figures_digit_by_digit(name):
    claims = as_texts(name)["claims"]
    assert claims["model"] == MODELS[name]
    found = []
    for row in claims["rows"]:
        assert set(row) <= {"method", "budget", "count", "scores", "average"}
        found.append((row["count"], row["method"], row["scores"], row.get("average")))
        expected = None if row["method"] in WHOLE else f"{row['count']} {OF[name]}"
        assert row.get("budget") == expected
    assert found == printed(name)
    shown = [(row.count, row.method, row.scores, row.average) for row in load(name).claims.rows]
    assert shown == printed(name), "a figure is shown as it is printed"


def test_the_averages_typed_here_are_means_of_their_columns_except_those_that_the_notes_name():
    for name in ("table1", "table2", "table3", "table5"):
        for count, method, scores, average in printed(name):
            mean = fmean(float(score.split()[0]) for score in scores.values())
            digits = len(average.split(".")[1])
            is_mean = abs(mean - float(average)) <= 0.5 * 10**-digits + 1e-9
            assert is_mean == (name != "table1" or method in ("full", "random_mask")), (name, count, method)


@pytest.mark.parametrize("name", TABLES)
def test_the_grid_has_the_papers_rows_budgets_and_columns_and_no_more(name):
    sweep, found = cells(name)
    wanted = {(method, None if method in WHOLE else f"{count} {OF[name]}") for count, method, *_ in printed(name)}
    assert {(cell.labels["method"], cell.labels["budget"]) for cell in found} == wanted
    claimed = {(row.method, row.budget) for row in sweep.claims.rows}
    assert claimed == wanted
    assert [column.label for column in columns_of(found, {}, sweep.protocol)] == list(printed(name)[0][2])
    assert len(sweep.axes["task"]) == len(set(sweep.axes["task"]))


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table4", "fig1", "fig4", "fig5", "fig6"])
def test_every_row_is_run_as_four_pairs_of_rate_and_seed(name):
    sweep, found = cells(name)
    groups: dict = {}
    for cell in due(found, sweep.protocol, sweep.choice, {}):
        groups.setdefault(cell.group("lr", "seed"), set()).add((cell.labels["lr"], cell.labels["seed"]))
    for group, pairs in groups.items():
        whole_model = ("method", "full") in group
        assert pairs == (FULL_PAIRS if whole_model else PAIRS), group
    assert len(groups) == len({cell.group("lr", "seed") for cell in found})
    assert (sweep.protocol.kind, sweep.protocol.pair) == ("paper", "lr")
    assert sweep.protocol.best == (1 if name == "fig5" else 3)


@pytest.mark.parametrize(("name", "run"), [("table5", ("3e-4", 42))] + [(f"fig{n}", ("3e-4", 7)) for n in (7, 8, 9)])
def test_an_experiment_that_the_paper_ran_once_is_run_once(name, run):
    sweep, found = cells(name)
    assert {(cell.labels["lr"], cell.labels["seed"]) for cell in due(found, sweep.protocol, sweep.choice, {})} == {run}
    places = {cell.group("lr", "seed") for cell in found}
    assert len(distinct(found)) == len(places) == (7 if name == "table5" else 2 * len(sweep.axes["task"]))
    assert (sweep.protocol.kind, sweep.protocol.best) == ("paper", 1)


def test_the_presets_have_what_table_7a_prints_and_no_more():
    rows = {name: columns for name, *columns in lines(SEVENTH_A)}
    for place, family in enumerate(("nlu", "ner", "arithmetic")):
        own = read("paper")["families"][family]
        column = {name: columns[place] for name, columns in rows.items() if columns[place] != "-"}
        assert own["rates"] == column.pop("learning rate").split()
        assert [str(seed) for seed in own["seeds"]] == column.pop("seed").split()
        assert own["full_rates"] == ([] if family == "arithmetic" else FULL_RATES.split())
        column["batch_size"] = column.pop("batch size")
        if family != "arithmetic":
            # These two are what `unmask.fish` always does, so there is no setting for them.
            assert (column.pop("sample_type"), column.pop("grad_type")) == ("label", "square")
        lora = {name: column.pop(name) for name in ("lora_r", "lora_alpha") if name in column}
        assert {name: str(value) for name, value in own["settings"].items()} == column
        modules = own.get("lora", {}).pop("lora_targets", None)
        assert {name: str(value) for name, value in own.get("lora", {}).items()} == lora
        assert (modules is None) == (family not in MODULES)
    llama = read("paper")["families"]["arithmetic"]["lora"]["lora_targets"]
    assert [name.replace("q_", "query_").replace("k_", "key_").replace("v_", "value_") for name in llama] == MODULES[
        "arithmetic"
    ]


def test_the_presets_have_what_table_7b_prints_and_no_more():
    rows = {key(name): columns for name, *columns in lines(SEVENTH_B)}
    tests = [rows.pop(name) for name in ("gsm8k", "svamp", "multiarith", "addsub", "aqua", "singleeq")]
    assert {tuple(row) for row in tests} == {("Accuracy", "-", "80", "256")}
    metric, _, steps, _ = tests[0]
    # One run of this project trains on Math10K and solves the test sets.
    rows["math10k"] = [metric, *rows["math10k"][1:2], steps, rows["math10k"][3]]
    tasks = {}
    for values in read("paper")["families"].values():
        tasks |= values["tasks"]
    own = {task: values for task, values in tasks.items() if "source" not in values}
    assert set(own) == set(rows)
    for task, (metric, epochs, steps, length) in rows.items():
        assert own[task] == {
            "metric": METRICS[metric], "epochs": int(epochs), "eval_steps": int(steps), "max_length": int(length),
        }  # fmt: skip
        spec = GLUE.get(task) or NER.get(task)
        if spec is not None:
            assert METRICS[metric] == spec.main_metric


def test_tasks_that_the_paper_does_not_have_say_so():
    for task, like in (("wnut17", "conll2003"), ("gsm8k", "math10k")):
        assert preset(task).settings == preset(like).settings
        assert preset(task).source.startswith("not the paper's")
        assert preset(like).source == "arXiv 2408.14470 v1, Tables 7a and 7b"


@pytest.mark.parametrize("name", TABLES)
def test_the_runs_of_a_table_have_the_papers_settings(name):
    _, found = cells(name)
    for cell in distinct(found):
        config, known = build({**cell.settings, "output": "-"}), preset(cell.settings["task"])
        wanted = {**known.settings, **(known.lora if config.into == "lora" else {})}
        if name == "table5":
            wanted["lora_r"] = {"lora_r2": 2, "lora_r4": 4}.get(cell.labels["method"], 32)
        for setting, value in wanted.items():
            found_value = getattr(config, setting)
            assert (list(found_value) if isinstance(found_value, tuple) else found_value) == value, setting
        assert (config.accumulation, config.warmup, config.lora_dropout) == (1, 0.0, 0.0)


def test_a_single_run_under_the_papers_preset_is_one_of_its_runs():
    for task, known in presets().items():
        pairs = {(lr, seed) for lr, seed in zip(known.rates, known.seeds, strict=True)}
        run = known.run()
        assert (run["lr"], run["seed"]) in pairs, task
    assert (preset("cola").run()["lr"], preset("cola").run()["seed"]) == ("3e-4", 7)
    assert (preset("cola").run("full")["lr"], preset("cola").run("full")["seed"]) == ("7e-6", 7)
    assert preset("cola").run("full", into="lora")["lr"] == "3e-4", "a whole LoRA is not full fine-tuning"
    assert (preset("math10k").run()["lr"], preset("math10k").run()["seed"]) == ("3e-4", 42)
    assert preset("cola").run("repeat_d3")["leaving"] == "kept"


# The numbers of weights that the paper prints.


def deberta(cls: str = "DebertaV2ForSequenceClassification"):
    """Builds a model of DeBERTa-v3-base's shape, without weights."""
    import transformers

    config = transformers.DebertaV2Config(
        vocab_size=128_100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=256,
        norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    with torch.device("meta"):
        return getattr(transformers, cls)(config)


def lora_of(model: torch.nn.Module, **settings: object) -> tuple[set[str], int]:
    """Returns the modules that got a LoRA, and how many weights it added."""
    with quiet(), torch.device("meta"):
        inserted = insert(model, Into("lora", **settings), (), seed=0)
    sizes = dict(inserted.model.named_parameters())
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in inserted.added}
    return modules, sum(sizes[name].numel() for name in inserted.added)


def test_deberta_has_the_printed_numbers_of_weights_and_biases():
    model = deberta()
    base = {name: p.numel() for name, p in model.deberta.named_parameters()}
    total = sum(base.values())
    assert round(total / 1e6) == 184
    assert round(sum(n for name, n in base.items() if name.endswith(".bias")) / 1e3) == 103
    for count in (80, 103, 160, 320, 640):
        found = Budget.parse(f"{count}K of 184M").of(sum(p.numel() for p in model.parameters()))
        assert found == pytest.approx(1000 * count, rel=0.003)  # 184M is itself rounded


@pytest.mark.parametrize("cls", ["DebertaV2ForSequenceClassification", "DebertaV2ForTokenClassification"])
def test_lora_lies_in_the_six_printed_modules_of_every_layer_of_deberta(cls):
    modules, added = lora_of(deberta(cls), r=8, targets=tuple(preset("cola").lora["lora_targets"]))
    assert len(modules) == 12 * 6
    kinds = {re.sub(r"deberta\.encoder\.layer\.\d+\.", "", name) for name in modules}
    # output.dense is the layer after intermediate.dense. attention.output.dense has its own entry.
    assert kinds == {name if "." in name else f"attention.self.{name}" for name in MODULES["nlu"]}
    assert f"{added / 1e6:.2f}M" == "1.33M"
    assert Budget.parse("320K of 1.33M eligible").of(10**9, added) == pytest.approx(320_000, rel=0.003)


def test_lora_lies_in_the_same_modules_of_a_bert():
    modules, added = lora_of(bert_classifier(), r=2, targets=("layer-linear",))
    attention = {f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")}
    kinds = attention | {"intermediate.dense", "output.dense"}
    assert modules == {f"bert.encoder.layer.{i}.{kind}" for i in (0, 1) for kind in kinds}
    assert added == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32))


def test_layer_linear_is_refused_where_there_are_no_layers():
    from unmask.errors import ConfigError

    with pytest.raises(ConfigError, match="layer-linear finds no numbered layers"):
        insert(torch.nn.Sequential(torch.nn.Linear(4, 4)), Into("lora", targets=("layer-linear",)), (), seed=0)


def test_a_lora_of_llama_7b_has_the_printed_numbers_of_weights():
    import transformers

    targets = tuple(preset("math10k").lora["lora_targets"])
    counts = {}
    for r in (2, 4, 32):
        config = transformers.LlamaConfig(num_hidden_layers=1)  # all other defaults are Llama-7B's, which has 32 layers
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        counts[r] = 32 * lora_of(model, r=r, targets=targets)[1]
    assert {r: f"{count / 1e6:.1f}M" for r, count in counts.items()} == {2: "3.5M", 4: "7.0M", 32: "56.1M"}
    assert 1 - counts[2] / counts[32] == pytest.approx(0.94, abs=0.005)  # the paper's 94% of sparsity
    assert Budget.parse("3.5M of 56M eligible").of(10**10, counts[32]) == pytest.approx(counts[2], rel=0.001)
    assert Budget.parse("7M of 56M eligible").of(10**10, counts[32]) == pytest.approx(counts[4], rel=0.001)


# The grids of the figures, and the notes in the files.


def test_the_figures_have_the_printed_tasks_budgets_and_values():
    three = ("cola", "mrpc", "rte")
    assert {name: load(name).axes["task"] for name in ("fig4", "fig5", "fig6", "fig7", "fig8", "fig9")} == {
        "fig4": three, "fig5": three, "fig6": three, "fig7": ("cola",), "fig8": three, "fig9": three,
    }  # fmt: skip
    assert load("fig6").axes["budget"] == tuple(f"{count}K of 184M" for count in (80, 160, 320, 640))
    for name in ("fig5", "fig6", "fig7", "fig8", "fig9"):
        _, found = cells(name)
        assert {cell.labels["method"] for cell in found} == {"id3", "repeat_d3"}
        kept = {(c.labels["method"], c.settings.get("leaving")) for c in found}
        assert kept == {("id3", None), ("repeat_d3", "kept")}
    assert {name: load("table1").axes[name] for name in ("task", "budget", "seed")} == load("fig1").axes
    assert load("table1").rows == load("fig1").rows


def test_figure_4_has_two_sweeps_that_share_the_papers_point():
    _, found = cells("fig4")
    points = {(cell.settings.get("eps", 1.0), cell.settings.get("exp", 2.0)) for cell in found}
    assert points == {(0.1, 2), (0.5, 2), (1, 2)} | {(1, exp) for exp in (-2, -1, 0, 1, 2)}
    assert len(load("fig4").rows) == len(points)
    at_zero = load("fig4").only({"method": ["exp_0", "exp_-1", "exp_-2"]}).with_settings({"eps": 0, "model": "m"})
    assert {(c.settings["eps"], c.settings["exp"]) for c in expand(at_zero)} == {(0, 0), (0, -1), (0, -2)}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_names_what_the_paper_does_not_say(name):
    texts = read(name, "unmask.lab.study")
    assert texts["unsaid"]
    assert all(sentence.startswith("The paper does not ") for sentence in texts["unsaid"])
    known = preset(texts["axes"]["task"][0])
    silence = load(name).notes[-1]
    assert all(sentence in silence for sentence in (*texts["unsaid"], *known.unsaid))
    into = texts.get("settings", {}).get("into")
    assert ("LoRA's dropout" in silence) == (into == "lora")
    assert ("adapters' width" in silence) == (into == "pfeiffer")


def test_everything_that_the_paper_does_not_say_has_an_explicit_setting():
    topics = {
        "warm-up": {"warmup": 0.0}, "decay of the learning rate": {}, "clipping": {"max_grad_norm": 1.0},
        "weight decay": {"weight_decay": 0.0}, "optimizer": {"bias_correction": "global"}, "Dropout": {},
        "new head counts": {"dense": ["new"]}, "rate of the head": {"dense_lr": None}, "checkpoint is scored": {},
        "T the schedule": {"schedule": "uniform", "stride": 1}, "precision": {"bf16": False},
        "accumulation": {"accumulation": 1},
    }  # fmt: skip
    more = {
        "cola": {"n - 1": {}, "LoRA's dropout": {"lora_dropout": 0.0}, "adapters' width": {"reduction_factor": 16},
                 "criterion": {"criterion": "snip", "pruned": "zero"}, "PaFi": {}},
        "conll2003": {"n - 1": {}},
        "math10k": {"LoRA's dropout": {"lora_dropout": 0.0}, "PaFi": {}, "greedy": {"max_new_tokens": 256}},
    }  # fmt: skip
    for task, own in more.items():
        known = preset(task)
        everything = [*known.unsaid, *(text for texts in known.unsaid_inside.values() for text in texts)]
        for topic, settings in (topics | own).items():
            assert any(topic in sentence for sentence in everything), (task, topic)
            assert settings.items() <= known.settings.items()


def test_pafi_in_a_new_lora_is_spread_over_the_tensors():
    for name in ("table2", "table5"):
        spread = {(c.labels["method"], c.settings.get("allocation")) for c in cells(name)[1]}
        assert {method for method, allocation in spread if allocation == "tensor"} == {"pafi+lora"}


def test_no_file_contains_the_guesses_of_earlier_versions():
    folders = [files(package).joinpath("data") for package in ("unmask.lab.study", "unmask.lab.training")]
    for path in (path for folder in folders for path in folder.iterdir()):
        text = path.read_text("utf-8")
        for words in ("project page", "was not to be had", "inferred", "not known"):
            assert words not in text, path.name
        assert "ours" not in re.findall(r"\w+", text) or path.name == "tuned.yaml", path.name
