"""Checks that every kind of run, stopped and resumed, ends as the uninterrupted run does, bit for bit."""

from __future__ import annotations

import io
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optim_runs
import pytest
import torch
import trl_runs
from commands import run as command
from commands import train_words
from helpers import assert_same_tensors, batches, snapshot, train
from letters import tagger_words, tagger_world
from loop_runs import PRESETS, Begun, begin_net
from tiny import tiny_world
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from trainers import Tokens, arguments, bert, frozen_garbage, id3, selective  # noqa: F401
from transformers import Trainer

import peft
import unmask
import unmask.peft
from unmask.integrations.trainer import SelectiveCallback, SelectiveTrainer
from unmask.selection.state import read_state, write_state

State = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """The two ways of one run: without interruption, or stopped and resumed.

    Attributes:
        whole: Makes the uninterrupted run in a folder, and returns all that a resumed one must agree on.
        resumed: Makes the run again in that folder, stopped after a step and resumed.
        stops: The steps to stop after.
    """

    whole: Callable[[Path], State]
    resumed: Callable[[Path, int], State]
    stops: tuple[int, ...]


RUNS: dict[str, Run] = {}
NEEDS: dict[str, str] = {}
"""The optional library of a run. Without it, the run is skipped."""


# Loops that a user writes.


def through_torch_save(state: dict[str, Any], folder: Path) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_state_file(state: dict[str, Any], folder: Path) -> Any:
    optimizer = through_torch_save(state["optimizer"], folder)
    return {
        "selection": read_state(write_state(state["selection"], folder / "state.safetensors")),
        "optimizer": optimizer,
    }


