"""`TokenDataset`: each sample once an epoch at any number of ranks and workers, and alike after a restart."""

from __future__ import annotations

import itertools
import json
import pickle
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from trainloop.__main__ import main
from trainloop.data import TokenDataset, write_tokens
from trainloop.data.feed import DataFeed

from .test_data_kinds import CPU, seed_differently

BATCH = 4
LENGTH = 6
NUM_TOKENS = (81, 60, 61)
"""In each file: a window that lies in two files is common."""
EPOCH = (sum(NUM_TOKENS) - LENGTH) // LENGTH


class Ranks:
    """The feeds of all ranks, each with generators of its own."""

    def __init__(self, dataset: Any, world_size: int, num_workers: int, shuffle: bool = True) -> None:
        self.feeds = [
            DataFeed(
                DataLoader(dataset, BATCH, shuffle=shuffle, num_workers=num_workers),
                seed=1,
                rank=rank,
                world_size=world_size,
                device=CPU,
            )
            for rank in range(world_size)
        ]

    def draw(self, count: int) -> list[Any]:
        """The samples of the next `count` global batches."""
        drawn = []
        for rank, feed in enumerate(self.feeds):
            seed_differently(rank, feed.position)
            with feed:
                feed.start()
                drawn.append([next(feed).tolist() for _ in range(count)])
        assert len({feed.checksum for feed in self.feeds}) == 1
        return [sample for batches in zip(*drawn, strict=True) for batch in batches for sample in batch]

    def resumed(self, dataset: Any, world_size: int, num_workers: int) -> Ranks:
        """Others, at the position of these."""
        ranks = Ranks(dataset, world_size, num_workers)
        for feed in ranks.feeds:
            feed.load_state_dict(json.loads(json.dumps(self.feeds[0].state_dict())), None)
        return ranks


@pytest.fixture(scope="module")
def token_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of the ids 0, 1, 2 and so on."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = iter(range(sum(NUM_TOKENS)))
    files = [folder / f"{i}.bin" for i in range(len(NUM_TOKENS))]
    for file, count in zip(files, NUM_TOKENS, strict=True):
        file.write_bytes(array("H", itertools.islice(ids, count)).tobytes())
    return files


