"""Holds the functions that the processes of the engines' tests run: a page's script, accelerate, and the Trainer."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from models import bert_classifier
from pages import blocks
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import unmask
from unmask import SelectionError
from unmask.integrations.trainer import SelectiveTrainer


def snippet(number: int) -> str:
    """Returns a Python block of docs/distributed.md."""
    return blocks("distributed.md", "python")[number]


def script(folder: str, code: str) -> None:
    """Runs a script in a folder."""
    os.chdir(folder)
    torch.manual_seed(0)
    exec(compile(code, "page.py", "exec"), {"__name__": "__main__"})


def accelerated(folder: str, accumulation: int) -> None:
    """Runs the page's lines, and a loop over them."""
    os.chdir(folder)
    torch.manual_seed(0)
    data = torch.randn(32, 6)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    loader = DataLoader(data, batch_size=8 // int(os.environ["WORLD_SIZE"]))
    known: dict[str, Any] = {
        "Accelerator": lambda: Accelerator(cpu=True, gradient_accumulation_steps=accumulation),
        "torch": torch,
        "unmask": unmask,
        "model": model,
        "loader": loader,
    }
    exec(snippet(1), known)
    accelerator, model, selection = known["accelerator"], known["model"], known["selection"]
    for _ in range(4):
        for batch in known["loader"]:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                accelerator.clip_grad_norm_(selection.parameters(), 1.0)
                known["optimizer"].step()
                known["optimizer"].zero_grad()
    if accelerator.is_main_process:
        selection.delta().save("delta.safetensors")


def refused(folder: str) -> str:
    """Returns the error of ``SelectiveTrainer`` for FSDP in the arguments."""
    model = bert_classifier(30, max_position_embeddings=512)
    settings = TrainingArguments(folder, use_cpu=True, fsdp=True, fsdp_config={"version": 2}, report_to="none")
    selection = unmask.select(model, unmask.id3(20, steps=2))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    try:
        SelectiveTrainer(
            model=model, selection=selection, args=settings, train_dataset=[1], optimizers=(optimizer, None)
        )
    except SelectionError as error:
        return str(error)
    return "nothing"


class _Dies(TrainerCallback):
    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6 and os.environ["RANK"] == "1":
            os._exit(1)


def trainer(folder: str, early: bool = False, dies: bool = False, resume: bool = False, **arguments: Any) -> None:
    """Trains a tiny BERT with a head for 12 steps.

    Args:
        folder: The folder of the run.
        early: True selects before the process group is made, from the same weights; False from other ones in each process.
        dies: True makes process 1 die at step 6.
        resume: True goes on from the last checkpoint.
        **arguments: Further ``TrainingArguments``.
    """
    os.chdir(folder)
    count, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    settings = TrainingArguments("out", use_cpu=True) if not early else None
    model = bert_classifier(30, seed=0 if early else rank, max_position_embeddings=512)
    selection = unmask.select(model, unmask.id3(200, steps=12, stride=2), dense="classifier")
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(0, 30, (7,), generator=generator), "labels": i % 2} for i in range(96)]
    settings = TrainingArguments(
        "out", use_cpu=True, max_steps=12, per_device_train_batch_size=8 // count, gradient_accumulation_steps=2,
        save_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, seed=5,
        **arguments,
    )  # fmt: skip
    runner = SelectiveTrainer(
        model=model,
        selection=selection,
        args=settings,
        train_dataset=data,
        optimizers=(torch.optim.AdamW(selection.parameters(), lr=1e-2), None),
        callbacks=[_Dies()] if dies else [],
    )
    runner.train(resume_from_checkpoint=resume)
    assert runner.state.global_step == selection.step == 12
    if rank == 0:
        selection.delta().save("delta.safetensors")


def config_alone(folder: str, head: bool = True, resume: bool = False) -> None:
    """Trains a PEFT model for 12 steps in an ordinary Trainer, which wraps it in DDP if there is a head to reduce."""
    import peft
    import unmask.peft

    os.chdir(folder)
    base = bert_classifier(30, max_position_embeddings=512)
    given = unmask.peft.SelectiveConfig(
        task_type="SEQ_CLS" if head else None, budget=200, stride=2, target_modules=["query", "dense"]
    )
    model = peft.get_peft_model(base, given)
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(0, 30, (7,), generator=generator), "labels": i % 2} for i in range(96)]
    count = int(os.environ["WORLD_SIZE"])
    settings = TrainingArguments(
        "out", use_cpu=True, max_steps=12, per_device_train_batch_size=8 // count, gradient_accumulation_steps=2,
        save_steps=4, learning_rate=1e-2, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, seed=5,
        average_tokens_across_devices=False,  # it would multiply the loss, which counts no tokens, by the processes
    )  # fmt: skip
    runner = Trainer(model=model, args=settings, train_dataset=data)
    runner.train(resume_from_checkpoint="out/checkpoint-4" if resume else None)
    assert model.base_model.deltas.active.step == runner.state.global_step == 12
    if int(os.environ["RANK"]) == 0:
        unmask.peft.delta(model).save("delta.safetensors")
