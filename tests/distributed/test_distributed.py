"""Tests that several processes select and train as one process does with the same global batch."""

from __future__ import annotations

import distributed_runs as runs
import nets
import processes
import pytest
import torch
from helpers import dense_gradients

import unmask
from unmask import MethodError, SelectionError

EQUAL_TO_ONE = [  # every process must make the run of one process
    *({"method": name} for name in runs.METHODS if name != "most"),
    {"method": "most", "steps": 3},
    {"method": "id3", "bucket": 100},
    {"method": "id3_strided", "accumulation": "exact", "micro": 2},
    {"method": "id3_strided", "accumulation": "candidates", "micro": 2},
    {"method": "repeat_d3", "accumulation": "exact", "micro": 2},
    {"method": "repeat_d3_kept", "accumulation": "exact", "micro": 2},
    {"method": "repeat_d3", "accumulation": "candidates", "micro": 2, "bucket": 500},
]
CANDIDATES = [
    {"method": "most", "exchange": "candidates", "steps": 3},
    {"method": "most", "exchange": "candidates", "steps": 3, "bucket": 100},
    {"method": "pafi", "exchange": "candidates"},
    {"method": "static_d3", "exchange": "candidates"},
    {"method": "id3_strided", "exchange": "candidates", "bucket": 100},
    {"method": "id3_strided", "exchange": "candidates", "accumulation": "exact", "micro": 2},
    {"method": "id3_strided", "exchange": "candidates", "accumulation": "candidates", "micro": 2},
    {"method": "repeat_d3", "exchange": "candidates", "micro": 2},
    {"method": "repeat_d3_kept", "exchange": "candidates", "micro": 2},
]


# The method "most" asks for more weights than have a gradient.
@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
@pytest.mark.parametrize("count", [2, 4])
def test_all_processes_are_bitwise_alike_and_equal_to_one(count, tmp_path):
    together = processes.run(count, tmp_path, runs.grid, EQUAL_TO_ONE + CANDIDATES)
    for i, case in enumerate(EQUAL_TO_ONE + CANDIDATES):
        positions, values, tensors = together[0][i]
        for other in together[1:]:
            assert torch.equal(other[i][0], positions), case
            assert torch.equal(other[i][1], values), case
            assert all(torch.equal(other[i][2][name], tensor) for name, tensor in tensors.items()), case
        if case in EQUAL_TO_ONE or case["method"] in ("most", "pafi"):
            alone = runs.trained(**case)
            assert positions.sort().values.equal(alone[0].sort().values), case
            order = alone[0].argsort()[positions.argsort().argsort()]  # rounding may swap two weights of one step
            torch.testing.assert_close(values, alone[1][order], rtol=1e-4, atol=1e-6, msg=str(case))


def first_of(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.argsort(descending=True, stable=True)[:k]


@pytest.mark.parametrize("count", [2, 4])
def test_candidates_are_the_best_of_what_each_process_puts_first(count, tmp_path):
    case = {"method": "static_d3", "exchange": "candidates", "steps": 1}
    chosen = processes.run(count, tmp_path, runs.grid, [case])[0][0][0]
    model = nets.mixed(seed=0)
    parts = [dense_gradients(model, lambda m, b=b: nets.loss(m, b)) for b in nets.tokens(0).chunk(count)]
    names = sorted(dict(model.named_parameters()))
    gradients = torch.stack([torch.cat([part[name].reshape(-1) for name in names]) for part in parts])
    weights = torch.cat([dict(model.named_parameters())[name].detach().reshape(-1) for name in names])
    factor = 1 / (weights.abs() + 1) ** 2
    offered = torch.cat([first_of(g.abs() * factor, 4 * 60) for g in gradients]).unique()
    best = offered[first_of(gradients.mean(0).abs()[offered] * factor[offered], 60)]
    assert sorted(chosen.tolist()) == sorted(best.tolist())


def test_an_entry_that_no_process_puts_first_is_not_a_candidate(tmp_path):
    assert processes.run(2, tmp_path / "exact", runs.cancelling, "exact") == [[5], [5]]
    assert processes.run(2, tmp_path / "candidates", runs.cancelling, "candidates") == [[], []]


@pytest.mark.filterwarnings("ignore:step .* was to select:unmask.UnmaskWarning")
@pytest.mark.parametrize("budget", [40, 560])
@pytest.mark.parametrize("bucket", [30, 1 << 22])
def test_processes_may_reach_different_tensors(bucket, budget, tmp_path):
    """The larger budget unmasks all weights that some process reaches, and no others, in the order of one process."""
    alone = runs.branches("exact", bucket, budget)
    for exchange in ("exact", "candidates"):
        for positions, values in processes.run(2, tmp_path / exchange, runs.branches, exchange, bucket, budget):
            assert positions.equal(alone[0])
            torch.testing.assert_close(values, alone[1])


@pytest.mark.parametrize("exchange", ["exact", "candidates"])
def test_what_is_not_finite_in_one_process_is_refused_by_all_and_changes_nothing(exchange, tmp_path):
    first, second = processes.run(2, tmp_path, runs.nonfinite, exchange)
    assert first[0] == second[0] == ["step 1", "refused", "step 2", "refused", "step 3", "step 4"]
    assert first[1].equal(second[1])
    assert first[2].equal(second[2])


def test_a_grad_scaler_skips_the_same_steps_everywhere(tmp_path):
    first, second = processes.run(2, tmp_path, runs.scaled)
    assert first[0] == second[0] == [1, 1, 2, 3]
    assert first[1].equal(second[1])


@pytest.mark.parametrize(
    ("count", "dtype", "wrap", "full"),
    [
        (2, torch.float32, False, False),
        (3, torch.float32, False, False),
        (2, torch.float32, True, False),
        (3, torch.float32, True, False),
        (2, torch.bfloat16, False, False),
        (2, torch.bfloat16, True, False),
        (2, torch.float32, False, True),
        (2, torch.float32, True, True),
        (2, torch.bfloat16, False, True),
    ],
)
def test_tensors_trained_whole_are_reduced_too(count, dtype, wrap, full, tmp_path):
    """They are reduced with and without DDP around the model; those in half precision are by their float32 master."""
    first, *others = processes.run(count, tmp_path, runs.with_head, dtype, wrap, full)
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())
    if count == 2:  # 8 rows are two equal parts
        alone = runs.with_head(dtype, wrap, full)
        tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.02}
        for name, tensor in first.items():
            torch.testing.assert_close(tensor, alone[name], **tolerance)