def moments(optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's state, by the number of the parameter."""
    return {
        f"moment {i} {key}": torch.as_tensor(value).clone()
        for i, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


def loop_state(model: nn.Module, selection: unmask.Selection, optimizer: torch.optim.Optimizer) -> State:
    counts = {"step": torch.tensor(selection.step), "used": torch.tensor(selection.used)}
    indices = {f"indices of {name}": flat for name, flat in selection.indices.items()}
    return {**snapshot(model), **moments(optimizer), **indices, **counts, "values": selection.values.detach().clone()}


def loop(begin: Callable[[], Begun], data: list[Tensor], way: Any, stops: tuple[int, ...]) -> Run:
    def whole(folder: Path) -> State:
        model, selection, optimizer = begin()
        train(model, optimizer, data)
        return loop_state(model, selection, optimizer)

    def resumed(folder: Path, stop: int) -> State:
        first, selection, optimizer = begin()
        train(first, optimizer, data[:stop])
        saved = way({"selection": selection.state_dict(), "optimizer": optimizer.state_dict()}, folder)
        model, again, optimizer = begin()
        again.load_state_dict(saved["selection"])
        optimizer.load_state_dict(saved["optimizer"])
        assert_same_tensors(snapshot(first), snapshot(model))
        train(model, optimizer, data[stop:])
        return loop_state(model, again, optimizer)

    return Run(whole, resumed, stops)


for preset in PRESETS:
    for dtype in (torch.float32, torch.bfloat16):
        for way in (through_torch_save, through_state_file):
            RUNS[f"loop-{preset}-{dtype}-{way.__name__}"] = loop(
                lambda preset=preset, dtype=dtype: begin_net(preset, dtype), batches(7, dtype=dtype), way, (1, 4)
            )

for method, dtype in optim_runs.PAIRS:
    for correction in ("global", "entry"):
        RUNS[f"SelectiveAdamW-{method}-{dtype}-{correction}"] = loop(
            lambda method=method, dtype=dtype, correction=correction: optim_runs.begin(
                method, dtype, weight_decay=0.1, bias_correction=correction
            ),
            optim_runs.data(9, dtype),
            through_torch_save,
            (4,),
        )


# Trainers.


def trainer_run(build: Callable[[Path], tuple[Trainer, Callable[[], State]]], stops: tuple[int, ...]) -> Run:
    """Returns the run of a Trainer that saves a checkpoint at every step; ``build`` returns it, and a function for its state."""

    def whole(folder: Path) -> State:
        trainer, state = build(folder / "whole")
        trainer.train()
        for stop in stops:
            assert 0 < stop < trainer.state.max_steps
        return state()

    def resumed(folder: Path, stop: int) -> State:
        trainer, state = build(folder / f"resumed-{stop}")
        trainer.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{stop}"))
        return state()

    return Run(whole, resumed, stops)


def trainer_state(trainer: Trainer) -> State:
    return {
        **moments(trainer.optimizer),
        "lr": torch.tensor(trainer.lr_scheduler.get_last_lr()),
        "rng": torch.get_rng_state(),
        "steps": torch.tensor(trainer.state.global_step),
    }


def selection_state(trainer: Trainer, selection: unmask.Selection) -> State:
    assert selection.step == trainer.state.global_step
    assert {path.name for path in Path(trainer.args.output_dir).rglob("*.safetensors")} == {"selection.safetensors"}
    held = {key: value for key, value in selection.state_dict().items() if isinstance(value, Tensor)}
    return {**trainer_state(trainer), **snapshot(selection.model), **held}


EACH_STEP = {"save_strategy": "steps", "save_steps": 1}
METHODS = {
    "id3": id3(),
    "strided": id3(stride=2, schedule="cosine"),
    "repeat": unmask.repeat_d3(60),
    "pafi": unmask.pafi(60),
    "full": unmask.full(),
}


def with_callback(method: Any, model: Callable[[], nn.Module] = bert, **settings: Any) -> Any:
    def build(folder: Path) -> tuple[Trainer, Callable[[], State]]:
        trainer, callback = selective(folder, method, model(), **EACH_STEP, **settings)
        return trainer, lambda: selection_state(trainer, callback.live)

    return build


for method in METHODS:  # from the middle of an epoch and from its end, with dropout and shuffled data
    for accumulation, stops in ((1, (1, 5, 9)), (2, (1, 3, 5))):
        options = {} if method == "full" else {"options": {"dense": "classifier"}}
        RUNS[f"Trainer-{method}-{accumulation}"] = trainer_run(
            with_callback(METHODS[method], gradient_accumulation_steps=accumulation, **options), stops
        )

RUNS["Trainer-bfloat16"] = trainer_run(
    with_callback(id3(), lambda: bert().bfloat16(), bf16=True, options={"dense": "classifier"}), (3,)
)

for method in (id3(5_000), unmask.repeat_d3(5_000)):  # bitsandbytes keeps 8-bit state from 4,096 entries on
    name = f"Trainer-8-bit-{'repeat' if isinstance(method, unmask.Method) else 'id3'}"
    settings = {"optim": "adamw_bnb_8bit", "learning_rate": 1e-3}
    RUNS[name], NEEDS[name] = trainer_run(with_callback(method, lambda: bert(32), **settings), (4,)), "bitsandbytes"


def with_own_optimizer(kind: type[Trainer]) -> Any:
    def build(folder: Path) -> tuple[Trainer, Callable[[], State]]:
        model = bert()
        selection = unmask.select(model, unmask.id3(60, steps=10), dense="classifier")
        optimizer = unmask.SelectiveAdamW(selection.parameters(), lr=1e-2, bias_correction="entry")
        given = {"selection": selection} if kind is SelectiveTrainer else {}
        args = arguments(folder, **EACH_STEP)
        trainer = kind(model=model, args=args, train_dataset=Tokens(), optimizers=(optimizer, None), **given)
        if kind is Trainer:
            trainer.add_callback(SelectiveCallback(trainer, selection))
        return trainer, lambda: selection_state(trainer, selection)

    return build


for kind in (Trainer, SelectiveTrainer):
    RUNS[f"{kind.__name__}-own-optimizer"] = trainer_run(with_own_optimizer(kind), (6,))


def trl_with_callback(make: Any) -> Any:
    def build(folder: Path) -> tuple[Trainer, Callable[[], State]]:
        trainer = make(folder, trl_runs.llama(), **EACH_STEP)
        callback = SelectiveCallback(trainer, id3(trl_runs.BUDGET))
        trainer.add_callback(callback)
        return trainer, lambda: selection_state(trainer, callback.live)

    return build


def adapter_state(trainer: Trainer) -> State:
    adapter = trainer.model.base_model.deltas.active
    assert adapter.step == trainer.state.global_step
    held = {name: value for name, value in vars(adapter.slots()).items() if isinstance(value, Tensor)}
    return {**trainer_state(trainer), **snapshot(trainer.model), **held}


def with_config(
    given: dict[str, Any], model: Callable[[], nn.Module] = bert, **settings: Any
) -> Callable[[Path], tuple[Trainer, Callable[[], State]]]:
    def build(folder: Path) -> tuple[Trainer, Callable[[], State]]:
        named = {"task_type": "SEQ_CLS", "budget": 60, "target_modules": "all-linear"} | given
        wrapped = peft.get_peft_model(model(), unmask.peft.SelectiveConfig(**named))
        trainer = Trainer(wrapped, arguments(folder, **EACH_STEP, **settings), train_dataset=Tokens())
        return trainer, lambda: adapter_state(trainer)

    return build


def trl_with_config(make: Any, accumulation: int) -> Any:
    def build(folder: Path) -> tuple[Trainer, Callable[[], State]]:
        named = {"task_type": "CAUSAL_LM", "budget": trl_runs.BUDGET, "target_modules": "all-linear"}
        settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.1}
        given = unmask.peft.SelectiveConfig(**named)
        trainer = make(folder, trl_runs.llama(), peft_config=given, **EACH_STEP, **settings)
        return trainer, lambda: adapter_state(trainer)

    return build


for method in ("id3", "repeat_d3", "pafi", "random_mask"):
    for dtype in (torch.float32, torch.bfloat16):
        RUNS[f"PEFT-{method}-{dtype}"] = trainer_run(
            with_config({"method": method}, lambda dtype=dtype: bert().to(dtype), gradient_accumulation_steps=2), (1, 5)
        )

for optim in ("adamw_bnb_8bit", "sgd"):
    whole_base = {"budget": 5_000, "target_modules": None}
    RUNS[f"PEFT-{optim}"] = trainer_run(with_config(whole_base, lambda: bert(32), optim=optim, bf16=True), (6,))
NEEDS["PEFT-adamw_bnb_8bit"] = "bitsandbytes"

for make in (trl_runs.sft, trl_runs.dpo, trl_runs.grpo):
    accumulation = 1 if make is trl_runs.grpo else 2  # a resumed GRPO run with accumulation differs with LoRA too
    name = f"TRL-{make.__name__}"
    RUNS[name], NEEDS[name] = trainer_run(trl_with_callback(make), (2,)), "trl"
    RUNS[f"{name}-PEFT"], NEEDS[f"{name}-PEFT"] = trainer_run(trl_with_config(make, accumulation), (2,)), "trl"


# The command line.


def delta_state(folder: Path) -> State:
    delta = unmask.SparseDelta.load(folder / "delta.safetensors")
    parts = {
        f"{part} of {n}": getattr(entry, part) for n, entry in delta.sparse.items() for part in ("indices", "values")
    }
    return parts | {f"whole {name}": tensor for name, tensor in delta.whole.items()}


def cut_back(folder: Path, stop: int) -> None:
    """Removes what a run has written after a step."""
    (folder / "delta.safetensors").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.partition("-")[2]) > stop:
            shutil.rmtree(checkpoint)


