"""The runs of a study: a table to sort and filter, the configuration of each, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from unmask.lab.report.reading import Study
from unmask.lab.study.cells import Cell, distinct
from unmask.lab.study.live import duration
from unmask.lab.study.records import base_weights, trained_weights
from unmask.lab.study.store import Result

_FIGURES = ("score", "loss", "weights", "share", "time")


def runs_section(study: Study, anchor: str) -> str:
    """Every run that has ended, with all its labels."""
    ended = [(cell, study.results[cell.id]) for cell in distinct(study.cells) if cell.id in study.results]
    if not ended:
        return ""
    names = list(dict.fromkeys(key for cell, _ in ended for key, value in cell.labels.items() if value is not None))
    head = "<th>run</th>" + "".join(_header(name, numeric=False) for name in names)
    head += "".join(_header(name, numeric=True) for name in _FIGURES)
    body = "".join(_row(cell, result, names) for cell, result in ended)
    search = f'<input type="search" data-filter="{anchor}-runs" placeholder="id3 0.001 ...">'
    return (
        f'<h3>Runs</h3><p><label>Filter {search}</label> <span class="muted">Click a heading to sort.</span></p>'
        f'<div class="wide"><table class="sortable" id="{anchor}-runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def failures_section(study: Study) -> str:
    """The error of every failed run."""
    failed = [r for cell in distinct(study.cells) if (r := study.results.get(cell.id)) and r["status"] == "failed"]
    parts = []
    for result in failed:
        error = result.get("error") or {}
        labels = ", ".join(f"{k} {v}" for k, v in result.get("labels", {}).items() if v is not None)
        summary = f"{result.get('id', '')} ({labels}): {error.get('type', '')}: {error.get('message', '')}"
        trace = f"<pre>{escape(str(error.get('traceback', '')))}</pre>"
        parts.append(f"<details><summary>{escape(summary)}</summary>{trace}</details>")
    return "<h3>Failed runs</h3>" + "".join(parts) if parts else ""


def _header(name: str, numeric: bool) -> str:
    return f'<th{" class=n" if numeric else ""} aria-sort="none"><button type="button">{escape(name)}</button></th>'


def _row(cell: Cell, result: Result, names: list[str]) -> str:
    cells = [_label(cell.labels.get(name)) for name in names]
    if result["status"] == "failed":
        blank = '<td class=n data-v="">-</td>'
        cells += ['<td class=n data-v=""><span class=bad>failed</span></td>', *[blank] * (len(_FIGURES) - 2)]
        cells.append(_number(result.get("seconds"), duration(result.get("seconds") or 0)))
    else:
        cells += _figures(result)
    return f"<tr><td>{_details(cell, result)}</td>{''.join(cells)}</tr>"


def _figures(result: Result) -> list[str]:
    summary, score, loss = result.get("summary") or {}, result.get("score"), result.get("loss")
    trained = trained_weights(summary) if summary.get("budget") is not None else None
    share = trained / base_weights(summary) if trained is not None else None
    seconds = result.get("seconds")
    return [
        _number(score, f"{100 * score:.2f}" if score is not None else "-"),
        _number(loss, f"{loss:.4f}" if loss is not None else "-"),
        _number(trained, f"{trained:,}" if trained is not None else "-"),
        _number(share, f"{share:.3%}" if share is not None else "-"),
        _number(seconds, duration(seconds or 0)),
    ]


def _details(cell: Cell, result: Result) -> str:
    summary = result.get("summary") or {}
    after = {
        key: f"{value:.4f}" if isinstance(value, float) else value for key, value in summary.get("after", {}).items()
    }
    more = {key: result[key] for key in ("started", "host", "resumed_at") if result.get(key) is not None}
    return (
        f"<details><summary><code>{escape(cell.id)}</code></summary>"
        f"<h4>configuration</h4>{_list(cell.settings)}"
        + (f"<h4>after training</h4>{_list(after)}" if after else "")
        + (
            f"<h4>made</h4>{_list({**more, **(result.get('versions') or {})})}"
            if more or result.get("versions")
            else ""
        )
        + "</details>"
    )


def _list(settings: Mapping[str, Any]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_text(v))}</dd>" for k, v in settings.items()) + "</dl>"
    )


def _label(value: Any) -> str:
    return f'<td data-v="{escape(str(_value(value)))}">{escape(_text(value))}</td>'


def _number(value: Any, text: str) -> str:
    return f'<td class=n data-v="{"" if value is None else float(value)}">{escape(text)}</td>'


def _value(value: Any) -> Any:
    """What a label sorts by: a number where it is one, also ``0.17%``."""
    try:
        return float(str(value).removesuffix("%"))
    except ValueError:
        return "" if value is None else value


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
