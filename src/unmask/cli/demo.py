"""Runs ``unmask demo``: fine-tunes a small encoder with ID3 step by step, and shows that the delta reproduces it."""

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import unmask
from unmask.files import cache_folder, check_folder
from unmask.lab.models import load_base, load_tuned
from unmask.lab.tasks import Examples, TaskData, compute
from unmask.lab.tasks.protocol import Source
from unmask.lab.tasks.text.run import describe, predict
from unmask.lab.training.demo_data import fetch_demo_model, fetch_demo_texts, load_demo_task
from unmask.methods.scopes import exactly

_LENGTH, _BATCH, _RATE, _SEED = 32, 16, 3e-3, 0


def run_demo(budget: str, steps: int, output: Path | None) -> None:
    """Shows the accuracy before and after training with ID3, writes the delta, and loads it again in a fresh process."""
    if output is not None:
        check_folder(output, "--output")
    console = Console(highlight=False)
    start = time.perf_counter()
    console.print("fetching the encoder (MiniLM, 22.7M) and the rated movie snippets, once ...")
    folder, texts = fetch_demo_model(), fetch_demo_texts()
    data = load_demo_task(texts, _SEED)
    held_out = data.evals["eval"]
    console.print(f"{data.notes[0]}: {len(data.train):,} to train on, {len(held_out):,} held out")

    model, tokenizer, missing = load_base(str(folder), num_labels=2, seed=_SEED)
    total = sum(p.numel() for p in model.parameters())
    head = exactly(missing)
    selection = unmask.select(model, unmask.id3(budget, steps), dense=head, new=head)
    console.print(
        f"full fine-tuning trains {total:,} weights; this trains a budget of {selection.budget:,} "
        f"({selection.budget / total:.3%}) and the new head ({selection.dense_numel:,})"
    )
    console.print(f"accuracy before: {_accuracy(model, tokenizer, data, held_out):.4f}")
    torch.manual_seed(_SEED)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    columns = TextColumn("loss {task.fields[loss]} · unmasked {task.fields[used]} · accuracy {task.fields[metric]}")
    with Progress(TextColumn("training"), BarColumn(), columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=steps, loss="-", used="-", metric="-")
        smooth, probe = 0.0, data.evals["eval"].take(range(256))
        for step in range(steps):
            model.train()
            batch = data.train.take(torch.randint(len(data.train), (_BATCH,)).tolist())
            inputs = tokenizer(batch.texts, truncation=True, max_length=_LENGTH, padding=True, return_tensors="pt")
            loss = model(**inputs, labels=torch.tensor(batch.labels)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            smooth = loss.item() if step == 0 else 0.95 * smooth + 0.05 * loss.item()
            progress.update(bar, advance=1, loss=f"{smooth:.3f}", used=f"{selection.used:,} of {selection.budget:,}")
            if (step + 1) % 40 == 0:
                progress.update(bar, metric=f"{_accuracy(model, tokenizer, data, probe):.3f}")
    scores = predict(model.eval(), tokenizer, held_out, _LENGTH)
    console.print(f"accuracy after:  {compute(data.spec, scores, held_out.labels)['accuracy']:.4f}")

    delta = selection.delta(str(folder)).with_metadata(task=describe(data.spec, Source(), _LENGTH))
    path = delta.save((output or cache_folder() / "demo") / "delta.safetensors")
    base_bytes = (folder / "model.safetensors").stat().st_size
    console.print(f"delta: {path}: {path.stat().st_size:,} bytes (the base model: {base_bytes:,})")
    command = [sys.executable, "-m", "unmask.cli.demo", str(folder), str(path)]
    reloaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    here = _digest(scores)
    if reloaded != here:
        raise SystemExit(f"unmask: base + delta gave other predictions in a fresh process ({reloaded} is not {here}).")
    console.print(
        f"base + delta in a fresh process: the same {len(scores):,} predictions, bit for bit (sha256 {here[:16]}...)"
    )
    console.print(f"done in {time.perf_counter() - start:.0f} s. Look into it with: unmask inspect {path}")


def _accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TaskData, on: Examples) -> float:
    return compute(data.spec, predict(model.eval(), tokenizer, on, _LENGTH), on.labels)["accuracy"]


def _digest(scores: np.ndarray) -> str:
    return hashlib.sha256(scores.tobytes()).hexdigest()


if __name__ == "__main__":  # `run_demo` starts this in a fresh process: the digest of base + delta's predictions
    _model, _tokenizer = load_tuned(sys.argv[1], unmask.SparseDelta.load(sys.argv[2]))
    _held_out = load_demo_task(fetch_demo_texts(), _SEED).evals["eval"]
    print(_digest(predict(_model, _tokenizer, _held_out, _LENGTH)))
