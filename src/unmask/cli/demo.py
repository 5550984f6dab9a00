"""``unmask demo``: the main job on an embedded default, shown step by step."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.delta.delta import SparseDelta
from unmask.files import check_folder
from unmask.lab.models import load_base, load_tuned
from unmask.lab.tasks import compute
from unmask.lab.tasks.text.run import describe, predict
from unmask.lab.tasks.text.spec import Examples, TaskData
from unmask.lab.training.demo_data import cache_folder, fetch_demo_model, fetch_demo_texts, load_demo_task
from unmask.methods.presets import id3
from unmask.methods.scopes import exactly
from unmask.selection.select import select
from unmask.selection.selection import Selection

_LENGTH, _BATCH, _RATE, _SEED = 32, 16, 3e-3, 0


def run_demo(budget: str, steps: int, output: Path | None) -> None:
    """Accuracy before, training with ID3, accuracy after, the delta, and its reload in a fresh process."""
    if output is not None:
        check_folder(output, "--output")
    console = Console(highlight=False)
    start = time.perf_counter()
    console.print("fetching the encoder (MiniLM, 22.7M) and the rated movie snippets, once ...")
    folder, texts = fetch_demo_model(), fetch_demo_texts()
    data = load_demo_task(texts, _SEED)
    console.print(f"{data.notes[0]}: {len(data.train):,} to train on, {len(data.evals['eval']):,} held out")
    model, tokenizer, missing = load_base(str(folder), num_labels=2, seed=_SEED)
    total = sum(p.numel() for p in model.parameters())
    head = exactly(missing)
    selection = select(model, id3(budget, steps), dense=head, new=head)
    console.print(f"full fine-tuning trains {total:,} weights; this trains a budget of {selection.budget:,} "
                  f"({selection.budget / total:.3%}) and the new head ({selection.dense_numel:,})")  # fmt: skip
    held_out = data.evals["eval"]
    console.print(f"accuracy before: {_accuracy(model, tokenizer, data, held_out):.4f}")
    _train(model, tokenizer, selection, data, steps, console)
    scores = predict(model.eval(), tokenizer, held_out, _LENGTH)
    console.print(f"accuracy after:  {compute(data.spec, scores, held_out.labels)['accuracy']:.4f}")
    delta = _save(selection, data, folder, output)
    console.print(f"delta: {delta}: {delta.stat().st_size:,} bytes (the base model: {_size(folder):,})")
    _show_reload(folder, delta, scores, console)
    console.print(f"done in {time.perf_counter() - start:.0f} s. Look into it with: unmask inspect {delta}")


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    selection: Selection,
    data: TaskData,
    steps: int,
    console: Console,
) -> None:
    """The training loop as a user would write it."""
    torch.manual_seed(_SEED)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    columns = TextColumn("loss {task.fields[loss]} · unmasked {task.fields[used]} · accuracy {task.fields[metric]}")
    with Progress(TextColumn("training"), BarColumn(), columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=steps, loss="-", used="-", metric="-")
        smooth, probe = 0.0, data.evals["eval"].take(range(256))
        for step in range(steps):
            model.train()
            loss = _loss(model, tokenizer, data.train, step)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
            progress.update(bar, advance=1, loss=f"{smooth:.3f}", used=f"{selection.used:,} of {selection.budget:,}")
            if (step + 1) % 40 == 0:
                progress.update(bar, metric=f"{_accuracy(model, tokenizer, data, probe):.3f}")


def _loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, train: Examples, step: int) -> torch.Tensor:
    rows = torch.randint(len(train), (_BATCH,)).tolist()
    texts = [train.texts[i] for i in rows]
    inputs = tokenizer(texts, truncation=True, max_length=_LENGTH, padding=True, return_tensors="pt")
    return model(**inputs, labels=torch.tensor([train.labels[i] for i in rows])).loss


def _accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, on: Examples) -> float:
    return compute(data.spec, predict(model.eval(), tokenizer, on, _LENGTH), on.labels)["accuracy"]


def _save(selection: Selection, data: TaskData, base: Path, output: Path | None) -> Path:
    delta = selection.delta(str(base)).with_metadata(task=describe(data.spec, _LENGTH))
    return delta.save((output or cache_folder() / "demo") / "delta.safetensors")


def _size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def _show_reload(base: Path, delta: Path, scores: np.ndarray, console: Console) -> None:
    """Base + delta in a fresh process, compared bit for bit."""
    command = [sys.executable, "-m", "unmask.cli.demo", str(base), str(delta)]
    reloaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    here = _digest(scores)
    if reloaded != here:
        raise SystemExit(f"unmask: base + delta gave other predictions in a fresh process ({reloaded} is not {here}).")
    console.print(
        f"base + delta in a fresh process: the same {len(scores):,} predictions, bit for bit (sha256 {here[:16]}...)"
    )


def _digest(scores: np.ndarray) -> str:
    return hashlib.sha256(scores.tobytes()).hexdigest()


def _fresh_process(base: str, delta_path: str) -> None:
    model, tokenizer = load_tuned(base, SparseDelta.load(delta_path))
    held_out = load_demo_task(fetch_demo_texts(), _SEED).evals["eval"]
    print(_digest(predict(model, tokenizer, held_out, _LENGTH)))


if __name__ == "__main__":
    _fresh_process(*sys.argv[1:])
