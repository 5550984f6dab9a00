"""Scaling curves: a step's cost as the budget grows, as the model grows, and what selecting costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from unmask.files import write_json
from unmask.lab.bench.grouping import too_large
from unmask.lab.bench.machine import available_bytes
from unmask.lab.bench.models import Blueprint, blueprint
from unmask.lab.bench.quiet import quiet_torch
from unmask.lab.bench.record import derive
from unmask.lab.bench.rounds import RowResult
from unmask.lab.bench.runner import header, write_reports
from unmask.lab.bench.settings import BenchSettings
from unmask.lab.bench.shapes import SHAPES, SIZES, Shape
from unmask.lab.bench.stats import StepTime
from unmask.lab.bench.timed import Say, estimates, time_rows

BUDGETS = (10**3, 10**4, 10**5, 10**6, 10**7)
SIZE_BUDGET = 100_000
SELECTION_MODELS = tuple(SHAPES[name] for name in ("roberta-base", "minilm", "mpnet", "smollm2"))


def run_curve(
    settings: BenchSettings,
    say: Say = print,
    command: str | None = None,
    *,
    budgets: Sequence[int] = BUDGETS,
    sizes: Sequence[Shape] = SIZES,
    models: Sequence[Shape] = SELECTION_MODELS,
) -> dict[str, Any]:
    """Measures a curve and writes ``curve-NAME.json``, ``.md`` and ``.png``; the JSON grows point by point.

    Args:
        settings: The run, with a curve.
        say: Takes lines of progress.
        command: The command line, for the record.
        budgets: Of the curve over B.
        sizes: Shapes of the curve over N, smallest first.
        models: Shapes whose cost of selecting is measured.
    """
    name = f"curve-{settings.curve}"
    with quiet_torch(settings.threads):
        record = header(settings, command)
        record |= {"curve": settings.curve, "points": [], "notes": [], "rows": {}}
        curve = _Curve(record, Path(settings.output, f"{name}.json"), say)
        curve.save()
        if settings.curve == "budget":
            _over_budget(curve, settings, budgets)
        elif settings.curve == "size":
            _over_size(curve, settings, sizes)
        else:
            _selection(curve, settings, models)
        record["complete"] = True
        curve.save()
        write_reports(record, settings, name, say)
    return record


class _Curve:
    """A curve's record as it grows."""

    def __init__(self, record: dict[str, Any], path: Path, say: Say) -> None:
        self.record, self.path, self.say = record, path, say

    def save(self) -> None:
        write_json(self.path, self.record)

    def note(self, text: str) -> None:
        self.record["notes"].append(text)
        self.say(text)

    def add(self, **point: Any) -> None:
        self.record["points"].append(point)
        self.save()

    def measure(self, settings: BenchSettings, plan: Blueprint, methods: str) -> dict[str, RowResult]:
        """Times rows on a model; keeps their figures under the model's name."""
        settings = dataclasses.replace(settings, methods=methods)
        results = [RowResult(row) for row in settings.rows()]

        def save() -> None:
            tokens = plan.shape.batch * plan.shape.length
            self.record["rows"][plan.shape.name] = derive(results, tokens)
            self.save()

        self.record["grouping"] = time_rows(results, plan, settings, self.say, save)
        for result in results:
            if result.reason:
                self.note(f"{plan.shape.name}, {result.row.label}: {result.status}: {result.reason}")
        return {result.row.label: result for result in results}


def _over_budget(curve: _Curve, settings: BenchSettings, budgets: Sequence[int]) -> None:
    plan = blueprint(settings)
    curve.record["model"] = plan.describe()
    total = curve.record["model"]["parameters"]
    fitting = [budget for budget in budgets if budget <= total]
    if len(fitting) < len(budgets):
        curve.note(f"budgets above the model's {total:,} weights are left out")
    labels = [f"{kind}@{budget}" for budget in fitting for kind in ("static", "id3-10")]
    results = curve.measure(settings, plan, ",".join(["frozen", *labels]))
    for budget in fitting:
        floor = _floor(results["frozen"], results[f"static@{budget}"], results[f"id3-10@{budget}"])
        figures = _figures(results[f"static@{budget}"], results[f"id3-10@{budget}"])
        curve.add(budget=budget, **{key: value / floor if value and floor else None for key, value in figures.items()})


