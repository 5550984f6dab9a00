"""Trains three tasks on one MiniLM and merges them, for the table of docs/results.md: masks that share no weight, one mask, LoRA.

    python experiments/many_tasks.py --data-dir GLUE [--model FOLDER] [--output runs/many] [--steps 400] [--seeds 0 1 2]

For each seed and each of SST-2, MRPC and CoLA it trains a random mask over 0.2% of the weights (in linear layers) that leaves
alone what the tasks before it have (``disjoint``), the same mask for every task (``shared``), and a LoRA of about as many
weights on all linear layers. Each task has its own head, trained whole. Then it merges the three bodies, and scores each task
with its own head on the merged body. LoRAs are merged by peft's ``add_weighted_adapter``. The learning rates are those that the
study found best at this budget on SST-2 and MRPC (on CoLA, which it did not run with MiniLM, see `RATES`). Finished runs and
scores are kept and skipped, so the command can be stopped and started again. The table is printed, and written next to the
runs.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import nn

import peft
import unmask
from unmask.lab.models import load_base, load_tuned
from unmask.lab.tasks.text.glue import load_glue
from unmask.lab.tasks.text.metrics import compute
from unmask.lab.tasks.text.run import predict
from unmask.lab.training.demo_data import fetch_demo_model
from unmask.lab.training.settings import build
from unmask.lab.training.training import train

TASKS = ("sst2", "mrpc", "cola")
NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA"}
COMMON = {"batch_size": 16, "max_length": 64, "bf16": True, "warmup": 0.06, "logging_steps": 50}
MASK = {"method": "random_mask", "scope": "linear", "budget": "0.2%"}
RATES = {"sst2": 1e-2, "mrpc": 1e-2, "cola": 3e-3}  # of masks; on CoLA, 1e-2 left the loss at that of the larger class
LORA = {"into": "lora", "method": "full", "lora_r": 1, "lora_alpha": 1, "lora_targets": "all-linear", "lr": 3e-3}
# For a mask the arguments of `unmask.combine`, for LoRA those of `add_weighted_adapter`.
MERGES: dict[str, dict[str, dict]] = {
    "disjoint": {"sum (a | b | c)": {}},
    "shared": {
        "mean": {"rule": "mean"},
        "sum": {"rule": "linear"},
        "ties, density 0.5": {"rule": "ties", "density": 0.5},
        "dare_ties, density 0.5": {"rule": "dare_ties", "density": 0.5},
    },
    "lora": {
        "cat, weights 1 (the sum)": {"combination_type": "cat", "weights": [1.0] * 3},
        "cat, weights 1/3 (the mean)": {"combination_type": "cat", "weights": [1 / 3] * 3},
        "linear": {"combination_type": "linear", "weights": [1.0] * 3},
        "ties, density 0.5": {"combination_type": "ties", "weights": [1.0] * 3, "density": 0.5},
    },
}


def trained(kind: str, task: str, seed: int, given: argparse.Namespace) -> unmask.SparseDelta:
    """Trains one task, unless that was done before, and returns its delta."""
    before = TASKS[: TASKS.index(task)]
    # The first task has nothing to leave alone, so both kinds of mask share its run.
    name = f"shared-{task}-{seed}" if kind == "disjoint" and not before else f"{kind}-{task}-{seed}"
    folder = Path(given.output, name)
    if not (folder / "summary.json").is_file():
        others = [path_of(kind, each, seed, given) for each in before] if kind == "disjoint" else []
        settings = COMMON | (LORA if kind == "lora" else MASK | {"lr": RATES[task], "dense_lr": RATES[task]})
        settings |= {"model": given.model, "task": task, "data_dir": given.data_dir, "output": str(folder)}
        settings |= {"seed": seed, "max_steps": given.steps, "save_steps": 10 * given.steps, "avoid": others}
        train(build(settings), overwrite=True)
    return unmask.SparseDelta.load(folder / "delta.safetensors")


def path_of(kind: str, task: str, seed: int, given: argparse.Namespace) -> str:
    first = kind == "disjoint" and task == TASKS[0]
    return str(Path(given.output, f"{'shared' if first else kind}-{task}-{seed}", "delta.safetensors"))


def scores(model: nn.Module, tokenizer: object, task: str, given: argparse.Namespace) -> dict[str, float]:
    """Returns the task's score and its loss on the dev split."""
    data = load_glue(task, given.data_dir, need_train=False)
    [(_, examples)] = data.evals.items()
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        logits = predict(model.eval(), tokenizer, examples, COMMON["max_length"])
    found = compute(data.spec, logits, examples.labels)
    labels = torch.tensor([int(label) for label in examples.labels])
    loss = nn.functional.cross_entropy(torch.from_numpy(logits), labels).item()
    return {"score": found[data.spec.main_metric], "loss": loss}


