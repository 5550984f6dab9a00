"""Collects the values of a study that the report's template shows. The template escapes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unmask.lab.report.drawing import inline, worth_drawing
from unmask.lab.report.reading import Study
from unmask.lab.study.cells import Cell, distinct
from unmask.lab.study.live import duration, remaining
from unmask.lab.study.records import base_weights, records, trained_weights
from unmask.lab.study.store import Result, after_training
from unmask.lab.study.tables import (
    EDGES,
    Entry,
    Table,
    average_text,
    claim_text,
    figure,
    legend,
    spread,
    tables,
    trained_text,
)

_MARKS = "below; \N{WARNING SIGN}"
"""The place of a chosen value and the mark of an edge, for `unmask.lab.study.tables.legend`."""
_NUMBERS = ("score", "loss", "weights", "share", "time")


def study_context(study: Study, anchor: str) -> dict[str, Any]:
    """Returns everything that the template shows of one study, whose section on the page has the id ``anchor``."""
    results = [result for _, result in _ended(study)]
    failed = sum(result["status"] == "failed" for result in results)
    left = len(remaining(study.cells, study.protocol, study.choice, study.results))
    facts = [f"{failed} failed" if failed else "", f"{left} to go" if left else ""]
    versions = sorted({", ".join(f"{k} {v}" for k, v in sorted((r.get("versions") or {}).items())) for r in results})
    found = tables(study.cells, study.results, study.protocol, study.choice, study.claims)
    shown = records(study.cells, study.results, study.protocol, study.choice)
    return {
        "anchor": anchor,
        "title": study.title or study.name,
        "facts": ", ".join([f"{len(results) - failed} runs done", *filter(None, facts)]),
        "notes": study.notes,
        "command": study.command,
        "made": "; ".join(filter(None, versions)),
        "table": score_table(found[0]),
        "other_tables": [score_table(each) for each in found[1:]],
        "choice": _choice(found),
        "figures": inline(worth_drawing(shown) if study.figures is None else study.figures, shown, anchor),
        "runs": runs_table(study),
        "failures": failures(study),
    }


def score_table(found: Table) -> dict[str, Any]:
    """Returns a table of scores with a mark at the best of each column, and the paper's figures next to ours."""
    best: dict[str, float | None] = {}
    metrics: dict[str, str] = {}
    for column in found.columns:
        entries = [line.entries[column] for line in found.lines if column in line.entries]
        means = [shown.mean for entry in entries if (shown := figure(entry, found.protocol))]
        best[column] = max(means) if len(means) > 1 else None
        metrics[column] = next((entry.metric for entry in entries if entry.scores), "")
    names = list(dict.fromkeys(key for line in found.lines for key in line.labels))
    lines = [
        {
            "labels": [line.labels.get(name, "") for name in names],
            "weights": trained_text(line),
            "entries": [
                (_entry(line.entries.get(column), found, best[column]), claim_text(line.claim, column))
                for column in found.columns
            ],
            "average": f"{100 * line.average:.2f}" if line.average is not None else "-",
            "paper_average": average_text(line.claim),
            "claim": f"{found.model}, {line.claim.count}" if line.claim else "",
        }
        for line in found.lines
    ]
    return {
        "title": found.title,
        "names": names,
        "columns": list(metrics.items()),
        "paper": bool(found.model),
        "averages": any(line.average is not None for line in found.lines),
        "lines": lines,
        "legend": legend(found, _MARKS),
    }


def _entry(entry: Entry | None, found: Table, best: float | None) -> dict[str, Any]:
    estimate = figure(entry, found.protocol) if entry else None
    if entry is None or estimate is None:
        return {"mean": None, "failed": entry is not None and entry.failed > 0 and not entry.missing}
    counted = f"{estimate.n} of {estimate.of}" if found.protocol.kind == "paper" else f"{estimate.n}"
    remarks = [f"{counted} run{'s' if estimate.of != 1 else ''}"]
    remarks += [f"{entry.failed} failed"] if entry.failed else []
    remarks += [f"{entry.missing} to go"] if entry.missing else []
    remarks += [f"{found.choice.setting} {entry.value}"] if found.choice and entry.value is not None else []
    remarks += ["no other tried"] if entry.edge == "alone" else []
    return {
        "mean": f"{100 * estimate.mean:.2f}",
        "best": best is not None and estimate.mean >= best,
        "spread": spread(estimate, found.protocol),
        "scores": ", ".join(f"seed {seed}: {100 * score:.2f}" for seed, score in entry.scores.items()),
        "remarks": ", ".join(remarks),
        "edge": EDGES.get(entry.edge or ""),
    }


