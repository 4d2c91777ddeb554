"""`TokenDataset`, `Mixture` and `SkipBadSamples`: what each promises, at any number of ranks and workers, and
alike after a restart.
"""

from __future__ import annotations

import itertools
import json
import pickle
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from trainloop import TrainingError, TrainloopWarning
from trainloop.__main__ import main
from trainloop.data import Mixture, SkipBadSamples, TokenDataset, write_tokens
from trainloop.data.feed import DataFeed
from trainloop.data.mixture import check_samples_per_step

from .launching import NUM_PROCESSES, launch
from .test_data_kinds import CPU, Stream, seed_differently
from .workers import data_sets

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


class Numbers(Dataset):  # type: ignore[type-arg]
    """From `first` on; those in `bad` can't be read."""

    def __init__(self, count: int, first: int = 0, bad: tuple[int, ...] = ()) -> None:
        self.count, self.first, self.bad = count, first, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if index in self.bad:
            raise OSError(f"no block {index}")
        return self.first + index


A, B, C = Numbers(10), Numbers(7, 100), Numbers(13, 200)
BAD = (3, 4, 17, 29)


def make_mixture(weights: Any = None, **options: Any) -> Mixture:
    return Mixture({"a": A, "b": B, "c": C}, weights or {"a": 5, "b": 2.5, "c": 2.5}, num_samples=40, **options)


def weights_by_step(step: int) -> dict[str, float]:
    """`c` comes with step 3 and `a` is gone after step 6."""
    return {"a": float(step <= 6), "b": 1, "c": float(step >= 3)}