def command_run(make: Callable[[Path], object], words: tuple[object, ...], stops: tuple[int, ...]) -> Run:
    """Returns the run of ``unmask train WORDS`` to ``run`` in a folder that ``make`` fills."""

    def whole(folder: Path) -> State:
        make(folder)
        command(*words, "--set", "keep_checkpoints=none", cwd=folder)
        return delta_state(folder / "run")

    def resumed(folder: Path, stop: int) -> State:
        cut_back(folder / "run", stop)
        assert (folder / "run" / "checkpoints" / f"checkpoint-{stop}").is_dir()
        command("train", "--config", "run/config.yaml", "--resume", cwd=folder)
        return delta_state(folder / "run")

    return Run(whole, resumed, stops)


INSIDE = {
    "lora": ("--into", "lora", "--lora-r", 4, "--lora-alpha", 8),
    "pfeiffer": ("--into", "pfeiffer", "--set", "reduction_factor=4"),
}
COMMANDS: dict[str, tuple[object, ...]] = {
    "every-8": ("--set", "save_steps=8"),  # step 16 is an epoch's last, saved before its evaluation
    "dense_lr": ("--set", "save_steps=8", "--set", "dense_lr=0.01"),
    "entry": ("--set", "save_steps=9", "--set", "bias_correction=entry"),
    **{into: (*words, "--set", "save_steps=8") for into, words in INSIDE.items()},
}
for name, more in COMMANDS.items():
    RUNS[f"unmask-train-{name}"] = command_run(
        tiny_world, train_words("run", *more), (18,) if name == "entry" else (16,)
    )
NEEDS["unmask-train-pfeiffer"] = "adapters"
RUNS["unmask-train-tags"] = command_run(tagger_world, tagger_words("run"), (16,))


# The tests.


@pytest.fixture(autouse=True)
def _accelerate_forgets_the_precision() -> Iterator[None]:
    """Resets the precision of the first Trainer, which accelerate keeps for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def rows() -> Iterator[Any]:
    """Yields the names of the runs. Warnings of the libraries are no errors; a plain loop may give no warning at all."""
    for name in RUNS:
        ours = name.startswith(("loop", "SelectiveAdamW"))
        yield pytest.param(name, marks=[] if ours else [pytest.mark.filterwarnings("default")])


@pytest.mark.parametrize("name", list(rows()))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    run = RUNS[name]
    expected = run.whole(tmp_path)
    for stop in run.stops:
        assert_same_tensors(expected, run.resumed(tmp_path, stop))


@pytest.mark.filterwarnings("default")
def test_a_run_that_ctrl_c_stops_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """Sends the signal in the middle of a step. The run saves a checkpoint and says how to go on."""
    steps = []

    def interrupt(*_: object) -> None:
        steps.append(1)
        if len(steps) == 10:
            signal.raise_signal(signal.SIGINT)

    tiny_world(tmp_path)
    command(*train_words("whole", "--set", "save_steps=8"), cwd=tmp_path)
    hook = register_optimizer_step_post_hook(interrupt)
    try:
        stopped = command(*train_words("stopped", "--set", "save_steps=8"), cwd=tmp_path, check=False)
    finally:
        hook.remove()
    assert stopped.returncode == 130
    assert "--resume" in stopped.stderr
    assert not (tmp_path / "stopped" / "delta.safetensors").exists()
    command("train", "--config", "stopped/config.yaml", "--resume", cwd=tmp_path)
    assert_same_tensors(delta_state(tmp_path / "whole"), delta_state(tmp_path / "stopped"))