def _choice(shown: Sequence[Table]) -> dict[str, Any] | None:
    """Returns what each value of the swept setting gave; None where no setting was chosen."""
    found = next((each for each in shown if each.choice and each.protocol.kind == "seeds"), None)
    lines = [
        {
            "labels": ", ".join(line.labels.values()),
            "task": task,
            "value": entry.value,
            "edge": EDGES.get(entry.edge or ""),
            "tried": ", ".join(f"{value}: {figure:.4f}" for value, figure in entry.tried.items()),
        }
        for line in (found.lines if found else ())
        for task, entry in line.entries.items()
        if entry.tried
    ]
    if found is None or found.choice is None or not lines:
        return None
    return {"setting": found.choice.setting, "by": found.choice.by, "lines": lines}


def _ended(study: Study) -> list[tuple[Cell, Result]]:
    return [(cell, study.results[cell.id]) for cell in distinct(study.cells) if cell.id in study.results]


def runs_table(study: Study) -> dict[str, Any]:
    """Returns every run that has ended, with all its labels."""
    ended = _ended(study)
    names = list(dict.fromkeys(key for cell, _ in ended for key, value in cell.labels.items() if value is not None))
    lines = [
        {
            "id": cell.id,
            "details": _details(cell, result),
            "labels": [(_sort_key(cell.labels.get(name)), _text(cell.labels.get(name))) for name in names],
            "failed": result["status"] == "failed",
            "numbers": _numbers(result),
        }
        for cell, result in ended
    ]
    return {"names": names, "numbers": _NUMBERS, "lines": lines}


def _numbers(result: Result) -> list[tuple[float | str, str]]:
    """Returns (sort key, text) of a run's numbers, in the order of ``_NUMBERS``."""
    score, loss, seconds = result.get("score"), result.get("loss"), result.get("seconds")
    summary = result.get("summary") or {}
    trained = trained_weights(summary) if summary.get("budget") is not None else None
    share = trained / base_weights(summary) if trained is not None else None
    shown = [
        (score, f"{100 * score:.2f}" if score is not None else "-"),
        (loss, f"{loss:.4f}" if loss is not None else "-"),
        (trained, f"{trained:,}" if trained is not None else "-"),
        (share, f"{share:.3%}" if share is not None else "-"),
        (seconds, duration(seconds or 0)),
    ]
    return [("" if value is None else float(value), text) for value, text in shown]


def _details(cell: Cell, result: Result) -> list[tuple[str, dict[str, str]]]:
    """Returns (heading, entries) of what a run's row unfolds."""
    made = {key: result[key] for key in ("started", "host", "resumed_at") if result.get(key) is not None}
    parts = {
        "configuration": {key: _text(value) for key, value in cell.settings.items()},
        "after training": {
            key: f"{value:.4f}" if isinstance(value, float) else _text(value)
            for key, value in after_training(result).items()
        },
        "made": {key: _text(value) for key, value in {**made, **(result.get("versions") or {})}.items()},
    }
    return [(heading, entries) for heading, entries in parts.items() if entries or heading == "configuration"]


def failures(study: Study) -> list[dict[str, str]]:
    """Returns the error of every failed run."""
    found = []
    for result in [result for _, result in _ended(study) if result["status"] == "failed"]:
        error = result.get("error") or {}
        labels = ", ".join(f"{k} {v}" for k, v in result.get("labels", {}).items() if v is not None)
        summary = f"{result.get('id', '')} ({labels}): {error.get('type', '')}: {error.get('message', '')}"
        found.append({"summary": summary, "traceback": str(error.get("traceback", ""))})
    return found


def _sort_key(value: Any) -> Any:
    """Returns what a label is sorted by: a number where the label is one, also for ``0.17%``."""
    try:
        return float(str(value).removesuffix("%"))
    except ValueError:
        return "" if value is None else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