def merged_masks(deltas: dict[str, unmask.SparseDelta], how: dict, given: argparse.Namespace) -> Iterator[tuple]:
    """Yields for each task its name, the model of the merged body with its head, and the tokenizer."""
    for task, own in deltas.items():
        model, tokenizer, _ = load_base(given.model, 2, 0)
        base = {"base": model} if how.get("rule", "mean") != "mean" else {}
        unmask.combine(*deltas.values(), heads=own, **base, **how).apply(model)
        yield task, model, tokenizer


def merged_loras(deltas: dict[str, unmask.SparseDelta], how: dict, given: argparse.Namespace) -> Iterator[tuple]:
    """Yields the same for LoRAs, which peft merges; their heads are set by hand, since peft does not merge several."""
    model, tokenizer, _ = load_base(given.model, 2, 0)
    marks = (".lora_A.default.weight", ".lora_B.default.weight")
    places = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for d in deltas.values()
        for name in d.whole
        if name.endswith(marks)
    }
    config = peft.LoraConfig(r=LORA["lora_r"], lora_alpha=LORA["lora_alpha"], target_modules=sorted(places))
    tuned = peft.get_peft_model(model, config, adapter_name=TASKS[0])
    for task in TASKS[1:]:
        tuned.add_adapter(task, config)
    state = tuned.state_dict()
    for task, delta in deltas.items():
        for name, tensor in delta.whole.items():
            if name.endswith(marks):
                state[name.replace(".default.", f".{task}.")].copy_(tensor)
    torch.manual_seed(0)
    tuned.add_weighted_adapter(list(TASKS), adapter_name="merged", **how)
    tuned.set_adapter("merged")
    for task, delta in deltas.items():
        heads = {name: t for name, t in delta.whole.items() if "classifier" in name and "original_module" not in name}
        for kind in ("weight", "bias"):
            [tensor] = [t for name, t in heads.items() if name.endswith(kind)]
            model.get_parameter(f"classifier.{kind}").data.copy_(tensor)
        yield task, tuned, tokenizer


def results_of(seed: int, given: argparse.Namespace) -> dict[str, dict]:
    """Returns every score of one seed: by kind, then by merge (``alone`` for none), then by task."""
    file = Path(given.output, f"scores-{seed}.json")
    found = json.loads(file.read_text()) if file.is_file() else {}
    for kind, merges in MERGES.items():
        deltas = {task: trained(kind, task, seed, given) for task in TASKS}
        held = found.setdefault(kind, {})
        if "alone" not in held:
            held["alone"] = {task: scores(*load_tuned(given.model, d), task, given) for task, d in deltas.items()}
        for name, how in merges.items():
            if name not in held:
                merged = merged_loras if kind == "lora" else merged_masks
                held[name] = {task: scores(m, t, task, given) for task, m, t in merged(deltas, how, given)}
        held["weights"] = {
            task: len(d) or sum(t.numel() for n, t in d.whole.items() if ".lora_" in n) for task, d in deltas.items()
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1))
    return found


def table(results: list[dict[str, dict]]) -> str:
    lines = [
        "| trained | weights a task | merged by | "
        + " | ".join(NAMES[task] for task in TASKS)
        + " | mean score | mean loss |",
        "|---|---:|---|" + "---:|" * (len(TASKS) + 2),
    ]
    for kind, merges in MERGES.items():
        for name in ("alone", *merges):
            cells = []
            for task in TASKS:
                values = [100 * each[kind][name][task]["score"] for each in results]
                spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{fmean(values):.1f}{spread}")
            score, loss = (
                fmean(each[kind][name][task][what] for each in results for task in TASKS) for what in ("score", "loss")
            )
            weights = max(results[0][kind]["weights"].values())
            shown = "not merged" if name == "alone" else name
            lines.append(f"| {kind} | {weights:,} | {shown} | {' | '.join(cells)} | {100 * score:.1f} | {loss:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--model", help="default: the demo's MiniLM")
    parser.add_argument("--output", default="runs/many")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    given.model = given.model or str(fetch_demo_model())
    results: list[dict[str, dict]] = []
    for seed in given.seeds:
        results.append(results_of(seed, given))
        text = (
            table(results) + f"\n\ntorch {torch.__version__}, {platform.machine()}, seeds {given.seeds[: len(results)]}"
        )
        Path(given.output, "table.md").write_text(text + "\n", encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main()
