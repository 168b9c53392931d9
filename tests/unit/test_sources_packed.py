"""Blocks of tokens, and padding."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from hvdlm.errors import ConfigError, DataError
from hvdlm.sources import PackedBlocks, open_files, pad_batch

ROWS = [f"{number} " * (number % 9) for number in range(500)]


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("separator", [None, 70_000])
def test_blocks_are_the_rows_end_to_end(tmp_path: Path, separator: int | None) -> None:
    (tmp_path / "a.txt").write_text("\n".join(ROWS))
    blocks = PackedBlocks(
        open_files(tmp_path / "a.txt", cache_dir=tmp_path), letters, 64, separator=separator, cache_dir=tmp_path
    )
    expected = [token for row in ROWS for token in letters(row) + ([] if separator is None else [separator])]
    assert len(blocks) == len(expected) // 64 and blocks.num_tokens == len(expected)
    assert np.concatenate(list(blocks)).tolist() == expected[: len(blocks) * 64]  # type: ignore[call-overload]
    assert blocks[0].dtype == np.int64 and blocks[-1].tolist() == blocks[len(blocks) - 1].tolist()
    with pytest.raises(IndexError, match=f"block {len(blocks)} of {len(blocks)}"):
        blocks[len(blocks)]
    loader: DataLoader[Any] = DataLoader(
        blocks,  # type: ignore[arg-type]
        batch_size=4,
        num_workers=1,
        timeout=60,
        multiprocessing_context="spawn",  # earlier tests may have left threads, with which forking can hang
    )
    loaded = [block for batch in loader for block in batch]
    assert [block.tolist() for block in loaded] == [block.tolist() for block in blocks]  # type: ignore[attr-defined]
    assert pickle.loads(pickle.dumps(blocks))[3].tolist() == blocks[3].tolist()


def test_tokens_are_made_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def counting(text: str) -> list[int]:
        calls.append(text)
        return letters(text)

    first = PackedBlocks(ROWS, counting, 10, cache_dir=tmp_path)
    assert len(calls) >= 500
    calls.clear()
    second = PackedBlocks(ROWS, counting, 20, cache_dir=tmp_path)
    assert len(calls) <= 16
    assert second.num_tokens == first.num_tokens and second.fingerprint != first.fingerprint
    # Other tokens, rows, separators or versions are another data set.
    others: list[dict[str, Any]] = [
        {"tokenize": lambda text: [1, *letters(text)]},
        {"dataset": ROWS[1:]},
        {"separator": 0},
        {"version": "2"},
    ]
    for other in others:
        PackedBlocks(**{"dataset": ROWS, "tokenize": letters, "block_size": 10, "cache_dir": tmp_path, **other})
    assert len(list((tmp_path / "tokens").iterdir())) == 5


def test_tokens_are_not_loaded(tmp_path: Path) -> None:
    blocks = PackedBlocks(range(2000), lambda row: np.full(5000, row), 1000, cache_dir=tmp_path)  # type: ignore[arg-type]
    assert blocks.num_tokens == 10_000_000
    tracemalloc.start()
    assert [int(blocks[number][0]) for number in range(0, 10_000, 500)] == list(range(0, 2000, 100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_bad_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    rows = open_files(tmp_path / "a.txt", cache_dir=tmp_path)

    def failing(text: str) -> list[int]:
        if text == "two":
            raise KeyError("unknown")
        return [1]

    for tokenize, message in (
        (failing, r"a\.txt, row 1: tokenize raised KeyError: 'unknown'"),
        (lambda text: [-1], r"a\.txt, row 0: token ids are -1 to -1"),
        (lambda text: [2**32], r"row 0: token ids are"),
        (lambda text: [0.5], r"row 0: tokenize gave an array of float64"),
        (lambda text: [[1]], r"row 0: tokenize gave an array of int64 and shape \(1, 1\)"),
        (lambda text: {"input_ids": [1]}, r"(?s)row 0: tokenize gave an array of object.*HINT: with a tokenizer of"),
    ):
        with pytest.raises(DataError, match=message):
            PackedBlocks(rows, tokenize, 1, cache_dir=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"has 6 tokens, fewer than the 7 of one block"):
        PackedBlocks(rows, letters, 7, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="block_size is 0"):
        PackedBlocks(rows, letters, 0, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="separator is -1"):
        PackedBlocks(rows, letters, 1, separator=-1, cache_dir=tmp_path)
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".u4"]  # the one that was too short


def test_padding() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": np.array([2, 3, 4]), "weight": 0.5},
        {"input_ids": [], "labels": [], "weight": 1.0},
        {"input_ids": [7, 8], "labels": [8, 9], "weight": 2.0},
    ]
    batch = pad_batch(rows, pad=9, multiple_of=4)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [9, 9, 9, 9], [7, 8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 4, -100], [-100] * 4, [8, 9, -100, -100]]
    assert batch["weight"].tolist() == [0.5, 1.0, 2.0]
    assert {array.dtype.kind for name, array in batch.items() if name != "weight"} == {"i"}
    left = pad_batch(rows, side="left", max_length=2, pads={"labels": 0})
    assert left["input_ids"].tolist() == [[1, 2], [0, 0], [7, 8]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert left["labels"].tolist() == [[2, 3], [0, 0], [8, 9]]
    one = pad_batch([{"input_ids": [1], "attention_mask": [0]}, {"input_ids": [1, 2], "attention_mask": [1, 1]}])
    assert one["attention_mask"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], {}, "no rows to pad"),
        ([{"a": [1]}, {"b": [1]}], {}, r"row 1 of the batch has \['b'\], row 0 has \['a'\]"),
        ([[1], 2], {}, "a number in some rows"),
        (["text"], {}, "neither a number nor a sequence"),
        ([[[1], [2, 3]]], {}, "neither a number nor a sequence"),
        ([[1]], {"side": "up"}, "side is 'up'"),
        ([[1]], {"multiple_of": 0}, "multiple_of is 0"),
        ([[1]], {"max_length": 0}, "max_length 0"),
    ],
)
def test_bad_rows_to_pad(rows: list[Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((DataError, ConfigError), match=message):
        pad_batch(rows, **arguments)
