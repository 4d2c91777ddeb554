"""The next batch goes to the device while the device works: same bits, no torn values, and nothing waits for it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainloop.data import look_ahead
from trainloop.data.feed import DataFeed

from ..test_look_ahead import Noisy, Trainer
from .devices import on_each_device, synchronize

SIZE, NUM_BATCHES = 2**22, 8


class Filled(Dataset):  # type: ignore[type-arg]
    """Sample i is full of i."""

    def __len__(self) -> int:
        return NUM_BATCHES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((SIZE,), float(index))


def wait_for_batch(feed: DataFeed) -> None:
    begin = time.monotonic()
    while not feed._source.has_ready_batch():
        assert time.monotonic() - begin < 60, "the workers give nothing"
        time.sleep(0.001)


def busy(device: str, x: torch.Tensor) -> torch.Tensor:
    """Some milliseconds of work for the device, which the host doesn't wait for."""
    for _ in range(40 if device == "cuda" else 1):
        x = x @ x / 1e3
    return x


@on_each_device
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's note that it is a prototype
def test_values_are_never_torn(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pinned memory that a batch came from is used again at once, and so is the device memory that it was in, while
    the device has yet to copy the one and to read the other. The host waits for none of it.
    """
    monkeypatch.setattr(look_ahead, "HOSTS", set())
    loader = DataLoader(Filled(), batch_size=1, num_workers=2, pin_memory=device == "cuda")
    sums, x = [], torch.randn(2048 if device == "cuda" else 8, 2048 if device == "cuda" else 8, device=device)
    feed = DataFeed(loader, seed=0, rank=0, world_size=1, device=torch.device(device))
    busy(device, x)  # so that its kernels are loaded
    with feed:
        feed.start()
        torch.zeros(SIZE, device=device).double().sum()
        try:
            for _ in range(NUM_BATCHES):
                wait_for_batch(feed)
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("error")
                feed.look_ahead()
                if device == "cuda":
                    torch.empty(1, SIZE, pin_memory=True).fill_(-1)  # the freed block, if it was freed too early
                batch = next(feed)
                busy(device, x)
                sums.append(batch.double().sum())
                del batch  # the next copy may take its memory, but only after the sum
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        finally:
            synchronize(device)
    assert [total.item() / SIZE for total in sums] == list(range(NUM_BATCHES))


def weights(device: str, looks_ahead: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(look_ahead, "HOSTS", set() if looks_ahead else {"cpu", "cuda"})
    trainer = Trainer(
        12,
        device=device,
        grad_clip=1.0,
        data_loader=lambda self: DataLoader(
            Noisy(), batch_size=2, shuffle=True, num_workers=2, pin_memory=device == "cuda"
        ),
        optimizer_=lambda self: torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True),
    )
    trainer.ids, trainer.waits_at = [], range(12) if looks_ahead else ()
    trainer.train()
    return [param.tolist() for param in trainer.model.parameters()], trainer.ids


@on_each_device
def test_a_run_has_the_same_bits_with_and_without(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fused optimizer, so that on a GPU the norm is read after the update was queued."""
    assert weights(device, True, monkeypatch) == weights(device, False, monkeypatch)


@pytest.mark.gpu
def test_the_copy_does_not_wait_for_the_step() -> None:
    """The batch is on the device before the work that was queued ahead of it is done."""
    loader = DataLoader(Filled(), batch_size=1, num_workers=1, pin_memory=True)
    x = torch.randn(4096, 4096, device="cuda")
    with DataFeed(loader, seed=0, rank=0, world_size=1, device=torch.device("cuda")) as feed:
        feed.start()
        next(feed)
        wait_for_batch(feed)
        for _ in range(20):
            busy("cuda", x)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()  # type: ignore[no-untyped-call]
        feed.look_ahead()
        assert feed._ahead is not None
        feed._ahead._event.synchronize()
        assert not done.query()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
