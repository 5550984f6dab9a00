"""Checks that the Fisher estimate equals a loop over batches of one, for every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import as_lists, assert_same_tensors, first_k, mlp, snapshot
from models import bert_classifier
from torch import nn
from torch.nn import functional as F

import unmask
from unmask import MethodError, NonFiniteGradientError
from unmask.calibration import fisher as fisher_module
from unmask.calibration.fisher import estimate_fisher
from unmask.methods.method import Calibration
from unmask.ranking.ledger import Layout

T, CLASSES = 5, 3


class Output:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class Net(nn.Module):
    """Has layers that the one pass handles, and others that fall back to the loop."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.positions = nn.Embedding(T, 8)
        self.table = nn.Parameter(torch.randn(1, T, 8))  # A broadcast tensor needs the loop.
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)  # It needs the loop.
        self.twice = nn.Linear(8, 8)  # It is used twice, so it needs the loop.
        self.dropout, self.frozen = nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.queries, self.unused = nn.Parameter(torch.randn(2, 8)), nn.Linear(2, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids, labels=None):
        places = torch.arange(input_ids.shape[1])
        x = self.embed(input_ids) + self.positions(places[None]) + self.table[:, : input_ids.shape[1]]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.twice(self.twice(self.dropout(x)).tanh()) + F.linear(self.queries, self.twice.weight).mean(0)
        logits = self.head(self.frozen(x.mean(1)))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


def loader(sizes, length=T):
    generator = torch.Generator().manual_seed(11)
    return [
        {
            "input_ids": torch.randint(0, 12, (n, length), generator=generator),
            "labels": torch.randint(0, CLASSES, (n,), generator=generator),
        }
        for n in sizes
    ]


def reference(model, calibration):
    """Computes the mean over examples of the power of each example's own gradient, in eval mode."""
    model = copy.deepcopy(model).eval().requires_grad_(True)
    singles = [{k: v[i : i + 1] for k, v in b.items()} for b in calibration.loader for i in range(len(b["labels"]))]
    singles = singles[: calibration.num_samples]
    power = torch.square if calibration.grad_type == "square" else torch.abs
    total = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for single in singles:
        output = model(**single)
        if calibration.sample_type == "label":
            terms = [(1.0, output.loss)]
        else:
            log_p = F.log_softmax(output.logits.float(), 1)[0]
            terms = [(log_p[c].exp().item(), log_p[c]) for c in range(len(log_p))]
        for weight, term in terms:
            grads = torch.autograd.grad(term, list(model.parameters()), retain_graph=True, allow_unused=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += 0 if grad is None else weight * power(grad.float()) / len(singles)
    return total


def estimate(model, calibration):
    parameters = dict(model.named_parameters())
    layout = Layout(sorted(parameters), [parameters[name] for name in sorted(parameters)])
    return {layout.names[i]: f for i, f in estimate_fisher(model, layout, calibration).items()}


def assert_is_reference(model, calibration):
    expected, actual = reference(model, calibration), estimate(model, calibration)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=2e-4,
            atol=1e-7 + 2e-6 * expected[name].max().item(),
            msg=lambda m, n=name: f"{n}: {m}",
        )


statistics = [
    pytest.mark.parametrize("sample_type", ["label", "expect"]),
    pytest.mark.parametrize("grad_type", ["square", "abs"]),
]


def with_every_statistic(function):
    for mark in statistics:
        function = mark(function)
    return function


@with_every_statistic
@pytest.mark.parametrize(("sizes", "samples"), [([4, 4, 4], 10), ([7], 7), ([1, 3], 100), ([T, T], 2 * T), ([2, 2], 3)])
def test_the_estimate_is_the_loop_over_single_examples(sample_type, grad_type, sizes, samples):
    assert_is_reference(Net(), Calibration(loader(sizes), samples, sample_type, grad_type))


@with_every_statistic
def test_a_transformers_model(sample_type, grad_type):
    labels = {"num_labels": CLASSES, "problem_type": "single_label_classification"}
    model = bert_classifier(12, intermediate_size=24, max_position_embeddings=8, initializer_range=0.02, **labels)
    data = loader([4, 4, 4])
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][:2, 3:] = 0
    assert_is_reference(model, Calibration(data, 10, sample_type, grad_type))


