"""Compares batched generation with a plain loop, which takes one prompt at a time without padding."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_llama import byte_tokenizer, llama

from unmask.errors import ConfigError
from unmask.lab.inside import Into, insert
from unmask.lab.tasks.math.generate import GenerationSettings, generate, plan_batches

TOKENIZER = byte_tokenizer()
TEXTS = ("What is 2 and 3?", "Why?", "Sum 12, 5 and 9", "x", "How many apples are there in all?", "7 + 8 =", "No.")
PROMPTS = [list(TOKENIZER(text)["input_ids"]) for text in TEXTS]


def greedy(model, prompt, count):
    """Generates by a plain loop, which computes the whole sequence again for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return ids[len(prompt) :]


def run(model, prompts=PROMPTS, **settings):
    """Returns the generated texts in the prompts' order."""
    found = {}
    for rows, written in generate(model, TOKENIZER, prompts, GenerationSettings(**{"max_new_tokens": 12, **settings})):
        found |= dict(zip(rows, written, strict=True))
    return [found[row] for row in range(len(prompts))]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_padded_batch_gives_what_each_prompt_alone_gives(batch_size):
    model = llama(torch.float64)  # in float64 rounding changes no choice
    written = run(model, batch_size=batch_size)
    for text, prompt in zip(written, PROMPTS, strict=True):
        assert text.text == TOKENIZER.decode(greedy(model, prompt, 12), skip_special_tokens=True)
    assert len({text.text for text in written}) > 3  # the texts differ


def test_the_longest_prompts_come_first():
    assert plan_batches([3, 9, 3, 5, 9], 2) == [[1, 4], [3, 0], [2]]
    assert plan_batches([], 2) == []


def biased(model, token, by=1e4):
    """Makes a model write always the same token, and returns it."""
    model.lm_head.register_forward_hook(
        lambda _, __, logits: logits.index_add(
            -1, torch.tensor([token]), torch.full((*logits.shape[:-1], 1), by).to(logits)
        )
    )
    return model


def test_an_end_token_ends_a_row():
    written = run(biased(llama(), TOKENIZER.eos_token_id))
    assert [(text.text, text.tokens, text.finish) for text in written] == [("", 1, "end")] * len(PROMPTS)


def test_a_row_that_does_not_end_is_cut_at_max_new_tokens():
    written = run(biased(llama(), TOKENIZER("a", add_special_tokens=False)["input_ids"][0]), max_new_tokens=5)
    assert {(text.text, text.tokens, text.finish) for text in written} == {("aaaaa", 5, "length")}


def test_a_row_stops_at_a_text_and_the_others_go_on():
    model = llama(torch.float64)
    whole = run(model, stop=())
    stop = whole[0].text[3:6]
    stopped = run(model, stop=(stop,))
    assert (stopped[0].text, stopped[0].finish) == (whole[0].text[: whole[0].text.find(stop)], "stop")
    assert stopped[0].tokens < 12
    for before, after in zip(whole, stopped, strict=True):
        assert after.text == before.text.split(stop)[0]
    assert any(text.finish != "stop" for text in stopped)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone():
    model, state = llama(), torch.get_rng_state()
    first = run(model, temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert run(model, temperature=2.0) == first
    assert run(model, temperature=2.0, seed=1) != first
    assert run(model) != first


def test_beam_search_equals_that_of_transformers():
    model = llama(torch.float64)
    written = run(model, PROMPTS[:1], num_beams=4, stop=())
    own = model.generate(torch.tensor(PROMPTS[:1]), num_beams=4, max_new_tokens=12, do_sample=False)
    assert written[0].text == TOKENIZER.decode(own[0, len(PROMPTS[0]) :], skip_special_tokens=True)
    assert written != run(model, PROMPTS[:1], stop=())


def test_generation_leaves_the_model_as_it_was():
    model = llama().train()
    own = model.generation_config
    own.repetition_penalty = 50.0  # a checkpoint's own settings have no effect
    written = run(model)
    assert model.training
    assert model.generation_config is own
    assert written == run(llama())


def test_generation_uses_a_lora_in_the_model():
    plain = run(llama())
    tuned = insert(llama(), Into("lora", targets=("q_proj", "v_proj")), [], seed=0).model
    assert run(tuned) == plain  # a new LoRA changes nothing
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if "lora_B" in name:
                tensor.fill_(0.5)
    assert run(tuned) != plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0; it must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GenerationSettings(**settings)


def test_prompts_beyond_the_models_positions_are_refused():
    with pytest.raises(
        ConfigError, match=r"of 34 tokens and max_new_tokens = 12 exceed the 40 positions .* to 6 or less"
    ):
        run(llama(positions=40))


def test_a_tokenizer_without_padding_borrows_the_end_token():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model = llama(torch.float64)
    settings = GenerationSettings(max_new_tokens=12, batch_size=7)
    ((rows, written),) = generate(model, tokenizer, PROMPTS, settings)
    assert written == [run(model)[row] for row in rows]


CHECKPOINT = os.environ.get("UNMASK_TEST_CAUSAL_LM")


@pytest.mark.slow
@pytest.mark.skipif(not CHECKPOINT, reason="UNMASK_TEST_CAUSAL_LM names no folder of a real causal LM")
def test_a_real_model_solves_in_batches_as_alone():
    from unmask.lab.models import load_base
    from unmask.lab.tasks.math.problems import Problem
    from unmask.lab.tasks.math.prompts import Prompter

    model, tokenizer, missing = load_base(CHECKPOINT, None, 0, "generation")
    assert missing == []
    for prompt in ("alpaca", "chat") if tokenizer.chat_template else ("alpaca",):
        prompter = Prompter(tokenizer, prompt)
        ids = [prompter.prompt_ids(Problem(text, "", "", "5", "number")) for text in TEXTS]
        assert all(one.count(tokenizer.bos_token_id) <= 1 or prompt == "chat" for one in ids)
        settings = {"max_new_tokens": 24, "stop": ()}
        together, alone = ({}, {})
        for found, size in ((together, 7), (alone, 1)):
            for rows, written in generate(model, tokenizer, ids, GenerationSettings(batch_size=size, **settings)):
                found |= dict(zip(rows, written, strict=True))
        assert together == alone
