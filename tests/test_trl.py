"""TRL's trainers on a selection, without peft."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import unmask
from helpers import assert_same_tensors, assert_unselected_is_base, snapshot
from trainers import frozen_garbage, id3  # noqa: F401
from unmask.integrations.transformers import SelectiveCallback

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

WORDS = ("[PAD]", "[UNK]", "[EOS]", "the", "a", "film", "plot", "is", "was", "very", "good", "fine", "dull", "cold")
BUDGET = 60


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


def settings(folder, **changes):
    common = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return common | changes


def sentences(count=16):
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(3, len(WORDS), (count, 8), generator=draw).tolist()
    return [" ".join(WORDS[i] for i in row) for row in rows]


def sft(folder, model, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings(folder, max_length=16, **changes))
    data = Dataset.from_dict({"text": sentences()})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())


def dpo(folder, model, **changes):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**settings(folder, max_length=16, **changes))
    prompts = sentences(8)
    rows = {"prompt": prompts, "chosen": [" good fine"] * 8, "rejected": [" dull cold"] * 8}
    return DPOTrainer(
        model=model,
        ref_model=llama(),
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
    )


def grpo(folder, model, **changes):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def good_words(completions, **kwargs):
        return [float(text.split().count("good") + len(text) % 3) for text in completions]

    args = GRPOConfig(**settings(folder, num_generations=2, max_completion_length=6, temperature=1.0, **changes))
    return GRPOTrainer(
        model=model,
        reward_funcs=good_words,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": sentences(8)}),
        processing_class=tokenizer(),
    )


def seated(trainer, method=None, **options):
    callback = SelectiveCallback(trainer, method or id3(BUDGET), **options)
    trainer.add_callback(callback)
    return callback


@pytest.mark.parametrize("build", [sft, dpo, grpo])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_exactly_the_budget_moves_and_the_rest_is_bitwise_the_base(build, accumulation, tmp_path):
    model = llama()
    base = snapshot(model)
    trainer = build(tmp_path, model, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
    callback = seated(trainer)
    trainer.train()
    selection = callback.live
    assert (selection.used, selection.step, trainer.state.global_step) == (BUDGET, 4, 4)
    assert_unselected_is_base(model, base, selection)
    assert sum(int((base[name] != now).sum()) for name, now in named(model).items()) == BUDGET
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


def named(model):
    """Each tensor once, though the model may tie some."""
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("build", [sft, dpo, grpo])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(build, tmp_path):
    results = []
    for name, stop in (("straight", None), ("resumed", 2)):
        model = llama()
        trainer = build(tmp_path / name, model, save_strategy="steps", save_steps=1)
        callback = seated(trainer)
        checkpoint = None if stop is None else str(tmp_path / "straight" / f"checkpoint-{stop}")
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(snapshot(model) | {"values": callback.live.values.detach(), "rng": torch.get_rng_state()})
    assert_same_tensors(*results)
    weights = [path for path in (tmp_path / "straight").rglob("*.safetensors") if path.name != "selection.safetensors"]
    assert not weights


def test_dense_tensors_and_clipping_by_the_whole_norm_and_the_delta(tmp_path):
    model = llama()
    base = snapshot(model)
    trainer = sft(tmp_path, model, max_grad_norm=0.01, gradient_accumulation_steps=2)
    callback = seated(trainer, dense=r"^model\.norm", clip_scope="all", accumulation="exact")
    trainer.train()
    trained = {"model.norm.weight": snapshot(model)["model.norm.weight"]}
    assert not torch.equal(trained["model.norm.weight"], base["model.norm.weight"])
    assert_unselected_is_base(model, base | trained, callback.live)
    delta = callback.live.delta()
    callback.live.release()
    fresh = llama()
    delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))


def test_grpo_generates_with_the_weights_that_are_being_trained(tmp_path):
    """What it generates in step 2 depends on what step 1 changed."""
    completions = []
    for lr in (0.0, 0.5):
        trainer = grpo(tmp_path, llama(), learning_rate=lr, max_steps=2, lr_scheduler_type="constant")
        kept = []
        reward = trainer.reward_funcs[0]
        trainer.reward_funcs[0] = lambda completions, reward=reward, kept=kept, **k: (
            kept.append(completions) or reward(completions, **k)
        )
        seated(trainer, unmask.id3(400, steps=2))
        trainer.train()
        completions.append(kept)
    assert completions[0][0] == completions[1][0]
    assert completions[0][1] != completions[1][1]
