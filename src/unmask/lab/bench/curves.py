"""Measures scaling curves: how a step's cost grows with the budget and with the model, and what selecting costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

from unmask.lab.bench.models import blueprint
from unmask.lab.bench.run import Measure, Record, RowResult, Say, measure_apart
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.shapes import SIZES
from unmask.lab.bench.tables import StepTime, ratio

BUDGETS = (10**3, 10**4, 10**5, 10**6, 10**7)
SIZE_BUDGET = 100_000
SIZE_MODELS = tuple(shape.name for shape in SIZES)
SELECTION_MODELS = ("roberta-base", "minilm", "mpnet", "smollm2")


def run_curve(
    settings: BenchSettings,
    say: Say = print,
    command: str | None = None,
    measure: Measure = measure_apart,
    *,
    budgets: Sequence[int] = BUDGETS,
    models: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures a curve and writes ``curve-NAME.json``, ``.md`` and ``.png``. The JSON grows while the run goes on.

    Args:
        settings: The run, with a curve.
        say, command, measure: The same as for `run_bench`.
        budgets: The budgets of the curve over the budget.
        models: The models of the other two curves, the smallest first; by default those of the curve. The curve over the
            size stops at a model where a row fails.

    Returns:
        The record, as the JSON file holds it.
    """
    curve = _Curve(settings, f"curve-{settings.curve}", say, command, measure)
    curve.content |= {"curve": settings.curve, "points": [], "notes": []}
    curve.save()
    if settings.curve == "budget":
        curve.content["model"] = described = blueprint(settings).describe()
        total = described["parameters"]
        fitting = [budget for budget in budgets if budget <= total]
        if len(fitting) < len(budgets):
            curve.note(f"The budgets above the model's {total:,} weights are left out.")
        labels = [f"{kind}@{budget}" for budget in fitting for kind in ("static", "id3-10")]
        _, rows = curve.run(settings.model, ",".join(["frozen", *labels]))
        for budget in fitting:
            parts = _parts(rows[f"static@{budget}"], rows[f"id3-10@{budget}"])
            ratios = {name: ratio(steps, rows["frozen"].steps) for name, steps in parts.items()}
            curve.add(budget=budget, **{name: found["ratio"] if found else None for name, found in ratios.items()})
    elif settings.curve == "size":
        static, strided = (f"{kind}@{SIZE_BUDGET}" for kind in ("static", "id3-10"))
        for model in models or SIZE_MODELS:
            weights, rows = curve.run(model, f"frozen,{static},{strided}")
            parts = {"frozen": rows["frozen"].steps, **_parts(rows[static], rows[strided])}
            seconds = {name: median(step.total for step in steps) if steps else None for name, steps in parts.items()}
            curve.add(model=model, parameters=weights, **seconds)
            if any(result.status == "failed" for result in rows.values()):  # Memory has run out.
                curve.note(f"The curve stops at {model}, where a row failed.")
                break
    else:
        for model in models or SELECTION_MODELS:
            weights, rows = curve.run(model, "full,id3")
            if rows["full"].steps and rows["id3"].steps:
                curve.add(model=model, parameters=weights, **selection_cost(rows["id3"].steps, rows["full"].steps))
    return curve.finish()


class _Curve(Record):
    """The record of a curve, which grows row by row and point by point."""

    def note(self, text: str) -> None:
        self.content["notes"].append(text)
        self.say(text)

    def add(self, **point: Any) -> None:
        self.content["points"].append(point)
        self.save()

    def run(self, model: str, methods: str) -> tuple[int, dict[str, RowResult]]:
        """Measures rows of a model and keeps their figures under its name; returns its weights and the rows by label."""
        settings = dataclasses.replace(self.settings, model=model, methods=methods)
        described = blueprint(settings).describe()
        name, weights = described["name"], described["parameters"]
        self.say(f"{name}: {weights:,} weights")
        self.content["rows"][name] = {}
        results = self.run_rows(settings, described["tokens"], self.content["rows"][name])
        for result in results.values():
            if result.reason:
                self.note(f"{name}, {result.row.label}: {result.status}: {result.reason}")
        return weights, results


def selection_cost(id3: Sequence[StepTime], full: Sequence[StepTime]) -> dict[str, float]:
    """Returns what selecting adds to a backward pass that forms every dense gradient anyway.

    Exact ID3 ranks every gradient; full fine-tuning in the same draws forms every gradient and keeps it. The result has
    the median backward pass of each, in seconds, and their ratio less one, the median over the draws.
    """
    found = ratio(id3, full, "backward")
    return {
        "id3 backward": median(step.backward for step in id3),
        "full backward": median(step.backward for step in full),
        "share of backward": found["ratio"] - 1 if found else 0.0,
    }


def _parts(static: RowResult, strided: RowResult) -> dict[str, list[StepTime]]:
    return {
        "static": static.steps,
        "id3-10 between": [step for step in strided.steps if not step.selecting],
        "id3-10 selecting": [step for step in strided.steps if step.selecting],
    }