def _over_size(curve: _Curve, settings: BenchSettings, sizes: Sequence[Shape]) -> None:
    shorter = dataclasses.replace(settings, rounds=max(2, settings.rounds // 2))
    static, strided = (f"{kind}@{SIZE_BUDGET}" for kind in ("static", "id3-10"))
    for shape in sizes:
        plan = blueprint(shorter, shape)
        described = plan.describe()
        large = _too_large(plan, f"frozen,{static}", shorter)
        if large:
            curve.note(f"stopped before {shape.name} ({described['parameters']:,} weights): it {large}")
            return
        curve.say(f"{shape.name}: {described['parameters']:,} weights")
        results = curve.measure(shorter, plan, f"frozen,{static},{strided}")
        figures = _figures(results[static], results[strided])
        curve.add(model=shape.name, parameters=described["parameters"], frozen=_median(results["frozen"]), **figures)


def _selection(curve: _Curve, settings: BenchSettings, models: Sequence[Shape]) -> None:
    for shape in models:
        plan = blueprint(settings, shape)
        curve.say(f"{shape.name}: exact ID3 against full fine-tuning")
        results = curve.measure(settings, plan, "frozen,full,id3")
        id3, full = results["id3"].steps, results["full"].steps
        if id3 and full:
            parameters = plan.describe()["parameters"]
            curve.add(model=shape.name, parameters=parameters, **selection_cost(id3, full))


def selection_cost(id3: Sequence[StepTime], full: Sequence[StepTime]) -> dict[str, float]:
    """What selecting adds to a backward pass that forms every dense gradient anyway.

    Args:
        id3: Steps of exact ID3: the dense gradients are formed, ranked, gathered and dropped.
        full: Steps of full fine-tuning in the same rounds: they are formed and kept.

    Returns:
        Median backward of each, in seconds, and their difference as a ``share of backward``, the median over the rounds.
    """
    ours, dense = _backwards(id3), _backwards(full)
    shares = [ours[key] / dense[key] - 1 for key in sorted(ours.keys() & dense.keys())]
    return {
        "id3 backward": median(step.backward for step in id3),
        "full backward": median(step.backward for step in full),
        "share of backward": median(shares) if shares else 0.0,
    }


def _backwards(steps: Sequence[StepTime]) -> dict[tuple[int, int], float]:
    keys = {(s.group, s.round) for s in steps}
    return {key: median(s.backward for s in steps if (s.group, s.round) == key) for key in keys}


def _figures(static: RowResult, strided: RowResult) -> dict[str, float | None]:
    selecting = [step.total for step in strided.steps if step.selecting]
    between = [step.total for step in strided.steps if not step.selecting]
    return {
        "static": _median(static),
        "id3-10 between": median(between) if between else None,
        "id3-10 selecting": median(selecting) if selecting else None,
    }


def _median(result: RowResult) -> float | None:
    return median(step.total for step in result.steps) if result.steps else None


def _floor(frozen: RowResult, *rows: RowResult) -> float | None:
    """The frozen row's median in the groups that these rows ran in."""
    groups = {step.group for row in rows for step in row.steps}
    totals = [step.total for step in frozen.steps if step.group in groups]
    return median(totals) if totals else None


def _too_large(plan: Blueprint, methods: str, settings: BenchSettings) -> str | None:
    rows = [RowResult(row) for row in dataclasses.replace(settings, methods=methods).rows()]
    held, step = estimates(rows, plan)
    return too_large(list(held), held, step, available_bytes(plan.device))
