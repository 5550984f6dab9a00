"""Several processes on the engines that users have: torchrun, accelerate, transformers' Trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import unmask
from torchrun import torchrun
from unmask import SelectionError, SparseDelta
from unmask.integrations.transformers import SelectiveTrainer
from unmask.state_file import read_state

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"


def snippet(number: int) -> str:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number]


def same_selection(left: Path, right: Path) -> None:
    a, b = SparseDelta.load(left).sparse, SparseDelta.load(right).sparse
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].indices.equal(b[name].indices), name
        torch.testing.assert_close(a[name].values, b[name].values)


def test_the_pages_script_dies_and_goes_on_with_another_number_of_processes(tmp_path):
    """Whole runs with one and with two processes; and one of two, one of which dies, that four resume."""
    whole = "import torch\ntorch.manual_seed(0)\n" + snippet(0).replace('exchange="candidates"', 'exchange="exact"')
    dying = whole.replace(
        "    optimizer.step()\n", "    optimizer.step()\n    if step == 4 and rank == 1: os._exit(1)\n"
    )
    assert dying != whole
    for name, count in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.py").write_text(whole)
        torchrun(count, tmp_path / name / "run.py")
    same_selection(tmp_path / "one" / "delta.safetensors", tmp_path / "two" / "delta.safetensors")
    (tmp_path / "dead").mkdir()
    (tmp_path / "dead" / "run.py").write_text(dying)
    torchrun(2, tmp_path / "dead" / "run.py", fails=True)
    assert not (tmp_path / "dead" / "delta.safetensors").exists()
    assert 1 <= torch.load(tmp_path / "dead" / "checkpoint.pt")["selection"]["step"] <= 5
    (tmp_path / "dead" / "run.py").write_text(whole)
    torchrun(4, tmp_path / "dead" / "run.py")
    same_selection(tmp_path / "one" / "delta.safetensors", tmp_path / "dead" / "delta.safetensors")


ACCELERATE = """
import torch, unmask
from accelerate import Accelerator
from torch.utils.data import DataLoader
torch.manual_seed(0)
data = torch.randn(32, 6)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
loader = DataLoader(data, batch_size=8 // int(__import__("os").environ["WORLD_SIZE"]))
{page}
loader_steps = 0
for epoch in range(4):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            accelerator.clip_grad_norm_(selection.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    selection.delta().save("delta.safetensors")
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_pages_accelerate_lines_make_the_run_of_one_process(accumulation, tmp_path):
    page = snippet(1).replace("Accelerator()", f"Accelerator(cpu=True, gradient_accumulation_steps={accumulation})")
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        (tmp_path / str(count) / "run.py").write_text(ACCELERATE.format(page=page))
        torchrun(count, tmp_path / str(count) / "run.py")
    same_selection(tmp_path / "1" / "delta.safetensors", tmp_path / "2" / "delta.safetensors")


TRAINER = """
import os, sys, torch, unmask
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments
from unmask.integrations.transformers import SelectiveTrainer

early, dies = sys.argv[1] == "early", sys.argv[2] == "dies"
count, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
torch.manual_seed(rank if not early else 0)  # selected after the process group is made: rank 0's weights are everybody's
config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.4)
model = BertForSequenceClassification(config)
make = lambda: unmask.select(model, unmask.id3(200, steps=12, stride=2), dense="classifier")
selection = make() if early else None
generator = torch.Generator().manual_seed(3)
data = [{"input_ids": torch.randint(0, 30, (7,), generator=generator), "labels": i % 2} for i in range(96)]
arguments = TrainingArguments(
    "out", use_cpu=True, max_steps=12, per_device_train_batch_size=8 // count, gradient_accumulation_steps=2, save_steps=4,
    learning_rate=1e-2, report_to="none", disable_tqdm=True, seed=5, max_grad_norm=1.0, lr_scheduler_type="constant")
selection = selection or make()

class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if dies and state.global_step == 6 and rank == count - 1:
            os._exit(1)

optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
trainer = SelectiveTrainer(model=model, selection=selection, args=arguments, train_dataset=data, optimizers=(optimizer, None),
                           callbacks=[Dies()])
trainer.train(resume_from_checkpoint=Path("out").is_dir() and any(Path("out").glob("checkpoint-*")))
assert trainer.state.global_step == selection.step == 12
if rank == 0:
    selection.delta().save("delta.safetensors")
"""


def test_the_trainer_selects_as_one_process_and_goes_on_after_a_death(tmp_path):
    for name in ("one", "two", "dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.py").write_text(TRAINER)
    torchrun(1, tmp_path / "one" / "run.py", "late", "lives")
    torchrun(2, tmp_path / "two" / "run.py", "early", "lives")
    same_selection(tmp_path / "one" / "delta.safetensors", tmp_path / "two" / "delta.safetensors")
    torchrun(2, tmp_path / "dead" / "run.py", "late", "dies", fails=True)
    assert read_state(tmp_path / "dead" / "out" / "checkpoint-4" / "selection.safetensors")["step"] == 4
    torchrun(4, tmp_path / "dead" / "run.py", "late", "lives")
    same_selection(tmp_path / "one" / "delta.safetensors", tmp_path / "dead" / "delta.safetensors")
