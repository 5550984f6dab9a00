"""The sections of a study's report, as HTML. Whatever comes from runs goes through `escape`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

from unmask.errors import UnmaskError
from unmask.lab.figures.estimates import Estimate
from unmask.lab.report.drawing import CAPTIONS, inline, worth_drawing
from unmask.lab.report.reading import Study
from unmask.lab.report.runs import failures_section, runs_section
from unmask.lab.study.cells import distinct
from unmask.lab.study.records import records
from unmask.lab.study.spec import Protocol
from unmask.lab.study.tables import (
    EDGES,
    Entry,
    Line,
    Table,
    average_text,
    claim_text,
    figure,
    legend,
    table,
    tables,
    trained_text,
)

_MARKS = "below; \N{WARNING SIGN}"  # see `legend`


def study_section(study: Study, anchor: str, titled: bool = True) -> str:
    """Everything about one study.

    Args:
        study: The study.
        anchor: Its id on the page.
        titled: Under a heading of its own.
    """
    parts = [
        f"<h2>{escape(study.title or study.name)}</h2>" if titled else "",
        _head(study),
        _tables(study),
        _rates(study),
        _figures(study, anchor),
        runs_section(study, anchor),
        failures_section(study),
    ]
    return f'<section class="study" id="{anchor}">\n' + "".join(part + "\n" for part in parts if part) + "</section>\n"


def _head(study: Study) -> str:
    unique = distinct(study.cells)
    ended = [study.results[cell.id] for cell in unique if cell.id in study.results]
    failed = sum(result["status"] == "failed" for result in ended)
    facts = [f"{len(ended) - failed} runs done", f"{failed} failed" if failed else "", _open(study, len(ended))]
    versions = sorted({json.dumps(r["versions"], sort_keys=True) for r in ended if r.get("versions")})
    made = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in versions)
    lines = [f"<p>{', '.join(filter(None, facts))}.</p>"]
    lines += [f'<p class="note">{escape(note)}</p>' for note in study.notes]
    lines += [f'<p class="muted">Command: <code>{escape(study.command)}</code></p>'] if study.command else []
    lines += [f'<p class="muted">Made with {escape(made)}.</p>'] if made else []
    return "\n".join(lines)


def _open(study: Study, ended: int) -> str:
    """How many runs are to come; with a choice, not all of the grid will be run."""
    from unmask.lab.study.live import remaining

    left = len(remaining(study.cells, study.protocol, study.choice, study.results))
    return f"{left} to go" if left else ""


def _tables(study: Study) -> str:
    first, *others = tables(study.cells, study.results, study.protocol, study.choice, study.claims)
    folded = "".join(f"<details><summary>{escape(t.title)}</summary>{score_table(t)}</details>" for t in others)
    return f"<h3>{escape(first.title)}</h3>{score_table(first)}{folded}"


def score_table(found: Table) -> str:
    """A table of scores; the best of each column is bold, and the paper's figures stand at the right of ours."""
    names = list(dict.fromkeys(key for line in found.lines for key in line.labels))
    averages = any(line.average is not None for line in found.lines)
    paper = "<th class=n>paper</th>" if found.model else ""
    head = [f"<th>{escape(name)}</th>" for name in names] + ["<th class=n>weights</th>"]
    for column in found.columns:
        head.append(f"<th class=n>{escape(column)}<small>{escape(_metric(found, column))}</small></th>{paper}")
    head += [f"<th class=n>average</th>{paper}"] if averages else []
    head += ["<th>the paper's model and budget</th>"] if found.model else []
    best = {column: _best(found, column) for column in found.columns}
    rows = "".join(_row(line, names, found, best, averages) for line in found.lines)
    return (
        f'<div class="wide"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="muted">{escape(legend(found, _MARKS))}</p>'
    )


