"""Trains with TRL's GRPO while another process generates, and measures what a sync of the two costs, for docs/serving.md.

    python experiments/grpo_sync.py --model SMOLLM2_FOLDER --data-dir MATH_FOLDER [--rows random_mask lora_1] [--steps 3]

MATH_FOLDER holds the word problems of LLM-Adapters (AddSub/test.json, see docs/tasks.md). The trainer's process trains in the
model's own dtype, bfloat16. The rollout process (`grpo_rollouts.py`) holds a copy of the model, and answers the trainer's
prompts with transformers' `generate`. After every optimizer step the trainer sends what changed through a folder, and both
processes compute the logits of the same text. They must be equal bit for bit. Only those of a LoRA that is merged for the
rollout process differ, and the run says by how much.

The reward is 1 for the right answer, and up to 0.5 for a number near it, without which so small a model would see no reward in
most steps. A handful of steps measures the sync. It says nothing about learning.

Each row is a run: a selection of --budget weights; a LoRA of all linear layers, in the model's dtype, sent as an adapter; a LoRA
that the trainer merges for sending and unmerges again, as TRL does for vLLM, so that the whole model is sent; and all weights.
Times are the least of all steps. The pause is the time from the start of publishing until the rollout process has applied it;
CPU time is that of both processes in this time. For a merged LoRA the run also counts the weights of the trainer's base that
are no longer the base's after merging and unmerging.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is an experimental argument of TRL's

import safetensors.torch
import torch
import transformers
import trl
from datasets import Dataset
from grpo_rollouts import ROWS, Rollouts, Row, load, probe
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from unmask.files import write_bytes
from unmask.integrations.trainer import SelectiveCallback
from unmask.lab.tasks.math.answers import extract, is_right
from unmask.lab.tasks.math.problems import load_problems
from unmask.sync import Folder, Publisher

# What is sent.


class SelectionSender:
    """Publishes the selection that a callback trains, through a folder."""

    def __init__(self, selective: SelectiveCallback, folder: Path) -> None:
        self._selective, self._folder = selective, folder
        self._publisher: Publisher | None = None

    def publish(self) -> int:
        """Sends the current weights and returns the message's bytes."""
        if self._publisher is None:  # the selection is made by train()
            self._publisher = Publisher(self._selective.live, Folder(self._folder))
        return self._publisher.publish().bytes


class TensorSender:
    """Writes named tensors of the trainer's model to one file: an adapter, or a whole model."""

    def __init__(self, row: Row, model: nn.Module, folder: Path) -> None:
        self._row, self._model, self._path = row, model, folder / "tensors.safetensors"
        self._base = {n: p.detach().clone() for n, p in model.named_parameters() if row.merged and not p.requires_grad}

    def publish(self) -> int:
        """Writes the file and returns the tensors' bytes."""
        row, named = self._row, self._model.named_parameters()
        tensors = self._merged() if row.merged else {n: p.detach() for n, p in named if p.requires_grad or not row.rank}
        write_bytes(self._path, safetensors.torch.save(tensors))
        return sum(tensor.nbytes for tensor in tensors.values())

    def drifted(self) -> int:
        """Counts the frozen weights that merging and unmerging have changed."""
        now = dict(self._model.named_parameters())
        return sum(int((now[name] != before).sum()) for name, before in self._base.items())

    def _merged(self) -> dict[str, Tensor]:
        """Returns the tensors of the plain model with the LoRA merged, under the plain model's names."""
        self._model.merge_adapter()
        tensors = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.detach().clone()
            for name, parameter in self._model.named_parameters()
            if "lora_" not in name
        }
        self._model.unmerge_adapter()
        return tensors


# The trainer's process.


