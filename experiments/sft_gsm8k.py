"""Trains on GSM8K with TRL's SFTTrainer, ID3 in the base and in a LoRA of rank 32, for the table of docs/results.md.

    python experiments/sft_gsm8k.py --model SMOLLM2_FOLDER --data-dir GSM8K_FOLDER [--where base lora] [--steps 200]

GSM8K_FOLDER holds train.jsonl and test.jsonl ({"question", "answer"}). Each row is run twice: straight to the end, with a
checkpoint in the middle; and in a fresh process that starts from that checkpoint. The two must end with the same delta, bit for
bit. With --kill the first run is killed once that checkpoint is written: two thirds of the time, and nothing to compare with. The
answer loss is the mean cross-entropy of the answers' tokens, in float32, over the first test items, before and after.
Finished runs are kept in --output and skipped, so the command can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import unmask
from peft import LoraConfig, get_peft_model
from unmask.integrations.trainer import STATE_FILE, SelectiveCallback

RUNS = ("straight", "resumed")
LENGTH = 384


def examples(file: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Returns GSM8K's lines as conversations; the calculator marks of the answers (<<48/2=24>>) stay in."""
    lines = file.read_text(encoding="utf-8").splitlines()[:count]
    return [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in map(json.loads, lines)
    ]


@torch.no_grad()
def answer_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Computes the mean cross-entropy per token of the answers, given their questions."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        text = {"tokenize": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **text)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **text)[:LENGTH]
        ids = torch.tensor([whole])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(whole) - len(prompt)
    model.train(training)
    return total / count


def run(arguments: argparse.Namespace, where: str, name: str, output: Path) -> dict[str, Any]:
    """Makes one training run; a resumed run starts from the middle checkpoint of the straight one."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    weights = sum(p.numel() for p in model.parameters())
    if where == "lora":
        settings = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, settings)
    held_out = examples(Path(arguments.data_dir, "test.jsonl"), arguments.items)
    config = SFTConfig(
        str(output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        lr_scheduler_type="linear",
        warmup_steps=arguments.steps // 16,
        max_length=LENGTH,
        bf16=True,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        save_steps=arguments.steps // 2,
        logging_steps=10,
        seed=arguments.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list(examples(Path(arguments.data_dir, "train.jsonl")))
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
    include = {"include": "lora_"} if where == "lora" else {}
    callback = SelectiveCallback(
        trainer,
        lambda steps: unmask.id3(arguments.budget, steps, exp=0.0, stride=arguments.stride),
        **include,
    )
    trainer.add_callback(callback)
    killed = arguments.kill and name == "straight"
    before = None if killed else answer_loss(model, tokenizer, held_out)
    middle = output.parent / "straight" / f"checkpoint-{arguments.steps // 2}"
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(middle) if name == "resumed" else None)
    seconds = time.perf_counter() - start
    selection = callback.live
    delta = selection.delta(arguments.model).save(output / "delta.safetensors")
    checkpoint = output / f"checkpoint-{arguments.steps}"
    return {
        "budget": selection.budget,
        "used": selection.used,
        "weights": weights,
        "loss before": before,
        "loss after": answer_loss(model, tokenizer, held_out),
        "seconds per step": seconds / (arguments.steps // (2 if name == "resumed" else 1)),
        "delta bytes": delta.stat().st_size,
        "checkpoint bytes": sum(file.stat().st_size for file in checkpoint.iterdir()),
        "state bytes": (checkpoint / STATE_FILE).stat().st_size,
    }


def run_apart(arguments: argparse.Namespace, where: str, name: str) -> None:
    """Makes a run in a separate process, unless it is done; with --kill a signal ends the straight run in its middle."""
    output = Path(arguments.output, where, name)
    output.mkdir(parents=True, exist_ok=True)
    if (output / "result.json").is_file():
        return
    middle = output / f"checkpoint-{arguments.steps // 2}" / "trainer_state.json"
    kill = arguments.kill and name == "straight"
    if kill and middle.is_file():
        return
    process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--only", f"{where}/{name}"])
    while kill and not middle.is_file() and process.poll() is None:
        time.sleep(1)
    if kill and process.poll() is None:
        time.sleep(5)
        process.kill()
        process.wait()
    elif process.wait():
        raise SystemExit(f"{where}/{name} ended with status {process.returncode}")


def same_delta(folder: Path) -> str:
    """Returns True if both runs ended with the same indices and the same values, bit for bit."""
    if not (folder / "straight" / "delta.safetensors").is_file():
        return "killed in the middle, resumed"
    one, other = (unmask.SparseDelta.load(folder / name / "delta.safetensors") for name in RUNS)
    same = one.sparse.keys() == other.sparse.keys() and all(
        torch.equal(one.sparse[name].indices, other.sparse[name].indices)
        and torch.equal(one.sparse[name].values, other.sparse[name].values)
        for name in one.sparse
    )
    return "the same delta, bit for bit" if same else "ANOTHER DELTA"


def table(arguments: argparse.Namespace) -> str:
    lines = [
        "| ID3 in | weights trained | answer loss before | after | delta, bytes | checkpoint, bytes | resumed run |",
        "|---|---|---|---|---|---|---|",
    ]
    for where in arguments.where:
        folder = Path(arguments.output, where)
        done = json.loads((folder / "resumed" / "result.json").read_text())
        lines.append(
            f"| {where} | {done['used']:,} | {done['loss before']:.4f} | {done['loss after']:.4f} | "
            f"{done['delta bytes']:,} | {done['checkpoint bytes']:,} | {same_delta(folder)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--where", nargs="+", default=["base", "lora"], choices=["base", "lora"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--budget", default="0.2%", help="of all the model's weights, the LoRA's included")
    parser.add_argument("--stride", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--items", type=int, default=200, help="test items of the answer loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # The separate process makes this run, WHERE/RUN.
    arguments = parser.parse_args()
    if arguments.only:
        where, name = arguments.only.split("/")
        output = Path(arguments.output, where, name)
        output.joinpath("result.json").write_text(json.dumps(run(arguments, where, name, output), indent=2) + "\n")
        return
    for where in arguments.where:
        for name in RUNS:
            run_apart(arguments, where, name)
    print(table(arguments))


if __name__ == "__main__":
    main()
