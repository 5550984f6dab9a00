"""Checks that quantised weights are read as their libraries read them; other kinds are refused by name."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from quantised_nets import HIDDEN, KINDS, WIDTH, data, loss, plain, quantised, whole
from torch import Tensor, nn

import unmask
from unmask import MethodError
from unmask.gradients.backend import portable
from unmask.gradients.entries import put, take
from unmask.quantised.layers import weights
from unmask.quantised.sidecar import Sidecar, SparseMatrix
from unmask.quantised.sources import Source, sources
from unmask.quantised.tensor import QuantisedTensor

FOUR_BIT = [
    (kind, nested, shape)
    for kind, nested, shape in itertools.product(("nf4", "fp4"), (False, True), ((128, 64), (3, 192), (5, 7), (1, 64)))
]


def source(kind: str) -> Source:
    return sources(quantised(kind))["up.weight"]


def by_its_library(layer: nn.Module, kind: str) -> Tensor:
    if kind.startswith("torchao"):
        return layer.weight.dequantize()
    from bitsandbytes import functional

    if kind == "int8":
        return functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_entries_are_the_librarys(kind):
    net = quantised(kind)
    read, expected = sources(net)["up.weight"], by_its_library(net.up, kind)
    assert read.shape == (HIDDEN, WIDTH)
    torch.testing.assert_close(read.rows(0, HIDDEN), expected, rtol=1e-6, atol=0)
    assert torch.equal(read.rows(5, 9), read.rows(0, HIDDEN)[5:9])
    flat = torch.tensor([0, 1, 700, 701, HIDDEN * WIDTH - 1])
    assert torch.equal(read.entries(flat), read.rows(0, HIDDEN).view(-1)[flat])
    assert read.rows(3, 3).shape == (0, WIDTH)
    net(data(0))  # an 8-bit layer moves its scales in its first forward
    torch.testing.assert_close(read.rows(0, HIDDEN), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("kind", "nested", "shape"), FOUR_BIT)
def test_four_bits_of_every_shape(kind, nested, shape):
    """Tries rows that begin inside a byte, and inside a block of one scale."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], quant_type=kind, compress_statistics=nested).to("cpu")
    read = sources(layer)["weight"]
    assert read.kind == f"bitsandbytes {kind}"
    expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(read.rows(0, shape[0]), expected, rtol=1e-6, atol=1e-8)


def test_a_sidecar_overlays_and_forgets():
    sidecar = Sidecar(source("nf4"))
    base = sidecar.rows(0, HIDDEN)
    sidecar.put(torch.tensor([70, 3]), torch.tensor([7.0, 8.0]))
    expected = base.clone()
    expected.view(-1)[[70, 3]] = torch.tensor([7.0, 8.0])
    assert torch.equal(sidecar.rows(0, HIDDEN), expected)
    assert torch.equal(sidecar.rows(1, 3), expected[1:3])
    assert torch.equal(sidecar.take(torch.tensor([3, 4, 70])), expected.view(-1)[[3, 4, 70]])
    earlier = sidecar.copy()
    sidecar.put(torch.tensor([3]), base.view(-1)[3:4])  # back at the base, as an entry that leaves a repeated selection
    sidecar.put(torch.tensor([9]), torch.tensor([1.0]))
    assert sidecar.flat.tolist() == [9, 70]
    assert torch.equal(earlier.rows(0, HIDDEN), expected)
    assert [x.item() for x in sidecar.largest()] == [base.min().item(), 7.0]
    assert sidecar.deviation().times(torch.eye(WIDTH)).t()[1, 6].item() == pytest.approx(7.0 - base[1, 6].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_matrix_multiplies_like_a_dense_one(dtype):
    flat = torch.randperm(15)[:6].sort().values
    dense = torch.zeros(15).index_put((flat,), torch.arange(1.0, 7.0)).view(5, 3)
    matrix = SparseMatrix((5, 3), flat).filled(torch.arange(1.0, 7.0))
    x, g = torch.randn(4, 3).to(dtype), torch.randn(4, 5).to(dtype)
    torch.testing.assert_close(matrix.times(x), x.float() @ dense.t())
    torch.testing.assert_close(matrix.transposed_times(g), g.float() @ dense)
    assert matrix.times(x[:0]).shape == (0, 5)


def test_the_tensor_reads_in_pieces_and_refuses_the_whole():
    tensor = weights(quantised("int8"))["up.weight"]
    assert isinstance(tensor, QuantisedTensor)
    assert (tuple(tensor.shape), tensor.dtype, tensor.requires_grad) == ((HIDDEN, WIDTH), torch.float32, False)
    assert "bitsandbytes int8" in repr(tensor)
    flat = torch.tensor([5, 900])
    assert torch.equal(take(tensor, flat), whole(tensor).view(-1)[flat])
    for part in (slice(2, 4), slice(0, HIDDEN), slice(0, 2 * HIDDEN), slice(None)):
        block = tensor.reshape(HIDDEN, -1)[part]
        assert type(block) is Tensor
        assert torch.equal(block, whole(tensor)[part])
    before = tensor.clone()
    put(tensor, flat, torch.tensor([1.0, 2.0]))
    assert take(tensor, flat).tolist() == [1.0, 2.0]
    assert torch.equal(whole(before), weights(quantised("int8"))["up.weight"].sidecar.rows(0, HIDDEN))
    for refused in (
        lambda: tensor + 1,
        lambda: tensor.float().sum(),
        lambda: tensor.cpu().numpy(),
        lambda: tensor[:, 1:2],
    ):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"quantised matrix|numpy"):
            refused()


