"""Makes a tiny random Llama with a tokenizer of bytes, on disk, and made-up word problems in the published formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from models import llama_writer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(begin: bool = True) -> PreTrainedTokenizerFast:
    """Makes every byte a token, so any text survives a round trip; `begin` puts <s> before it, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    model = Tokenizer(BPE(vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if begin:
        model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def llama(dtype: torch.dtype = torch.float32, positions: int = 512) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": positions}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return llama_writer(len(byte_tokenizer()), **sizes, **tokens).to(dtype).eval()


def save_llama(folder: Path) -> Path:
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def addition(count: int, answer: int | None = None, shift: int = 0) -> list[dict[str, str]]:
    """Returns rows of LLM-Adapters' format; with an answer, all have it."""
    rows = []
    for i in range(count):
        left, right = i + shift, 3 * i + 1
        total = left + right if answer is None else answer
        rows.append(
            {
                "instruction": f"What is {left} and {right}?" + " Well?" * (i % 3),
                "input": "",
                "output": f"The answer is {total}.",
                "answer": f"{total}.0",
            }
        )
    return rows


def math_folder(root: Path, train: int = 40, test: int = 10, answer: int | None = None) -> Path:
    """Writes gsm8k (jsonl), math_10k.json, and test sets, in their published formats."""
    for name in ("SVAMP", "MultiArith", "gsm8k"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "math_10k.json").write_text(json.dumps(addition(train, answer)), encoding="utf-8")
    (root / "SVAMP" / "test.json").write_text(json.dumps(addition(test, answer, 100)), encoding="utf-8")
    (root / "MultiArith" / "test.json").write_text(json.dumps(addition(test, answer, 200)), encoding="utf-8")
    for split, rows in (("train", addition(train, answer)), ("test", addition(test, answer, 300))):
        lines = [
            json.dumps({"question": row["instruction"], "answer": f"So <<1+1=2>>it is.\n#### {row['answer'][:-2]}"})
            for row in rows
        ]
        (root / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