def check_windows(windows: list[Any]) -> None:
    """Of whole epochs: they cover the ids from the epoch's offset on, each once."""
    epochs = [windows[i : i + EPOCH] for i in range(0, len(windows) - EPOCH + 1, EPOCH)]
    offsets = []
    for epoch in epochs:
        starts = [window[0] for window in epoch]
        assert all(window == list(range(window[0], window[0] + LENGTH + 1)) for window in epoch)
        offsets.append(min(starts))
        assert sorted(starts) == list(range(offsets[-1], offsets[-1] + EPOCH * LENGTH, LENGTH))
        assert starts != sorted(starts)
    assert all(offset < LENGTH for offset in offsets)
    assert len(set(offsets)) > 1, "each epoch is cut at an offset of its own"


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["tokens"])
def test_each_sample_is_seen_as_promised(kind: str, world_size: int, num_workers: int, token_files: list[Path]) -> None:
    """A run that is killed in the middle of an epoch goes on with the same samples, at any number of ranks."""
    make: Callable[[], Any] = {"tokens": lambda: TokenDataset(token_files, LENGTH, dtype="uint16", vocab_size=202)}[
        kind
    ]
    check = {"tokens": check_windows}[kind]
    count = -(-4 * EPOCH // BATCH // world_size)
    whole = Ranks(make(), world_size, num_workers).draw(count)
    check(whole)
    for killed_at in (count // 3, count // 2 + 1):
        first = Ranks(make(), world_size, num_workers)
        seen = first.draw(killed_at)
        for other_size, other_workers in ((world_size, num_workers), (world_size % 3 + 1, 0)):
            num_left = (count - killed_at) * world_size // other_size
            rest = first.resumed(make(), other_size, other_workers).draw(num_left)
            assert seen + rest == whole[: len(seen + rest)], (killed_at, other_size)


# ---------------------------------------------------------------------- tokens


def test_windows_come_in_order_without_shuffle(token_files: list[Path]) -> None:
    """From the first id on, in each epoch, as plain indexing has them; also in a plain `DataLoader`."""
    dataset = TokenDataset(token_files, LENGTH, dtype=torch.uint16)
    in_order = [list(range(i * LENGTH, (i + 1) * LENGTH + 1)) for i in range(EPOCH)]
    assert len(dataset) == EPOCH
    assert [window.tolist() for window in dataset] == in_order
    assert [window for batch in DataLoader(dataset, BATCH) for window in batch.tolist()] == in_order
    assert dataset[-1].tolist() == in_order[-1]
    assert dataset[0].dtype == torch.int64
    assert Ranks(dataset, 1, 0, shuffle=False).draw(EPOCH)[: 2 * EPOCH] == 2 * in_order
    with pytest.raises(IndexError):
        dataset[EPOCH * LENGTH]
    with pytest.raises(IndexError):
        dataset[-EPOCH - 1]


def test_a_data_set_of_tokens_travels_without_its_tokens(tmp_path: Path) -> None:
    """Its pickle, which goes to spawned workers, doesn't grow with the files; the copy maps them anew."""
    path = tmp_path / "ids.bin"
    path.write_bytes(bytes(1_000_000))
    dataset = TokenDataset(path, LENGTH, dtype="uint8")
    assert dataset[3].tolist() == [0] * (LENGTH + 1)
    content = pickle.dumps(dataset)
    assert len(content) < 2000
    copied = pickle.loads(content)
    assert copied[3].tolist() == [0] * (LENGTH + 1)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="has changed"):
        pickle.loads(content)[3]


def test_what_is_no_file_of_tokens_is_refused(tmp_path: Path) -> None:
    """At construction, by the name of the file and of the argument."""
    ids, odd, empty, text = (tmp_path / name for name in ("ids.bin", "odd.bin", "empty.bin", "text.txt"))
    ids.write_bytes(array("H", range(100)).tobytes())
    odd.write_bytes(bytes(7))
    empty.write_bytes(b"")
    text.write_bytes(bytes(range(100)))
    folder = tmp_path / "tokens"
    write_tokens([text], folder)
    broken = tmp_path / "broken"
    write_tokens([text], broken)
    (broken / "tokens.bin").write_bytes(bytes(90))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "index.json").write_text("{}")

    def refused(expected: str, error: type[Exception], paths: Any, length: int = 6, **options: Any) -> None:
        with pytest.raises(error, match=expected):
            TokenDataset(paths, length, **options)

    refused("names .*nowhere", FileNotFoundError, tmp_path / "nowhere", dtype="uint8")
    refused("`dtype` must say", ValueError, ids)
    refused("`dtype` must be one of", TypeError, ids, dtype="float32")
    refused("`dtype` must be one of", TypeError, ids, dtype=int)
    refused("odd.bin must have a whole number", ValueError, odd, dtype=torch.uint16)
    refused("empty.bin must have", ValueError, [ids, empty], dtype=torch.uint16)
    refused("must name a file", ValueError, [], dtype=torch.uint16)
    refused("`sequence_length` is 100", ValueError, ids, 100, dtype=torch.uint16)
    refused("`sequence_length` must be at least 1", ValueError, ids, 0, dtype=torch.uint16)
    refused(r"in \[0, 99\).*ids.bin are in \[0, 99\]", ValueError, ids, dtype=torch.uint16, vocab_size=99)
    refused(r"tokens.bin are in \[0, 99\]", ValueError, folder, vocab_size=99)
    refused(r"are in \[-1, ", ValueError, _negative(tmp_path), dtype=torch.int16, vocab_size=99)
    refused("`dtype` is torch.uint16, but the index", ValueError, folder, dtype=torch.uint16)
    refused("has 90 ids, but its index says 100", ValueError, broken)
    refused("has no index.json", ValueError, tmp_path)
    refused("is not an index", ValueError, foreign)
    assert len(TokenDataset(ids, 99, dtype=torch.uint16, vocab_size=100)) == 1
    assert len(TokenDataset([folder, folder], 99, vocab_size=100)) == 1


def _negative(folder: Path) -> Path:
    path = folder / "negative.bin"
    path.write_bytes(array("h", range(-1, 20)).tobytes())
    return path


def test_the_command_line_writes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes, or the ids of a tokenizer; with the index that `TokenDataset` reads."""
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("the cat\n")
    texts[1].write_text("the dog ä\n")
    files = [*map(str, texts)]
    assert main(["tokens", *files, "--out", str(tmp_path / "bytes"), "--separator", "0"]) == 0
    dataset = TokenDataset(tmp_path / "bytes", 19, vocab_size=256)
    assert bytes(dataset[0].tolist()) == b"the cat\n\0the dog \xc3\xa4\n"[:20]

    tokenizer = _word_tokenizer(tmp_path / "tokenizer.json")
    out = str(tmp_path / "words")
    assert main(["tokens", *files, "--out", out, "--tokenizer", str(tokenizer), "--separator", "<end>"]) == 0
    assert "2 files" in capsys.readouterr().out
    assert TokenDataset(out, 6, vocab_size=5)[0].tolist() == [2, 3, 0, 2, 4, 1, 0]
    index = json.loads((tmp_path / "words" / "index.json").read_text())
    assert (index["dtype"], index["count"], index["max_id"]) == ("uint16", 7, 4)

    assert main(["tokens", *files, "--out", out]) == 1
    assert "`out` must not exist yet" in capsys.readouterr().err
    assert main(["tokens", files[0], str(tmp_path / "none.txt"), "--out", str(tmp_path / "x")]) == 1
    assert "none.txt" in capsys.readouterr().err
    for separator in ("256", "<end>"):
        assert main(["tokens", *files, "--out", str(tmp_path / "x"), "--separator", separator]) == 2
        assert "`separator` must be a number" in capsys.readouterr().err
    texts[1].write_bytes(b"\xff")
    assert main(["tokens", *files, "--out", str(tmp_path / "x"), "--tokenizer", str(tokenizer)]) == 2
    assert "b.txt must be a text in UTF-8" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "bytes", "tokenizer.json", "words"]


def _word_tokenizer(path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<end>": 0, "?": 1, "the": 2, "cat": 3, "dog": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path