def test_only_tensors_that_need_the_loop_get_it(monkeypatch):
    seen = []
    loop = fisher_module._loop
    monkeypatch.setattr(
        fisher_module,
        "_loop",
        lambda m, layout, indices, *rest: (
            seen.extend(layout.names[i] for i in indices),
            loop(m, layout, indices, *rest),
        )[1],
    )
    estimate(Net(), Calibration(loader([4]), 4))
    assert set(seen) == {
        "conv.bias", "conv.weight", "frozen.bias", "frozen.weight", "queries", "table", "twice.bias", "twice.weight",
    }  # fmt: skip


@pytest.mark.parametrize("position_ids", ["flat", "row"])
@pytest.mark.parametrize("batch", [T, T + 1, T - 1])
def test_a_sequence_as_long_as_the_batch_is_large_is_not_taken_for_the_batch(batch, position_ids):
    """Takes position ids of shape (T,), as in GPT code, and a sequence-first linear layer."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places, self.mix = nn.Embedding(12, 8), nn.Embedding(T, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, input_ids, labels=None):
            places = torch.arange(input_ids.shape[1])
            x = self.tokens(input_ids) + self.places(places if position_ids == "flat" else places[None])
            x = self.mix(x.transpose(0, 1)).tanh().mean(0)
            logits = self.head(x)
            return Output(None if labels is None else F.cross_entropy(logits, labels), logits)

    assert_is_reference(Positions(), Calibration(loader([batch, batch]), 2 * batch))


def test_token_labels_count_each_example_by_its_own_mean():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(12, 8), nn.Linear(8, CLASSES)

        def forward(self, input_ids, labels=None):
            logits = self.out(self.embed(input_ids).tanh())
            return Output(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)

    data = loader([4, 3])
    for batch in data:
        batch["labels"] = torch.randint(0, CLASSES, batch["input_ids"].shape)
        batch["labels"][:, 3:] = -100
        batch["labels"][0, 1:] = -100
    assert_is_reference(Tagger(), Calibration(data, 6))


@pytest.mark.parametrize("shape", ["tensor", "tuple", "list", "mapping"])
def test_a_loss_of_the_users_own_takes_any_batch(shape):
    model, x = mlp(), torch.randn(6, 6)
    pack = {"tensor": lambda x: x, "tuple": lambda x: (x, 1.0), "list": lambda x: [x], "mapping": lambda x: {"x": x}}[
        shape
    ]
    unpack = {"tensor": lambda b: b, "mapping": lambda b: b["x"]}.get(shape, lambda b: b[0])
    calibration = Calibration([pack(x[:4]), pack(x[4:])], 5, loss=lambda m, b: m(unpack(b)).square().mean())
    actual = estimate(model, calibration)
    expected = torch.zeros(6, 6)
    for row in x[:5]:
        (gradient,) = torch.autograd.grad(model(row[None]).square().mean(), model[0].weight)
        expected += gradient.square() / 5
    torch.testing.assert_close(actual["0.weight"], expected)


def test_fish_selects_the_largest_and_leaves_modes_flags_and_statistics_as_they_were():
    model = Net().train()
    model.frozen.eval()
    model.head.bias.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    method = unmask.fish(50, loader([4, 4]), num_samples=8)
    expected = first_k(reference(model, method.calibration), 50)
    selection = unmask.select(model, method)
    assert as_lists(selection.indices) == expected
    assert [m.training for m in model.modules()] == modes
    assert_same_tensors(before, snapshot(model))
    selection.release()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_generator_is_enough_where_one_pass_is_and_refused_where_not():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))

    def data():
        yield from torch.randn(8, 6).split(4)

    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    assert unmask.select(model, unmask.fish(5, data(), loss=loss)).used == 5
    conv = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 2))
    with pytest.raises(MethodError, match="not a generator"):
        unmask.select(conv, unmask.fish(5, data(), loss=loss))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in conv.parameters())


@pytest.mark.parametrize(
    ("batches", "kwargs", "error", "why"),
    [
        ([], {}, MethodError, "loader is empty"),
        ([{"labels": 1}], {}, MethodError, "no tensor with a batch dimension"),
        ([{"input_ids": torch.ones(2, T, dtype=torch.int64)}], {}, MethodError, "no loss"),
        ([(torch.ones(2, T),)], {}, MethodError, "loss="),
        (loader([2]), {"loss": lambda m, b: m(**b).loss * torch.nan}, NonFiniteGradientError, "not finite"),
    ],
)
def test_a_calibration_that_cannot_work_is_refused_and_leaves_the_model_alone(batches, kwargs, error, why):
    model = Net().train()
    with pytest.raises(error, match=why):
        unmask.select(model, unmask.fish(5, batches, **kwargs))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())