@pytest.mark.parametrize("backend", [contextlib.nullcontext, portable], ids=["cpu", "portable"])
def test_a_matrix_of_one_row(backend):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(WIDTH, 1, quant_type="nf4").to("cpu")
    with backend():
        selection = unmask.select(layer, unmask.id3(5, steps=1).but(scope=unmask.Scope.patterns("weight")))
        layer(data(0)).sum().backward()
        torch.optim.SGD(selection.parameters(), lr=0.1).step()
    assert selection.used == 5


def _unquantised_8bit() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 64, has_fp16_weights=False)


def _float_8bit() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear8bitLt(64, 64)


def _unquantised_4bit() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.Linear4bit(64, 64)


def _embedding() -> nn.Module:
    return pytest.importorskip("bitsandbytes").nn.EmbeddingNF4(64, 64).to("cpu")


def _shared() -> nn.Module:
    net = quantised("nf4")
    net.again = copy.copy(net.up)
    return net


def _activations() -> nn.Module:
    net = quantised("torchao")
    net.up.weight.act_quant_kwargs = "some"
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_unquantised_8bit, "is not quantised yet; move the model to its device"),
        (_float_8bit, "keeps float weights; build its Linear8bitLt with has_fp16_weights=False"),
        (_unquantised_4bit, "is not quantised yet; move the model to its device"),
        (_embedding, "is in bitsandbytes' EmbeddingNF4, which cannot be saved; keep that layer unquantised"),
        (_shared, "is quantised and shared by layers; leave it out with exclude="),
        (_activations, "only int8 weights with float activations"),
    ],
)
def test_kinds_that_cannot_be_selected_from_are_named(make, reason):
    with pytest.raises(MethodError, match=reason):
        unmask.select(make(), unmask.id3(5, steps=1))


def test_excluded_kinds_are_no_hindrance():
    net = nn.Sequential(_float_8bit(), plain())
    selection = unmask.select(net, unmask.id3(5, steps=1), exclude=r"^0\.")
    assert selection.budget == 5


@pytest.mark.parametrize("held", [True, False])
def test_evaluation_on_a_cpu_with_bfloat16_arithmetic(held):
    """Checks that bitsandbytes does not repack 4-bit weights and round their scales: the base would be lost."""
    functional = pytest.importorskip("bitsandbytes.functional")
    if not functional.has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    net = quantised("nf4")
    if held:
        selection = unmask.select(net, unmask.id3(20, steps=2))
        before = whole(weights(net)["up.weight"])
        with torch.no_grad():
            net.eval()(data(0))
        assert torch.equal(whole(weights(net)["up.weight"]), before)
        loss(net.train(), data(1)).backward()
        assert selection.values.grad is not None
        selection.release()
        unmask.quantised.detach(net)
        assert net.up.support_avx512bf16_for_cpu
    else:
        with torch.no_grad():
            net.eval()(data(0))
        with pytest.raises(MethodError, match=r"was evaluated before.*load the model again"):
            unmask.select(net.train(), unmask.id3(20, steps=2))