def test_processes_that_do_not_fit_together_are_refused(tmp_path):
    for said in processes.run(2, tmp_path, runs.refused):
        assert "process 1 differs from process 0" in said[0]
        assert "budget is 11 in process 1 and 10 in process 0" in said[0]
        assert "the order of unmasking" in said[1]
        assert "DistributedDataParallel is not needed" in said[2]
        assert "no member of the given group" in said[3 if said[3] != "nothing" else 4]


def test_groups_of_processes_train_apart_from_each_other(tmp_path):
    results = processes.run(4, tmp_path, runs.in_pairs)
    for low in (0, 2):
        assert results[low][0].equal(results[low + 1][0])
        assert results[low][1].equal(results[low + 1][1])
    assert not results[0][0].equal(results[2][0])


def test_values_that_zero_has_taken_over_are_refused():
    """ZeRO 1 and 2 mark the parameters whose copies they step."""
    model = nets.mixed()
    selection = unmask.select(model, unmask.id3(5, steps=2))
    selection.values._hp_mapping = None
    with pytest.raises(SelectionError, match="train with torchrun or accelerate alone"):
        nets.loss(model, nets.tokens(0)).backward()


def test_a_process_group_made_after_the_selection_is_joined_if_the_weights_agree(tmp_path):
    same = processes.run(2, tmp_path / "same", runs.late, str(tmp_path), 0)
    assert [said for said, _ in same] == ["nothing"] * 2
    assert same[0][1].equal(same[1][1])
    others = processes.run(2, tmp_path / "other", runs.late, str(tmp_path / "other"), None)
    assert all("call unmask.select() after init_process_group()" in said for said, _ in others)


def test_processes_may_train_apart(tmp_path):
    first, second = processes.run(2, tmp_path, runs.apart)
    assert (first[0], second[0]) == ("2 steps", "3 steps")
    assert not first[1].equal(second[1])


def test_bytes_on_the_wire(tmp_path):
    """Compares the bytes with those of dense DDP, by the calls and by the kernel's count of received bytes; B is 0.2% of N."""
    for measured in processes.run(2, tmp_path, runs.traffic):
        (kernel, called), counts = measured["dense"], []
        for way in ("candidates", "none selected", "exact"):
            counts.append((measured[way][0] / kernel, measured[way][1] / called))
        candidates, none, exact = counts
        assert max(candidates) <= 0.05
        assert max(none) <= 0.01
        assert all(0.10 < share < 0.12 for share in exact)  # every tenth step sends the dense gradient


@pytest.mark.parametrize(
    ("exchange", "method", "reason"),
    [
        ("all", unmask.id3(5, steps=2), "it must be one of exact, candidates, none"),
        ("candidates", unmask.id3(5, steps=2).but(allocation="row"), "use exchange='exact'"),
        ("candidates", unmask.random_mask(5).but(strategy="repeat"), "use exchange='exact'"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(exchange, method, reason):
    with pytest.raises(MethodError, match=reason):
        unmask.select(nets.mixed(), method, exchange=exchange)
