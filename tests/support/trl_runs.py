"""Makes a tiny Llama, tokenizer and data, and TRL's trainers on them."""

from __future__ import annotations

import torch
from models import llama_writer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", "[EOS]", "the", "a", "film", "plot", "is", "was", "very", "good", "fine", "dull", "cold")
BUDGET = 60


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


def llama(dropout: float = 0.1) -> LlamaForCausalLM:
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    return llama_writer(len(WORDS), num_key_value_heads=1, attention_dropout=dropout, **tokens)


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


def sft(folder, model, peft_config=None, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings(folder, max_length=16, **changes))
    data = Dataset.from_dict({"text": sentences()})
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config)


def dpo(folder, model, peft_config=None, **changes):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**settings(folder, max_length=16, **changes))
    prompts = sentences(8)
    rows = {"prompt": prompts, "chosen": [" good fine"] * 8, "rejected": [" dull cold"] * 8}
    return DPOTrainer(
        model=model,
        ref_model=llama() if peft_config is None and type(model) is LlamaForCausalLM else None,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def grpo(folder, model, peft_config=None, **changes):
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
        peft_config=peft_config,
    )
