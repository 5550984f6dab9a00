"""Prints the study's tables from its runs, sorted by loss, and writes every run as a line of CSV.

    python experiments/study/tables.py runs/study/minilm-glue runs/study/minilm-wnut17 --csv experiments/study/runs.csv
    python experiments/study/tables.py --from experiments/study/runs.csv        # the tables of tables.md

A method's rate is the one with the least loss on seed 0. The figures are means over the seeds that ran at this rate, with half
the 95% interval of Student's t if there are at least three seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from unmask.lab.figures.estimates import interval
from unmask.lab.study.records import trained_weights

FIELDS = ("model", "task", "budget", "method", "seed", "lr", "weights", "steps", "loss", "score", "metric", "seconds")
NAMES = {
    "minilm": "MiniLM", "mpnet": "MPNet", "smollm2": "SmolLM2", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "cola": "CoLA",
    "rte": "RTE", "wnut17": "WNUT-17", "gsm8k": "GSM8K", "dev_f1": "F1", "pearson_spearman": "(Pearson + Spearman) / 2",
    "token_accuracy": "accuracy by token",
}  # fmt: skip
# The recipe's name in each model's sweep. MPNet's head has a hidden layer, so it has its own learning rate.
RECIPE = {"minilm": "random-linear", "mpnet": "random-linear-head", "smollm2": "random-linear"}
Run = dict[str, str]


def read(folders: list[Path]) -> list[Run]:
    """Returns the finished runs of some sweeps, whose names begin with the model: minilm-glue."""
    model = {f: json.loads((f / "sweep.json").read_text(encoding="utf-8"))["name"].split("-")[0] for f in folders}
    runs = []
    for folder, file in sorted((f, file) for f in folders for file in f.glob("results/*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["status"] != "done":
            print(f"{file.stem}: {result['status']}, left out", file=sys.stderr)
            continue
        labels, summary = result["labels"], result["summary"]
        metric, score = result["metric"], result["score"]
        if metric == "-loss":  # The word problems were not solved, so there is no other score.
            metric, score = "token_accuracy", summary["after"]["token_accuracy"]
        values = {
            "model": model[folder],
            "task": summary["task"],
            "budget": labels.get("budget") or "own",
            "method": labels["method"],
            "lr": labels["lr"],
            "seed": labels["seed"],
            "weights": trained_weights(summary),  # The new classifier, which every method trains whole, is not counted.
            "steps": summary["steps"],
            "loss": result["loss"] if result["loss"] is not None else "inf",
            "score": score if score is not None else 0.0,
            "metric": metric,
            "seconds": result["seconds"],
        }
        runs.append({key: str(value) for key, value in values.items()})
    return sorted(runs, key=lambda run: [run[key] for key in FIELDS[:6]])


def chosen(runs: list[Run]) -> tuple[str, list[Run], str]:
    """Returns the rate with the least loss on seed 0, its runs, and a mark if it is the lowest or highest rate tried."""
    tried = {run["lr"]: float(run["loss"]) for run in runs if run["seed"] == "0"}
    rate = min(tried, key=lambda lr: tried[lr])
    order = sorted(tried, key=float)
    edges = {order[0]: " (lowest)", order[-1]: " (highest)"}
    mark = edges.get(rate, "") if len(order) > 1 else " (no other)"
    return rate, [run for run in runs if run["lr"] == rate], mark


def named(key: str) -> str:
    """Returns the usual spelling of a name."""
    return NAMES.get(key, key)


def in_order(budgets: set[str]) -> list[str]:
    """Sorts shares of the weights, the least first."""
    return sorted(budgets, key=lambda text: float(text.rstrip("%")))


def cells(runs: list[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """Groups runs by model, task and budget; runs without a budget (full, BitFit) are in the group of every budget."""
    found = {}
    for model, task in dict.fromkeys((run["model"], run["task"]) for run in runs):
        here = [run for run in runs if (run["model"], run["task"]) == (model, task)]
        for budget in in_order({run["budget"] for run in here} - {"own"}):
            found[model, task, budget] = [run for run in here if run["budget"] in (budget, "own")]
    return found


def by_method(runs: list[Run]) -> dict[str, list[Run]]:
    """Groups runs by method."""
    found = defaultdict(list)
    for run in runs:
        found[run["method"]].append(run)
    return found


def rates(runs: list[Run]) -> str:
    """Returns the table of the best rates on seed 0 by budget, for the methods that ran at several budgets."""
    found: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for (model, task, budget), members in cells(runs).items():
        for method, own in by_method([run for run in members if run["budget"] == budget]).items():
            rate, _, mark = chosen(own)
            found[model, task, method][budget] = rate + mark
    budgets = in_order({budget for row in found.values() for budget in row})
    lines = ["| model | task | method | " + " | ".join(budgets) + " |", "|---|---|---|" + "---:|" * len(budgets)]
    for key, row in sorted(found.items()):
        if len(row) > 1:
            lines.append("| " + " | ".join([*map(named, key), *(row.get(budget, "") for budget in budgets)]) + " |")
    return "\n".join(lines)


def figure(values: list[float], digits: int, scale: float = 1.0, sign: str = "") -> str:
    """Returns the mean, and half the interval if there are three values or more."""
    mean = f"{scale * fmean(values):{sign}.{digits}f}"
    if len(values) < 3:
        return mean
    estimate = interval(values, 0.95, "t")
    return f"{mean} ± {scale * (estimate.high - estimate.mean):.{digits}f}"


def table(runs: list[Run]) -> tuple[str, dict[str, float]]:
    """A task's table, best loss first, and each method's mean loss."""
    lines, losses = [], {}
    for method, members in by_method(runs).items():
        rate, final, mark = chosen(members)
        loss, score = [[float(run[key]) for run in final] for key in ("loss", "score")]
        losses[method] = fmean(loss)
        cells = [
            method,
            f"{int(final[0]['weights']):,}",
            rate + mark,
            figure(loss, 4),
            figure(score, 1, 100),
            str(len(final)),
        ]
        lines.append((losses[method], "| " + " | ".join(cells) + " |"))
    head = f"| method | weights | rate | dev loss | dev {named(runs[0]['metric'])}, % | seeds |\n|---|---:|---:|---:|---:|---:|"
    return "\n".join([head, *(line for _, line in sorted(lines))]), losses


def ranks(losses: dict[tuple[str, str], dict[str, float]], tasks: list[tuple[str, str]]) -> str:
    """Returns the table of each method's place by loss among the methods that ran on all tasks, and of the mean place."""
    losses = {
        task: {"recipe" if m == RECIPE[task[1]] else m: loss for m, loss in losses[task].items()} for task in tasks
    }
    everywhere = set.intersection(*(set(losses[task]) for task in tasks))
    places = {task: sorted(everywhere, key=losses[task].__getitem__) for task in tasks}
    mean = {method: fmean(places[task].index(method) + 1 for task in tasks) for method in everywhere}
    lines = [
        "| method | " + " | ".join(", ".join(map(named, task)) for task in tasks) + " | mean place |",
        "|---|" + "---:|" * (len(tasks) + 1),
    ]
    for method in sorted(everywhere, key=lambda method: (mean[method], method)):
        cells = [method, *(str(places[task].index(method) + 1) for task in tasks), f"{mean[method]:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(runs: list[Run], budget: str, against: str) -> str:
    """Returns the table of each method's loss relative to that of one method, in percent.

    The losses are compared seed by seed and averaged over the seeds that both methods have. The last column is the mean of the
    tasks' means, with half the interval over tasks.
    """
    found: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(dict)
    tasks = []
    for (model, task, share), members in cells(runs).items():
        reference = RECIPE[model] if against == "recipe" else against
        methods = by_method(members)
        if share != budget or reference not in methods:
            continue
        tasks.append((task, model))
        losses = {
            method: {run["seed"]: float(run["loss"]) for run in chosen(own)[1]} for method, own in methods.items()
        }
        for method in losses.keys() - {reference}:
            common = losses[method].keys() & losses[reference].keys()
            found[method][task, model] = [losses[method][s] / losses[reference][s] - 1 for s in sorted(common)]
    head = [", ".join(map(named, task)) for task in tasks]
    lines = ["| method | " + " | ".join([*head, "mean"]) + " |", "|---|" + "---:|" * (len(tasks) + 1)]
    means = {method: [fmean(row[task]) for task in tasks if task in row] for method, row in found.items()}
    for method in sorted(found, key=lambda method: (-len(means[method]), fmean(means[method]))):
        row = found[method]
        texts = [f"{figure(row[task], 1, 100, '+')} ({len(row[task])})" if task in row else "" for task in tasks]
        lines.append("| " + " | ".join([method, *texts, figure(means[method], 1, 100, "+")]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of unmask sweep")
    parser.add_argument(
        "--from", dest="source", type=Path, help="read the runs from a CSV file of this command instead"
    )
    parser.add_argument("--csv", type=Path, help="write the runs here")
    parser.add_argument("--budget", default="0.2%", help="the budget of the tables of places")
    parser.add_argument("--against", default="recipe", help="the method with which the others' losses are compared")
    parser.add_argument("--chosen-on", default="sst2,mrpc,cola")
    parser.add_argument("--confirmed-on", default="stsb,wnut17,rte")
    given = parser.parse_args()
    runs = list(csv.DictReader(given.source.open(encoding="utf-8"))) if given.source else read(given.folders)
    if given.csv:
        with given.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(runs)
    role = dict.fromkeys(given.chosen_on.split(","), "chosen on")
    role |= dict.fromkeys(given.confirmed_on.split(","), "confirmed on")
    found = cells(runs)
    losses: dict[tuple[str, str], dict[str, float]] = {}
    for model, task, budget in sorted(found, key=lambda key: (*role, key[1]).index(key[1])):
        text, means = table(found[model, task, budget])
        print(f"## {named(task)}, {named(model)}, {budget}{f' ({role[task]})' if task in role else ''}\n\n{text}\n")
        if budget == given.budget:
            losses[task, model] = means
    for title in dict.fromkeys(role.values()):
        tasks = [cell for cell in losses if role.get(cell[0]) == title]
        one_model = [cell for cell in tasks if cell[1] == tasks[0][1]]
        if len(one_model) < len(tasks):
            print(f"## Places by loss at {given.budget}, {title}, one model\n\n{ranks(losses, one_model)}\n")
        if tasks:
            print(f"## Places by loss at {given.budget}, {title}, all\n\n{ranks(losses, tasks)}\n")
    title = f"## Loss over that of {given.against}, at {given.budget}, in percent"
    print(f"{title}\n\n{compared(runs, given.budget, given.against)}\n")
    print(f"## Rates by budget\n\n{rates(runs)}")


if __name__ == "__main__":
    main()
