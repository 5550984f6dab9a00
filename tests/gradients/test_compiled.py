"""Trains a static mask by a compiled model: one graph for all steps, the same values as without a compiler, and no waiting."""

from __future__ import annotations

import shutil

import pytest
import torch
from nets import tokens
from sequence import Sequence
from torch import nn
from torch.nn import functional as F

import unmask
from unmask.gradients import compiled
from unmask.gradients.backend import portable

# Dynamo looks at the .grad of every tensor that it meets in a frame.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

STEPS = 4
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Has an embedding that more rows than tokens have, a norm, a linear layer with and one without a bias, and an addmm."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(200, 8, padding_idx=0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.matrix, self.shift = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return torch.addmm(self.shift, x.flatten(0, -2), self.matrix)


def net():
    return Net(), lambda f, step: f(tokens(step)).square().mean()


def double():
    return Net(torch.float64), lambda f, step: f(tokens(step)).square().mean()


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config.problem_type = "single_label_classification"  # Otherwise the first forward sets it, and is compiled again.
    model = transformers.BertForSequenceClassification(config)
    return model, lambda f, step: f(input_ids=tokens(step), labels=torch.arange(len(tokens(step))) % 2).loss


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=False, use_cache=False)
    return transformers.LlamaForCausalLM(config), lambda f, step: f(input_ids=tokens(step), labels=tokens(step)).loss


def trained(build, backend=None, gradients="auto", autocast=False, method=None, plain_steps=0):
    """Returns each step's loss and gradient, and the weights after the last one."""
    torch.manual_seed(0)
    model, loss_of = build()
    model.train()
    selection = unmask.select(model, method or unmask.random_mask("10%"), gradients=gradients)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    found = []
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of(model if step < plain_steps else forward, step)
        loss.backward()
        found.append((loss.detach(), selection.values.grad.clone()))
        optimizer.step()
        optimizer.zero_grad()
    return found, [p.detach().clone() for p in model.parameters()]


def assert_one_graph():
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("gradients", ["auto", "sampled", "dense"])
@pytest.mark.parametrize("build", [net, double, bert, llama])
def test_all_steps_of_a_static_mask_are_one_graph_with_the_same_values(build, gradients):
    plain = trained(build, gradients=gradients)
    result = trained(build, "aot_eager", gradients=gradients)
    assert_one_graph()
    # Sampled, a bias's gradient is summed at its entries alone, and the tokens without a gradient are left out.
    exact = {"rtol": 0, "atol": 0} if gradients != "sampled" else {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(result, plain, **exact)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # The compiler itself uses what is deprecated.
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("build", [net, bert, llama])
def test_inductor_makes_one_graph_too(build):
    plain = trained(build)
    result = trained(build, "inductor")
    assert_one_graph()
    torch.testing.assert_close(result, plain, rtol=1e-4, atol=1e-5)


def test_autocast_is_in_the_graph():
    plain, result = trained(net, autocast=True), trained(net, "aot_eager", autocast=True)
    assert_one_graph()
    torch.testing.assert_close(result, plain, rtol=2e-2, atol=2e-3)


def test_a_mask_that_the_first_gradient_picks_compiles_after_the_first_step():
    method = unmask.static_d3(60)
    plain = trained(net, method=method)
    result = trained(net, "aot_eager", method=method, plain_steps=1)
    assert_one_graph()
    torch.testing.assert_close(result, plain, rtol=0, atol=0)


def test_a_step_that_selects_breaks_the_graph():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trained(net, "aot_eager", method=unmask.id3(60, steps=4))


def test_values_that_were_written_are_in_the_next_compiled_forward():
    model, loss_of = net()
    selection = unmask.select(model, unmask.random_mask("10%"))
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss_of(forward, 0).backward()
    with torch.no_grad():
        selection.values.add_(0.5)
    assert loss_of(forward, 0) == loss_of(model, 0)
    with torch.no_grad():
        selection.values.sub_(0.25)
        assert loss_of(forward, 0) == loss_of(model, 0)


def test_micro_batches_add_up_in_a_compiled_model():
    gradients = []
    for backend in (None, "aot_eager"):
        torch.manual_seed(0)
        model, loss_of = net()
        selection = unmask.select(model, unmask.random_mask("10%"))
        forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
        for step in range(3):
            loss_of(forward, step).backward()
        gradients.append(selection.values.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("gradients", ["auto", "sampled", "dense"])
@pytest.mark.parametrize("build", [net, llama])
def test_forward_and_backward_are_the_same_operations_at_each_step_and_never_wait(build, gradients):
    """Checks that a CUDA graph can replay them: nothing waits but what the model itself asks, and no shape depends on data."""
    with portable():
        torch.manual_seed(0)
        model, loss_of = build()
        with Sequence() as without:
            loss_of(model.train(), 0).backward()
        selection = unmask.select(model.train(), unmask.random_mask("10%"), gradients=gradients)
        optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
        steps = []
        for step in range(4):
            with Sequence() as sequence:  # The tokens differ from step to step.
                loss_of(model, step).backward()
            steps.append(sequence)
            optimizer.step()
            optimizer.zero_grad()
    assert steps[2].seen == steps[3].seen
    assert steps[3].waiting == without.waiting


G, X = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
FLAT = torch.tensor([0, 4, 5, 11])


@pytest.mark.parametrize(("sampled", "dense"), [(True, False), (True, True), (False, True)])
def test_the_operators_pass_torchs_checks(sampled, dense):
    placeholder = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x = X.clone().requires_grad_()
    like = placeholder.detach()
    torch.library.opcheck(compiled.product_at, (G, X, FLAT, like, sampled, dense, False))
    torch.library.opcheck(compiled.linear, (x, weight, bias, placeholder, FLAT, sampled, dense, False))
    torch.library.opcheck(compiled.linear, (x, weight.t().contiguous(), bias, placeholder, FLAT, sampled, dense, True))
    torch.library.opcheck(compiled.weight, (weight, placeholder, FLAT))
    ids = torch.tensor([3, 0, 3])
    torch.library.opcheck(compiled.embedding, (ids, weight, placeholder, FLAT, 0))
    torch.library.opcheck(compiled.embedding_at, (torch.randn(3, 3).double(), ids, FLAT, like, 4, 0))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_linear_operators_gradients_are_those_of_the_dense_ones(transposed):
    weight = torch.randn(*((3, 4) if transposed else (4, 3)), dtype=torch.float64)
    bias, x = torch.randn(4, dtype=torch.float64, requires_grad=True), X.clone().requires_grad_()
    placeholder = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    out = compiled.linear(x, weight, bias, placeholder, FLAT, True, False, transposed)
    out.backward(G)
    matrix, other = (
        weight.clone().requires_grad_(),
        [bias.detach().clone().requires_grad_(), X.clone().requires_grad_()],
    )
    F.linear(other[1], matrix.t() if transposed else matrix, other[0]).backward(G)
    torch.testing.assert_close(placeholder.grad, matrix.grad.take(FLAT))
    torch.testing.assert_close([bias.grad, x.grad], [p.grad for p in other])