def _row(line: Line, names: Sequence[str], found: Table, best: Mapping[str, float | None], averages: bool) -> str:
    def paper(text: str) -> list[str]:
        return [f"<td class=n>{escape(text)}</td>"] if found.model else []

    cells = [f"<td>{escape(line.labels.get(name, ''))}</td>" for name in names]
    cells.append(f"<td class=n>{trained_text(line)}</td>")
    for column in found.columns:
        cells += [_cell(line.entries.get(column), found, best[column]), *paper(claim_text(line.claim, column))]
    if averages:
        own = f"{100 * line.average:.2f}" if line.average is not None else "-"
        cells += [f"<td class=n>{own}</td>", *paper(average_text(line.claim))]
    if found.model:
        cells.append(f"<td>{escape(f'{found.model}, {line.claim.count}') if line.claim else ''}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _cell(entry: Entry | None, found: Table, best: float | None) -> str:
    estimate = figure(entry, found.protocol) if entry else None
    if entry is None or estimate is None:
        failed = entry is not None and entry.failed and not entry.missing
        return f"<td class=n>{'<span class=bad>failed</span>' if failed else '-'}</td>"
    mean = f"{100 * estimate.mean:.2f}"
    shown = f"<b>{mean}</b>" if best is not None and estimate.mean >= best else mean
    scores = ", ".join(f"seed {seed}: {100 * score:.2f}" for seed, score in entry.scores.items())
    below = f"<small>{escape(_remarks(entry, estimate, found))}{_mark(entry)}</small>"
    return f'<td class=n title="{escape(scores)}">{shown}{_spread(estimate, found.protocol)}{below}</td>'


def _remarks(entry: Entry, estimate: Estimate, found: Table) -> str:
    counted = f"{estimate.n} of {estimate.of}" if found.protocol.kind == "paper" else f"{estimate.n}"
    words = [f"{counted} run{'s' if estimate.of != 1 else ''}"]
    words += [f"{entry.failed} failed"] if entry.failed else []
    words += [f"{entry.missing} to go"] if entry.missing else []
    words += [f"{found.choice.setting} {entry.value}"] if found.choice and entry.value is not None else []
    words += ["no other tried"] if entry.edge == "alone" else []
    return ", ".join(words)


def _mark(entry: Entry) -> str:
    at = EDGES.get(entry.edge or "")
    return f' <abbr class=edge title="{at}: the best may lie outside">&#9888;</abbr>' if at else ""


def _spread(estimate: Estimate, protocol: Protocol) -> str:
    if protocol.kind == "seeds" and estimate.high is not None:
        return f" &plusmn; {100 * (estimate.high - estimate.mean):.2f}"
    return f" &plusmn; {100 * estimate.deviation:.2f}" if estimate.deviation is not None else ""


def _metric(found: Table, task: str) -> str:
    return next((e.metric for line in found.lines if (e := line.entries.get(task)) and e.scores), "")


def _best(found: Table, task: str) -> float | None:
    estimates = [figure(e, found.protocol) for line in found.lines if (e := line.entries.get(task))]
    means = [estimate.mean for estimate in estimates if estimate]
    return max(means) if len(means) > 1 else None


def _rates(study: Study) -> str:
    """What each value of the swept setting gave."""
    if study.choice is None or (study.protocol.kind == "paper" and study.protocol.pair):
        return ""
    found = table(study.cells, study.results, replace(study.protocol, kind="seeds"), study.choice)
    rows = []
    for line in found.lines:
        for task, entry in line.entries.items():
            if not entry.tried:
                continue
            tried = ", ".join(f"{value}: {figure:.4f}" for value, figure in entry.tried.items())
            at = EDGES.get(entry.edge or "")
            edge = f" <span class=edge>{at}</span>" if at else ""
            chosen = escape(str(entry.value)) + edge
            labels = escape(", ".join(line.labels.values()))
            rows.append(f"<tr><td>{labels}</td><td>{escape(task)}</td><td>{chosen}</td><td>{escape(tried)}</td></tr>")
    if not rows:
        return ""
    head = f"<th>method</th><th>task</th><th>{escape(study.choice.setting)}</th><th>{escape(study.choice.by)} of each tried</th>"
    body = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>How the {escape(study.choice.setting)} was chosen</summary>{body}</details>"


def _figures(study: Study, anchor: str) -> str:
    shown = records(study.cells, study.results, study.protocol, study.choice)
    names = study.figures if study.figures is not None else worth_drawing(shown)
    parts = []
    for name, drawn in inline(names, shown, anchor).items():
        caption = escape(CAPTIONS.get(name, name))
        content = f"<p class=bad>not drawn: {escape(str(drawn))}</p>" if isinstance(drawn, UnmaskError) else drawn
        parts.append(
            f'<figure id="{anchor}-{escape(name)}"><div class="wide">{content}</div><figcaption>{caption}</figcaption></figure>'
        )
    return "<h3>Figures</h3>" + "".join(parts) if parts else ""
