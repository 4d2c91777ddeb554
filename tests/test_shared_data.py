"""Data that is not the same on all ranks is refused, with the remedy; with the remedy each sample counts once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from .launching import NUM_PROCESSES, REPOSITORY, launch
from .workers.shared_data import BATCH, N, make_loaders

WORKER = REPOSITORY / "tests" / "workers" / "shared_data.py"
SHARDS_ITSELF = [name for name, (_, shards_itself) in make_loaders(0, 1).items() if shards_itself]
IS_SHARED = [name for name, (_, shards_itself) in make_loaders(0, 1).items() if not shards_itself]


@pytest.fixture(scope="module", params=["ddp2", "ddp3"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By case what each rank saw or was told."""
    out = tmp_path_factory.mktemp("shared_data")
    launch(WORKER, request.param, str(out))
    by_rank = [json.loads((out / f"{rank}.json").read_text()) for rank in range(NUM_PROCESSES[request.param])]
    return {name: [own[name] for own in by_rank] for name in by_rank[0]}


@pytest.mark.parametrize("name", SHARDS_ITSELF)
def test_data_that_shards_itself_is_refused_before_the_first_update(results: dict[str, list[Any]], name: str) -> None:
    """Training and evaluation say so on every rank, and name `per_rank`."""
    for own in results[name]:
        assert own["error"] == results[name][0]["error"]
        for error in (own["error"], own["evaluated"]):
            assert error.startswith("RankDisagreementError: "), error
            assert "return `trainloop.data.per_rank(loader)`" in error
        assert len(own["seen"]) <= BATCH, "the first window is not applied"


@pytest.mark.parametrize("name", SHARDS_ITSELF)
def test_per_rank_takes_it_as_it_is(results: dict[str, list[Any]], name: str) -> None:
    """Each sample is seen once an epoch, and counts once in an evaluation."""
    by_rank = results[f"{name}.per_rank"]
    assert [own["error"] for own in by_rank] == [None] * len(by_rank)
    assert sorted(number for own in by_rank for number in own["seen"]) == list(range(N))
    for own in by_rank:
        assert (own["evaluated"]["count"], own["evaluated"]["sum"]) == (N, sum(range(N)))


@pytest.mark.parametrize("name", IS_SHARED)
def test_data_that_is_the_same_on_all_ranks_is_sharded(results: dict[str, list[Any]], name: str) -> None:
    """Also if its samples have noise that differs between the ranks, or if its order is drawn from the global
    generators, which differ between the ranks.
    """
    by_rank = results[name]
    assert [own["error"] for own in by_rank] == [None] * len(by_rank)
    assert sorted(number for own in by_rank for number in own["seen"]) == list(range(N))
    for own in by_rank:
        assert (own["evaluated"]["count"], own["evaluated"]["sum"]) == (N, sum(range(N)))


def test_files_that_the_ranks_shuffle_in_different_ways_are_refused(results: dict[str, list[Any]]) -> None:
    """Their shares would overlap. The error says how to give all ranks the same seed."""
    for own in results["unseeded"]:
        assert own.startswith("RankDisagreementError: The ranks shuffle the data set in different ways")
        assert "`dataset.shuffle(seed=…)`" in own


def test_a_metric_that_is_called_counts_nothing_in_a_padded_round(results: dict[str, list[Any]]) -> None:
    """5 batches at 2 and 3 ranks: the call gives a value, and the metric stays as it was."""
    world_size = len(results["padded"])
    for rank, own in enumerate(results["padded"]):
        mine = [number for i in range(rank, 5, world_size) for number in range(4 * i, 4 * i + 4)]
        assert own["count"] == 20
        assert own["metric"] == sum(mine) / len(mine), "this metric does not reduce over the ranks"


def test_ranks_may_have_unequally_many_batches_of_their_own(results: dict[str, list[Any]]) -> None:
    """Rank r has r + 1 batches of 4, or rank 0 one and the others none."""
    world_size = len(results["uneven"])
    assert {own["count"] for own in results["uneven"]} == {4 * sum(range(1, world_size + 1))}
    assert {own["count"] for own in results["empty"]} == {4}


def test_an_evaluation_reads_the_share_of_a_rank(results: dict[str, list[Any]]) -> None:
    """Each sample counts once and is read by one rank, however unequal the shares are: at an evaluation that is
    repeated, with a data set that is trained on too, and with one rank's share alone. `predict` keeps the order of the
    data. Where a share would lose samples or is refused, every rank reads everything.
    """
    by_rank = results["shares"]
    world_size = len(by_rank)
    files = torch.arange(25).split([7, 1, 9, 3, 5])
    uneven = [sum(map(len, files[rank::world_size])) for rank in range(world_size)]
    reads = {
        "used": [24 // world_size] * world_size,
        "uneven": uneven,
        "again": uneven,
        "own_list": uneven,
        "own_list_again": uneven,
        "one_file": [10] + [0] * (world_size - 1),
        "strict": [28] * world_size,
        "in_workers": [0] * world_size,
        "drop_last": [25] * world_size,
        "hugging_face": [24 // world_size] * world_size,
    }
    totals = {"one_file": 10, "strict": 28, **dict.fromkeys(("used", "in_workers", "drop_last", "hugging_face"), 24)}
    for name, expected in reads.items():
        total = totals.get(name, 25)
        found = [own[name] for own in by_rank]
        assert found == [[total, sum(range(total)), num] for num in expected], name
    for own in by_rank:
        assert own["predicted"] == list(range(25))
        assert own["unseeded"].startswith("RankDisagreementError: The ranks shuffle the data set in different ways")