def right(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Rewards the right answer with 1."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(is_right(extract(text, "number"), gold, "number")) for text, gold in zip(texts, answer, strict=True)]


def near(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Rewards a number with up to 0.5, by its relative distance from the answer; no number earns nothing."""
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        found, wanted = extract(completion[-1]["content"], "number"), Fraction(gold)
        distance = None if found is None else abs(Fraction(found) - wanted) / max(1, abs(wanted))
        rewards.append(0.0 if distance is None else float(1 / (2 + 2 * distance)))
    return rewards


class Syncing(TrainerCallback):
    """Sends each step's change to the rollout process, compares both sides' logits, and keeps the figures.

    Attributes:
        syncs: For each sync, the first of which is before the first step: the bytes, the seconds from the start of publishing
            to the end of applying, the CPU seconds of both processes, if the logits are equal, and their largest difference.
        served: The rollout process's logits of the probe after each sync.
    """

    def __init__(self, rollouts: Rollouts, tokenizer: Any, sender: SelectionSender | TensorSender) -> None:
        self._rollouts, self._tokenizer, self._sender = rollouts, tokenizer, sender
        self.syncs: list[dict[str, Any]] = []
        self.served: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._sync(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._sync(model)

    def _sync(self, model: nn.Module) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        size = self._sender.publish()
        theirs = self._rollouts.ask("receive")
        pause, cpu = time.perf_counter() - start, time.process_time() - cpu + theirs
        served, trained = torch.from_numpy(self._rollouts.ask("probe")), probe(model, self._tokenizer)
        same = torch.equal(served.view(torch.int32), trained.view(torch.int32))
        difference = (served - trained).abs().max().item()
        self.syncs.append({"bytes": size, "pause": pause, "cpu": cpu, "equal": same, "difference": difference})
        self.served.append(served)


def grpo(arguments: argparse.Namespace, folder: Path, model: nn.Module, **given: Any) -> GRPOTrainer:
    """Builds a GRPO trainer on the shortest problems of AddSub, which writes no checkpoints."""
    problems = sorted(load_problems("addsub", "test", arguments.data_dir), key=lambda problem: len(problem.question))
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in problems]
    settings = GRPOConfig(
        str(folder / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        num_generations=arguments.generations,
        max_completion_length=arguments.tokens,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        bf16=False,  # The weights are bfloat16 themselves, so that the trainer computes as the rollout process does.
        use_cpu=True,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list(rows[: arguments.problems])
    return GRPOTrainer(model=model, args=settings, train_dataset=data, **given)


def train(arguments: argparse.Namespace, name: str, rewards: Sequence[Any] = (right, near)) -> dict[str, Any]:
    """Makes one row's GRPO run and returns its figures."""
    row, folder = ROWS[name], Path(tempfile.mkdtemp(prefix="sync-"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    rollouts, model = Rollouts(name, arguments, folder), load(arguments.model, row.rank)
    given = {"reward_funcs": list(rewards), "rollout_func": rollouts, "processing_class": tokenizer}
    trainer = grpo(arguments, folder, model, **given)
    sender: SelectionSender | TensorSender
    if row.method is not None:
        method = row.method
        selective = SelectiveCallback(trainer, lambda steps: method(arguments.budget, steps))
        trainer.add_callback(selective)
        sender = SelectionSender(selective, folder)
    else:
        sender = TensorSender(row, model, folder)
    syncing = Syncing(rollouts, tokenizer, sender)
    trainer.add_callback(syncing)
    trainer.train()
    rollouts.stop()
    shutil.rmtree(folder)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "first": syncing.syncs[0],
        "steps": syncing.syncs[1:],
        "changed": [not torch.equal(before, after) for before, after in pairwise(syncing.served)],
        "rewards": [entry["reward"] for entry in trainer.state.log_history if "reward" in entry],
        "weights": selective.live.used if row.method else trained,
        "drifted": sender.drifted() if isinstance(sender, TensorSender) else 0,
    }


def table(arguments: argparse.Namespace, figures: dict[str, Any]) -> str:
    """Returns the table in Markdown."""
    lines = [
        "| what is trained and sent | weights | first sync, bytes | a sync, bytes | pause, ms | CPU, ms | logits of both sides |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in figures["rows"].items():
        steps = row["steps"]
        sizes = sorted(step["bytes"] for step in steps)
        size = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        equal = all(step["equal"] for step in steps)
        logits = "equal, bit for bit" if equal else f"differ by up to {max(step['difference'] for step in steps):.2g}"
        logits += f"; {row['drifted']:,} weights of the trainer's base changed" if row["drifted"] else ""
        times = " | ".join(f"{1e3 * min(step[key] for step in steps):.0f}" for key in ("pause", "cpu"))
        label = ROWS[name].label.format(budget=arguments.budget)
        lines.append(f"| {label} | {row['weights']:,} | {row['first']['bytes']:,} | {size} | {times} | {logits} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", default="runs/grpo_sync.json")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--problems", type=int, default=64, help="the shortest problems of AddSub")
    parser.add_argument("--batch-size", type=int, default=8, help="completions a step")
    parser.add_argument("--generations", type=int, default=4, help="completions for each problem")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a completion, at most")
    parser.add_argument("--budget", default="0.2%")
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {
        "device": f"{platform.machine()}, 1 thread for each process",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
        "arguments": vars(arguments) | {"model": Path(arguments.model).name, "data_dir": Path(arguments.data_dir).name},
        "rows": {name: train(arguments, name) for name in arguments.rows},
    }
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(table(arguments, figures))


if __name__ == "__main__":
    main()
