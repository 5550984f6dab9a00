"""Holds the rollout process of `grpo_sync.py`: a copy of the model that receives what the trainer sends, and generates.

The trainer's process holds a `Rollouts`, which asks for completions, for the receipt of a sync, and for logits.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import unmask
from peft import LoraConfig, get_peft_model
from unmask.sync import Folder, Receiver

PROBE = "Tim has 44 books. Sam has 52 books. How many books do they have together?"
"""The text whose logits both processes compute after each sync."""
TIMEOUT = 600.0
"""The seconds that the rollout process waits for a message, and the trainer for an answer, at most."""


@dataclass(frozen=True)
class Row:
    """A way to train, and to bring the result to the rollout process.

    Attributes:
        label: The row's first column.
        method: A function from the budget and the number of steps to the method of a selection; None without a selection.
        rank: The rank of a LoRA; 0 without one.
        merged: True if the LoRA is merged for the rollout process, which then holds an ordinary model.
    """

    label: str
    method: Callable[[str, int], unmask.Method] | None = None
    rank: int = 0
    merged: bool = False


ROWS = {
    "random_mask": Row("unmask, random mask of {budget}", lambda budget, steps: unmask.random_mask(budget)),
    "id3": Row("unmask, ID3, growing to {budget}", lambda budget, steps: unmask.id3(budget, steps)),
    "lora_1": Row("LoRA r=1, adapter", rank=1),
    "lora_32": Row("LoRA r=32, adapter", rank=32),
    "lora_32_merged": Row("LoRA r=32, merged: whole model", rank=32, merged=True),
    "whole": Row("all weights: whole model"),
}


def load(folder: str, rank: int = 0) -> nn.Module:
    """Loads the model in bfloat16, with a LoRA on all linear layers if a rank is given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if not rank:
        return model
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


@torch.no_grad()
def probe(model: nn.Module, tokenizer: Any) -> Tensor:
    """Computes the logits of the probe, as float32, in evaluation mode."""
    training = model.training
    model.eval()
    logits = model(**tokenizer(PROBE, return_tensors="pt"), use_cache=False).logits.float()
    model.train(training)
    return logits


class TensorReceiver:
    """Copies the tensors of a `TensorSender`'s file into the rollout process's model."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self._parameters, self._path = dict(model.named_parameters()), folder / "tensors.safetensors"

    @torch.no_grad()
    def receive(self, timeout: float) -> None:
        for name, tensor in safetensors.torch.load_file(self._path).items():
            self._parameters[name].copy_(tensor)


def serve(connection: Connection, name: str, model_folder: str, sync_folder: Path) -> None:
    """Answers requests until the trainer says "stop": it generates, receives what was sent, or computes the probe's logits."""
    torch.set_num_threads(1)
    row, tokenizer = ROWS[name], AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = load(model_folder, 0 if row.merged else row.rank).eval()
    receiver: Any = Receiver(model, Folder(sync_folder)) if row.method else TensorReceiver(model, sync_folder)
    connection.send("ready")
    while (request := connection.recv())[0] != "stop":
        match request:
            case "generate", prompts, tokens, seed:
                connection.send(generate(model, tokenizer, prompts, tokens, seed))
            case ("receive",):
                start = time.process_time()
                receiver.receive(TIMEOUT)
                connection.send(time.process_time() - start)
            case ("probe",):
                connection.send(probe(model, tokenizer).numpy())


def generate(
    model: nn.Module, tokenizer: Any, prompts: list[str], tokens: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Samples one completion for each prompt; returns the ids of the prompts and of the completions, each up to its end."""
    torch.manual_seed(seed)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}
    written = model.generate(**batch, **settings, pad_token_id=tokenizer.pad_token_id)
    completions = []
    for ids in written[:, batch["input_ids"].shape[1] :].tolist():
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        completions.append(ids[:end])
    asked = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return asked, completions


class Rollouts:
    """The trainer's end of the rollout process: its answers, and the completions that TRL's GRPO asks for."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, arguments.model, folder), daemon=True)
        self._process.start()
        theirs.close()  # So `recv` raises EOFError if the rollout process dies.
        self._tokens = arguments.tokens
        assert self._answer() == "ready"

    def ask(self, *request: Any) -> Any:
        """Returns the rollout process's answer."""
        self._connection.send(request)
        return self._answer()

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generates one completion for each prompt; TRL repeats a prompt for each completion that it wants."""
        template = {"tokenize": False, "add_generation_prompt": True}
        texts = trainer.processing_class.apply_chat_template(prompts, **template)
        asked, completions = self.ask("generate", texts, self._tokens, trainer.state.global_step)
        return {"prompt_ids": asked, "completion_ids": completions, "logprobs": None}

    def stop(self) -> None:
        self._connection.send(("stop",))
        self._process.join(TIMEOUT)

    def _answer(self) -> Any:
        if not self._connection.poll(TIMEOUT):
            raise TimeoutError(f"the rollout process gave no answer within {TIMEOUT:.0f} s.")
        return self._connection.recv()
