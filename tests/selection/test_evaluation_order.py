"""Tests that each model is evaluated once, along or after a run, and that texts are tokenized when they are asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from letters import letters_tokenizer
from torch.utils.data import DataLoader

from unmask.lab.tasks.split import evaluate_splits
from unmask.lab.tasks.text.run import Encoded
from unmask.lab.tasks.text.spec import Examples


class OneTrainer:
    """The part of a Trainer that `evaluate_splits` needs; it counts its computations."""

    def __init__(self, *logged: dict[str, float]) -> None:
        self.state = SimpleNamespace(log_history=list(logged), global_step=20)
        self.compute_metrics = "along"
        self.computed = 0

    def predict(self, examples, metric_key_prefix):
        self.computed += 1
        return SimpleNamespace(predictions=np.ones(2), label_ids=np.ones(2), metrics={f"{metric_key_prefix}_loss": 0.5})


def evaluated(trainer, stage, splits=("",)):
    def metrics(split, predictions, labels):
        return {"f1": 0.25}

    return evaluate_splits(trainer, {split: ["example"] for split in splits}, metrics, ("f1",), stage)


LAST = {"step": 20, "eval_f1": 0.75, "eval_loss": 0.125, "eval_runtime": 3.0}


def test_what_the_last_step_found_is_not_computed_again():
    trainer = OneTrainer({"step": 10, "eval_f1": 0.1, "eval_loss": 0.9}, LAST, {"step": 20, "train_loss": 0.3})
    assert evaluated(trainer, "after") == {"f1": 0.75, "loss": 0.125}
    assert trainer.computed == 0
    assert trainer.compute_metrics == "along"


@pytest.mark.parametrize(
    ("logged", "stage"),
    [
        ((), "after"),
        (({**LAST, "step": 10},), "after"),  # the model was trained further since
        (({"step": 20, "eval_loss": 0.125},), "after"),  # a metric is missing
        ((LAST,), "before"),  # the log is that of a resumed run
    ],
)
def test_everything_else_is_computed(logged, stage):
    trainer = OneTrainer(*logged)
    assert evaluated(trainer, stage) == {"f1": 0.25, "loss": 0.5}
    assert trainer.computed == 1


def test_of_several_splits_those_that_were_not_scored_along_the_run_are_computed():
    trainer = OneTrainer({"step": 20, "eval_dev_f1": 0.75, "eval_dev_loss": 0.125})
    found = evaluated(trainer, "after", ("dev", "test"))
    assert found == {"dev_f1": 0.75, "dev_loss": 0.125, "test_f1": 0.25, "test_loss": 0.5}
    assert trainer.computed == 1


@pytest.mark.parametrize("pairs", [None, ["b", "a c", "", "b b", "c"]])
def test_texts_are_tokenized_a_batch_at_a_time_as_all_at_once(pairs):
    tokenizer, asked = letters_tokenizer(), []

    def counting(texts, second, **options):
        asked.append(len(texts))
        return tokenizer(texts, second, **options)

    texts = ["a b c", "c", "b a", "a a a a a a", "c b"]
    data = Encoded(Examples(texts, pairs, [0, 1, 0, 1, 1]), counting, 5, regression=False)
    assert len(data) == 5
    assert not asked
    rows = [row for batch in DataLoader(data, 2, collate_fn=list) for row in batch]
    assert asked == [2, 2, 1]
    whole = tokenizer(texts, pairs, truncation=True, max_length=5)
    assert [row["input_ids"] for row in rows] == whole["input_ids"]
    assert [row["attention_mask"] for row in rows] == whole["attention_mask"]
    assert [row["labels"] for row in rows] == [0, 1, 0, 1, 1]
    assert data[3] == rows[3]
    assert isinstance(
        Encoded(Examples(texts, pairs, [0, 1, 0, 1, 1]), counting, 5, regression=True)[0]["labels"], float
    )
