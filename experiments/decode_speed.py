"""Measures the speed of greedy decoding with transformers, with a change merged and with a LoRA that is not, for docs/serving.md.

    python experiments/decode_speed.py --model SMOLLM2_FOLDER [--repeats 5] [--output runs/decode_speed.json]

A delta, or a merged LoRA, leaves a model of the same shape, so the plain model stands for both. The LoRAs are on all linear
layers, in the model's dtype, bfloat16. The speed is in tokens per CPU second of one thread, by the fastest of the repeats. The
models take turns, so that a busy machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft
from peft import LoraConfig, get_peft_model

TEXT = "Tim has 44 books. Sam has 52 books. How many books do they have together?"
BATCHES = (1, 16)


def models(folder: str) -> dict[str, Any]:
    """Loads the plain model, and one with a LoRA for each rank."""
    loaded: dict[str, Any] = {
        "merged: a delta, or a merged LoRA": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    }
    for rank in (1, 32):
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        lora = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear", init_lora_weights=False)
        loaded[f"LoRA r={rank}, not merged"] = get_peft_model(plain, lora, autocast_adapter_dtype=False)
    return {name: model.eval() for name, model in loaded.items()}


def speeds(arguments: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Measures tokens per CPU second, by model and batch size."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    loaded, length = models(arguments.model), arguments.tokens
    settings = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    fastest: dict[str, dict[int, float]] = {name: dict.fromkeys(BATCHES, 0.0) for name in loaded}
    for size in BATCHES:
        batch = tokenizer([TEXT] * size, return_tensors="pt")
        for _ in range(arguments.repeats):
            for name, model in loaded.items():
                start = time.process_time()
                model.generate(**batch, **settings, pad_token_id=tokenizer.eos_token_id)
                speed = size * length / (time.process_time() - start)
                fastest[name][size] = max(fastest[name][size], speed)
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="runs/decode_speed.json")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fastest = speeds(arguments)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    figures = {
        "device": platform.machine(),
        "versions": versions,
        "arguments": vars(arguments) | {"model": Path(arguments.model).name},
        "tokens per second": fastest,
    }
    Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("| served as | tokens/s, one prompt | tokens/s, 16 prompts |", "|---|---:|---:|", sep="\n")
    for name, by_size in fastest.items():
        print(f"| {name} | {by_size[1]:.1f} | {by_size[16]:.1f} |")


if __name__ == "__main__":
    main()
