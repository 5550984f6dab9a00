"""Makes up a study with all parts that a report can show, and with names that need escaping."""

from __future__ import annotations

import random
from typing import Any

from unmask.lab.study import Store, expand, parse
from unmask.lab.study.scheduler import plan
from unmask.methods.naming import KINDS

EVIL = "<script>alert('x')</script>&\"q\""
VALUES: dict[str, Any] = {
    "name": "made-up",
    "title": f"Made up {EVIL}",
    "notes": [f"A note {EVIL}"],
    "settings": {"model": "models/base", "data_dir": EVIL, "max_steps": 60},
    "axes": {"task": ["mrpc", "cola"], "budget": ["0.05%", "0.2%"], "seed": [0, 1, 2]},
    "methods": {
        "id3": {"settings": {"method": "id3"}, "grid": {"lr": ["3e-4", "1e-3", "3e-3"]}},
        "repeat_d3": {"settings": {"method": "repeat_d3"}, "grid": {"lr": ["3e-4", "1e-3", "3e-3"]}},
        f"random {EVIL}": {"settings": {"method": "random_mask"}, "grid": {"lr": ["3e-3", "1e-2", "3e-2"]}},
        "full": {"settings": {"method": "full", "budget": None}, "grid": {"lr": ["5e-5"]}},
    },
    "choose": {"seeds": [0]},
    "figures": ["fig1", "fig5", "fig8"],
    "claims": {
        "model": f"Published {EVIL}",
        "rows": [
            {
                "method": "id3",
                "budget": "0.2%",
                "count": f"320K {EVIL}",
                "scores": {"mrpc": "91.26 0.28", "cola": "72.07"},
                "average": "89.15",
            },
            {
                "method": "full",
                "count": "184M",
                "scores": {"mrpc": "89.95 1.07", "cola": "71.43 0.72"},
                "average": "80.69",
            },
        ],
    },
}


def result(cell: Any, draw: random.Random) -> dict[str, Any]:
    """Returns a finished run's result; the score is better, the nearer the rate is to 1e-3."""
    settings = cell.settings
    loss = 0.4 + abs(settings.get("lr", 1e-3) - 1e-3) * 10 + draw.random() / 50
    budget = 20_000_000 if settings["method" if "method" in settings else "task"] == "full" else 10_000
    budget = 40_000 if settings.get("budget") == "0.2%" else budget
    strategy = {"id3": "increment", "repeat_d3": "repeat"}.get(settings.get("method", "id3"), "static")
    steps = range(10, 61, 10)
    used = {step: budget * step // 60 if strategy == "increment" else budget for step in steps}
    rows = {
        step: [
            {"layer": str(n), "kind": kind, "unmasked": max(1, used[step] // 100 * (n + 1)), "of": 10**6}
            for n in range(4)
            for kind in KINDS
        ]
        for step in steps
    }
    return {
        "labels": dict(cell.labels),
        "settings": dict(settings),
        "seconds": 20 + draw.random(),
        "started": "2026-01-01T00:00:00+00:00",
        "host": EVIL,
        "status": "done",
        "score": 1 - loss,
        "loss": loss,
        "metric": "accuracy",
        "summary": {
            "budget": budget,
            "parameters": 20_000_000,
            "head": 770,
            "method": {"name": settings.get("method", "id3"), "strategy": strategy, "parameters": {}},
            "after": {"accuracy": 1 - loss, "loss": loss},
        },
        "curve": [{"step": s, "used": used[s], "score": (1 - loss) * s / 60, "loss": loss} for s in steps],
        "allocation": [
            {
                "step": s,
                "used": sum(row["unmasked"] for row in rows[s]),
                "tensor_sparsity": 1 - s / 100,
                "sparsity_entropy": s / 20,
                "tensors": 30,
                "rows": rows[s],
            }
            for s in steps
        ],
        "versions": {"unmask": "0", "torch": EVIL},
    }


def write_study(folder: Any, values: dict[str, Any] = VALUES, failing: int = 5) -> Store:
    """Writes the study's folder; the run with the number ``failing`` has failed, and the last run has not ended."""
    sweep, store, draw = parse(values), Store(folder), random.Random(0)
    cells = expand(sweep)
    store.write_plan(plan(sweep, cells, f"unmask sweep {EVIL}"))
    for number, cell in enumerate(cells[:-1]):
        found = result(cell, draw)
        if number == failing:
            error = {"type": "ValueError", "message": EVIL, "traceback": f"Traceback\n{EVIL}"}
            found = {key: found[key] for key in ("labels", "settings", "seconds")} | {
                "status": "failed",
                "error": error,
            }
        store.write_result(cell.id, found)
    return store
