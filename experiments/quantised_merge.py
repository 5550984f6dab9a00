"""Measures the cost of merging a delta into a quantised model, for the table of docs/quantised.md.

    python experiments/quantised_merge.py [--model FOLDER] [--steps 200] [--budget 20000] [--kinds int8 nf4 torchao]

MiniLM is quantised, fine-tuned with ID3 on the demo's movie snippets (its head is float and trained whole), and then run in
four ways: with the sidecar; merged in float32; merged in bfloat16; merged in float32 and quantised again. Each is given the
1,000 held-out snippets. "kept" is how much of the trained change of the quantised weights is left in the layer, the rest
being rounded away: 1 - |change left - change|^2 / |change|^2 over the entries trained.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

import unmask
from unmask.gradients.entries import take
from unmask.lab.tasks.text.run import predict
from unmask.lab.training.demo_data import fetch_demo_model, fetch_demo_texts, load_demo_task
from unmask.quantised import dequantise_and_merge
from unmask.quantised.layers import weights
from unmask.quantised.tensor import QuantisedTensor

LENGTH, BATCH, RATE = 32, 16, 3e-3


def configuration(kind: str) -> Any:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=["classifier"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["classifier"],
    )


def load(source: str, kind: str) -> Any:
    torch.manual_seed(0)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=2, dtype=torch.float32, quantization_config=configuration(kind), device_map="cpu"
    )


def train(model: Any, tokenizer: Any, data: Any, arguments: argparse.Namespace) -> unmask.Selection:
    method = unmask.id3(arguments.budget, arguments.steps)
    selection = unmask.select(
        model.train(), method, include=r"encoder.*weight", exclude="LayerNorm", dense="classifier"
    )
    optimizer = torch.optim.AdamW(selection.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(arguments.steps):
        rows = data.take([order[i % len(order)] for i in range(step * BATCH, (step + 1) * BATCH)])
        batch = tokenizer(rows.texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor(rows.labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return selection


def kept(model: Any, delta: unmask.SparseDelta, base: dict[str, torch.Tensor]) -> float:
    """Returns the share of the quantised weights' change that a model's weights hold."""
    lost = whole = 0.0
    named = weights(model)
    for name, before in base.items():
        change = delta.sparse[name].values - before
        left = take(named[name], delta.sparse[name].indices).detach().float() - before
        lost += float((left - change).square().sum())
        whole += float(change.square().sum())
    return 1 - lost / whole


def rows_of(kind: str, source: str, arguments: argparse.Namespace) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    task = load_demo_task(fetch_demo_texts())
    held_out = next(iter(task.evals.values()))
    labels = np.array(held_out.labels)
    model = load(source, kind)
    tensors = weights(model)
    selection = train(model, tokenizer, task.train, arguments)
    delta = selection.delta()
    fresh = weights(load(source, kind))
    base = {
        name: take(fresh[name], entry.indices)
        for name, entry in delta.sparse.items()
        if isinstance(tensors[name], QuantisedTensor)
    }
    selection.release()
    model.eval()
    reference = predict(model, tokenizer, held_out, LENGTH)
    report = []

    def row(name: str, other: Any) -> None:
        share = kept(other, delta, base)  # before the evaluation: on some CPUs bitsandbytes repacks 4-bit weights in it
        scores = predict(other.eval(), tokenizer, held_out, LENGTH)
        error = np.abs(scores - reference).max() / np.abs(reference).max()
        accuracy = (scores.argmax(1) == labels).mean()
        report.append(f"| {kind} | {name} | {accuracy:.3f} | {error:.1e} | {100 * share:.1f}% |")

    row("sidecar", model)
    with tempfile.TemporaryDirectory() as folder:
        merged = dequantise_and_merge(model)
        row("merged, float32", merged)
        merged.save_pretrained(folder)
        row("merged, bfloat16", merged.to(torch.bfloat16))
        row("merged, quantised again", load(folder, kind))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo's MiniLM")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--budget", type=int, default=20_000)
    parser.add_argument("--kinds", nargs="+", default=["int8", "nf4", "torchao"])
    arguments = parser.parse_args()
    source = arguments.model or str(fetch_demo_model())
    print("| base | run as | accuracy | largest error of the logits, relative | change kept |\n|---|---|---|---|---|")
    for kind in arguments.kinds:
        print("\n".join(rows_of(kind, source, arguments)), flush=True)
    print(f"\ntorch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
