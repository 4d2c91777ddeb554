"""What comparing the weights of the ranks costs, and what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainloop.ranks import collectives, tree

from .launching import on_ranks


class NewMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make anew."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known, self.num_bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.num_bytes += tensor.nbytes
        return result


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex64])
def test_a_checksum_makes_no_copy(dtype: torch.dtype) -> None:
    """It reads the memory of the tensor itself; scalars and empty tensors have one, too."""
    for shape in ((7, 300_000), (), (0, 3)):
        tensor = torch.ones(shape, dtype=dtype)
        with NewMemory(tensor) as new:
            first = collectives.checksum(tensor)
        assert new.num_bytes == 0
        assert first == collectives.checksum(tensor.clone())
        if tensor.numel():
            tensor.view(-1)[-1] = 0
            assert collectives.checksum(tensor) != first


def test_a_checksum_depends_on_the_order() -> None:
    """Two permutations have different ones, also if the tensor isn't contiguous or is larger than a piece."""
    for tensor in (torch.arange(12).view(3, 4).T, torch.arange(2 * collectives._PIECE_BYTES, dtype=torch.uint8)):
        assert collectives.checksum(tensor) == collectives.checksum(tensor.contiguous())
        assert collectives.checksum(tensor) != collectives.checksum(tensor.flip(0))


def num_written() -> int:
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads Linux's count of the bytes a process has sent")
def test_equal_weights_cost_one_number_a_rank(tmp_path: Path) -> None:
    """Ranks with the same weights send as much for 500 tensors as for 2. Different ones end with those of rank 0."""

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        device, sent = torch.device("cpu"), []
        collectives.host_group()
        for num_layers in (1, 1, 250):  # the first call loads pickles' modules
            model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(num_layers)))
            for param in model.parameters():
                nn.init.ones_(param)
            before = num_written()
            assert not collectives.share_rank_zero_weights(model, device)
            sent.append(num_written() - before)
        assert 0 < sent[2] < sent[1] + 100, sent
        for scale in (1.0, 1 + 2**-7):  # the other permutation; one bit of a bfloat16
            torch.manual_seed(0)
            model = nn.Linear(3, 5, dtype=torch.bfloat16)
            expected = model.weight.clone()
            model.register_buffer("order", torch.arange(9) if rank != 2 or scale != 1 else torch.arange(9).flip(0))
            with torch.no_grad():
                model.weight[0, 0] = model.weight[0, 0] * (scale if rank == 1 else 1)
            assert collectives.share_rank_zero_weights(model, device)
            assert torch.equal(model.order, torch.arange(9))
            assert torch.equal(model.weight, expected)
        collectives._host_groups.clear()

    assert on_ranks(3, tmp_path, work) == [0, 0, 0]


@pytest.mark.parametrize(
    ("num_ranks", "num_levels"), [(2, 1), (3, 2), (5, 3), pytest.param(16, 4, marks=pytest.mark.slow)]
)
def test_values_of_all_ranks_are_merged_along_a_tree(
    tmp_path: Path, num_ranks: int, num_levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the ranks, also if a value needs more than one message. Nobody hears from more than log2 N
    others, or sends more than once; up to three ranks, sums have the bits of a sum in the order of the ranks.
    """
    heard: list[int] = []
    receive, send = tree._receive, tree._send
    monkeypatch.setattr(tree, "_receive", lambda source, group: (heard.append(source), receive(source, group))[1])
    monkeypatch.setattr(tree, "_send", lambda data, to, group: (heard.append(-1), send(data, to, group))[1])
    numbers = [0.1 * 3**rank for rank in range(num_ranks)]

    def work(rank: int) -> None:
        collectives.host_group()
        for size in (1, 1007, 1008, 1009, 3000):
            heard.clear()
            text = chr(65 + rank) * size
            merged = collectives.merge_over_ranks([text], list.__add__)
            assert merged == [chr(65 + other) * size for other in range(num_ranks)]
            assert heard.count(-1) == (rank > 0)
            assert len(heard) - heard.count(-1) <= num_levels
        merged = collectives.merge_over_ranks(numbers[rank], float.__add__)
        assert merged == (sum(numbers) if num_ranks <= 3 else pytest.approx(sum(numbers)))

    assert on_ranks(num_ranks, tmp_path, work) == [0] * num_ranks