def check_mixture(numbers: list[int]) -> None:
    """The shares are those of the weights, in short stretches too, and each source is through before it repeats."""
    by_source = [[n for n in numbers if n // 100 == i] for i in range(3)]
    for start in range(0, len(numbers) - 20, 7):
        stretch = [n // 100 for n in numbers[start : start + 20]]
        assert all(abs(stretch.count(i) - share * 20) <= 2 for i, share in enumerate((0.5, 0.25, 0.25)))
    check_passes(by_source)


def check_passes(by_source: list[list[int]]) -> None:
    for source, own in zip((A, B, C), by_source, strict=True):
        count = source.count
        passes = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert len(passes) > 1
        assert all(sorted(one) == list(range(source.first, source.first + count)) for one in passes)
        assert passes[0] != passes[1]


def check_scheduled(numbers: list[int]) -> None:
    """The weights change with the steps of 12 samples."""
    steps = [[n // 100 for n in numbers[i : i + 12]] for i in range(0, len(numbers), 12)]
    assert [2 in step for step in steps[:4]] == [False, False, True, True]
    assert all(set(step) == {0, 1, 2} for step in steps[2:6])
    assert all(set(step) == {1, 2} for step in steps[6:-1])
    assert [n for n in numbers if n < 100][:10] != sorted(range(10))
    check_passes([[*range(10), *range(9, -1, -1)], *([n for n in numbers if n // 100 == i] for i in (1, 2))])


def check_skipped(numbers: list[int]) -> None:
    """They are those of the order without bad ones, but each of these is replaced by the next that is good."""
    order = Ranks(Numbers(30), 1, 0).draw(-(-len(numbers) // BATCH))
    expected = []
    for i in range(len(numbers)):
        epoch = order[i // 30 * 30 : i // 30 * 30 + 30]
        if len(epoch) < 30:
            break
        place = i % 30
        while epoch[place % 30] in BAD:
            place += 1
        expected.append(epoch[place % 30])
    assert len(expected) >= 90
    assert numbers[: len(expected)] == expected


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


KINDS: dict[str, tuple[Callable[[list[Path]], Any], Callable[[list[Any]], None]]] = {
    "tokens": (lambda files: TokenDataset(files, LENGTH, dtype="uint16", vocab_size=202), check_windows),
    "mixture": (lambda files: make_mixture(), check_mixture),
    "mixture by steps": (lambda files: make_mixture(weights_by_step, samples_per_step=12), check_scheduled),
    "bad samples": (lambda files: SkipBadSamples(Numbers(30, bad=BAD), 100), check_skipped),
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_is_seen_as_promised(kind: str, world_size: int, num_workers: int, token_files: list[Path]) -> None:
    """A run that is killed in the middle of an epoch goes on with the same samples, at any number of ranks."""
    make, check = KINDS[kind]
    count = -(-132 // BATCH // world_size)
    whole = Ranks(make(token_files), world_size, num_workers).draw(count)
    check(whole)
    for killed_at in (count // 3, count // 2 + 1)[: 1 if num_workers else 2]:
        first = Ranks(make(token_files), world_size, num_workers)
        seen = first.draw(killed_at)
        for other_size, other_workers in ((world_size, num_workers), (world_size % 3 + 1, 0)):
            num_left = (count - killed_at) * world_size // other_size
            rest = first.resumed(make(token_files), other_size, other_workers).draw(num_left)
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


# ---------------------------------------------------------------------- bad samples


def test_bad_samples_of_own_batches_are_skipped() -> None:
    """The next of the order takes their place, in the next batch too; a resume inside a batch goes on with the rest."""
    dataset = SkipBadSamples(Numbers(12, bad=(1, 5, 11)), 100)
    batches = [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9, 10, 11]]
    loader = DataLoader(dataset, batch_sampler=batches)
    with DataFeed(loader, seed=1, rank=0, world_size=1, device=CPU) as feed:
        feed.start()
        assert [next(feed).tolist() for _ in range(4)] == [[0, 2, 2], [3, 4, 6], [6, 7], [8, 9, 10, 0]]
        assert feed.bad_samples is not None
        assert [(bad.name, bad.substitute) for bad in feed.bad_samples.new] == [("1", "2"), ("5", "6"), ("11", "0")]
        assert feed.bad_samples.new[0].error == "OSError: no block 1"


def test_a_data_set_that_cannot_be_read_at_all_ends_the_run() -> None:
    """After nine samples of the order in a row."""
    dataset = SkipBadSamples(Numbers(30, bad=tuple(range(2, 30))), 100)
    with DataFeed(DataLoader(dataset, 1), seed=1, rank=0, world_size=1, device=CPU) as feed:
        feed.start()
        assert [next(feed).item() for _ in range(2)] == [0, 1]
        with pytest.raises(TrainingError, match=r"Sample 2 could not be read .*no block 2.*nor could the 8 after it"):
            next(feed)


def test_only_training_data_is_skipped() -> None:
    """An evaluation counts each sample, so the error of a bad one is raised."""
    dataset = SkipBadSamples(Numbers(4, bad=(2,)), 100)
    assert len(dataset) == 4
    assert dataset[3] == 3
    with pytest.raises(OSError, match="no block 2"):
        list(DataLoader(dataset, 2))
    for wrong in (iter([]), Stream()):
        with pytest.raises(TypeError, match="`dataset` must have"):
            SkipBadSamples(wrong, 1)
    with pytest.raises(ValueError, match="`max_failures` must be at least 0"):
        SkipBadSamples(dataset, -1)


# ---------------------------------------------------------------------- mixtures


def test_a_mixture_is_indexed_in_order() -> None:
    """Outside the trainer, too, its samples have the shares of the weights."""
    mixture = make_mixture({"a": 1, "b": 1, "c": 0})
    numbers = [n for batch in DataLoader(mixture, BATCH) for n in batch.tolist()]
    assert numbers == list(mixture) == [mixture[i - 40] for i in range(40)]
    assert abs(sum(n < 100 for n in numbers) - 20) <= 1
    assert [n for n in numbers if n < 100][:12] == [*range(10), 0, 1]
    assert max(numbers) < 200
    with pytest.raises(IndexError):
        mixture[-41]


def test_what_is_no_mixture_is_refused() -> None:
    """By the name of the source, or the argument."""

    def refused(expected: str, error: type[Exception], *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=expected):
            Mixture(*args, **options)

    two = {"a": A, "b": B}
    refused("`datasets` must map names", TypeError, [A, B], {"a": 1})
    refused("'a' must be a map-style data set", TypeError, {"a": Stream()}, {"a": 1})
    refused("'b' is empty", ValueError, {"a": A, "b": Numbers(0)}, {"a": 1, "b": 1})
    refused("'a' is a SkipBadSamples. Put it around", TypeError, {"a": SkipBadSamples(A, 1)}, {"a": 1})
    refused("for each source, 'a', 'b', but are", ValueError, two, {"a": 1})
    refused("numbers from 0 on", ValueError, two, {"a": 1, "b": -1})
    refused("numbers from 0 on", ValueError, two, {"a": 0, "b": 0})
    refused("numbers from 0 on", ValueError, two, {"a": 1, "b": float("nan")})
    refused("`samples_per_step` must say", ValueError, two, weights_by_step)
    refused("must begin at 1 and rise", ValueError, two, [(2, {"a": 1, "b": 1})], samples_per_step=4)
    refused("for each source", ValueError, two, [(1, {"a": 1, "b": 1}), (5, {"a": 1})], samples_per_step=4)
    listed = Mixture(two, [(1, {"a": 1, "b": 0}), (3, {"a": 0, "b": 1})], samples_per_step=4, num_samples=16)
    assert [n // 100 for n in pickle.loads(pickle.dumps(listed))] == [0] * 8 + [1] * 8


def test_a_mixture_that_counts_other_steps_than_the_run_says_so() -> None:
    """Its weights would change at other steps than the user means."""
    mixture = make_mixture(lambda step: {"a": 1, "b": 1, "c": 1}, samples_per_step=12)
    with pytest.warns(TrainloopWarning, match="a step has 12 samples, but a step of this run has 8"):
        check_samples_per_step(DataLoader(SkipBadSamples(mixture, 1), 4), 2)
    check_samples_per_step(DataLoader(mixture, 4), 3)


def test_other_weights_at_the_resume_are_refused() -> None:
    """In the middle of an epoch they would give its samples twice or never."""
    first = Ranks(make_mixture(), 1, 0)
    first.draw(3)
    with pytest.raises(
        ValueError, match=r"The Mixture \(shuffled\) of .* gives another order.*arguments of the saved run"
    ):
        first.resumed(make_mixture({"a": 1, "b": 1, "c": 1}), 1, 0)


# ---------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("form", ["ddp2", pytest.param("ddp3", marks=pytest.mark.slow)])
def test_runs_log_what_they_skip_and_mix(form: str, tmp_path: Path) -> None:
    """All ranks count the same, a resumed run counts on, and too many bad samples end the run on every rank. It makes
    no difference that the first life fetches batches ahead and the second one doesn't.
    """
    launch(Path(__file__).parent / "workers" / "data_sets.py", form, str(tmp_path))
    ranks = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(NUM_PROCESSES[form])]
    first, whole = ranks[0], ranks[0]["whole"]
    assert all(rank["error"] == first["error"] for rank in ranks)
    error, text, step = first["error"]
    assert error == "TrainingError"
    assert re.match(
        rf"Step {step + 1}: \d samples could not be read, more than the 1 .*'a': OSError: no such block", text
    )
    for rank in ranks:
        lives = rank["lives"]
        assert [life["num_ahead"] for life in lives] == [data_sets.KILLED_AT, 0]
        assert rank["whole"]["logged"] == whole["logged"]
        assert lives[0]["seen"] + lives[1]["seen"] == rank["whole"]["seen"]
        assert lives[0]["logged"] + lives[1]["logged"] == rank["whole"]["logged"]
        assert lives[1]["weights"] == whole["weights"]
        assert not {n % 100 for n in rank["whole"]["seen"] if n < 100} & {0, 7, 14}
    assert first["lives"][0]["skipped"] + first["lives"][1]["skipped"] == whole["skipped"]
    assert whole["logged"][-1]["bad_samples"] == len(whole["skipped"]) > 2
    told = r"sample \d+ of 'a' could not be read on rank \d, so sample \d+ of '[ab]' is used instead"
    assert re.search(told, whole["skipped"][0])
    shares = whole["logged"][-1]["share"]
    assert abs(shares["a"] - 0.75) < 0.05
    assert shares["a"] + shares["b"] == 1
