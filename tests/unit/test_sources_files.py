"""Rows of real files: every format, every compression, in any order."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hvdlm.sources import FileDataset, open_files
from hvdlm.sources.compressed import Cursor
from hvdlm.sources.index import format_of, load_or_build, write_atomically

NUM_ROWS = 3000
TEXTS = [f"row {number} é" + " word" * (number % 17) for number in range(NUM_ROWS)]


def record(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def plain(kind: str) -> tuple[list[Any], list[bytes]]:
    """Rows and how they are stored."""
    if kind == "text":
        return list(TEXTS), [text.encode() + b"\n" for text in TEXTS]
    if kind == "jsonl":
        rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
        return list(rows), [json.dumps(row).encode() + b"\n" for row in rows]
    return [text.encode() for text in TEXTS], [record(text.encode()) for text in TEXTS]


def parts(stored: list[bytes]) -> list[bytes]:
    return [b"".join(stored[start : start + 400]) for start in range(0, len(stored), 400)]


def xz_blocks(data: bytes, path: Path) -> bytes:
    path.write_bytes(data)
    return subprocess.run(
        ["xz", "--stdout", "--block-size=20000", str(path)], capture_output=True, check=True, timeout=30
    ).stdout


CODECS: dict[str, tuple[str, Callable[[list[bytes], Path], bytes]]] = {
    "plain": ("", lambda stored, path: b"".join(stored)),
    "gzip": (".gz", lambda stored, path: gzip.compress(b"".join(stored))),
    "gzip-members": (".gz", lambda stored, path: b"".join(map(gzip.compress, parts(stored))) + b"\0" * 64),
    "zstd": (".zst", lambda stored, path: zstandard.compress(b"".join(stored))),
    "zstd-frames": (".zst", lambda stored, path: b"".join(map(zstandard.compress, parts(stored)))),
    "xz": (".xz", lambda stored, path: lzma.compress(b"".join(stored))),
    "xz-blocks": (".xz", lambda stored, path: xz_blocks(b"".join(stored), path)),
    "xz-streams": (
        ".xz",
        lambda stored, path: b"\0\0\0\0".join(xz_blocks(part, path) for part in parts(stored)) + b"\0" * 8,
    ),
}
SUFFIXES = {"text": ".txt", "jsonl": ".jsonl", "tfrecord": ".tfrecord"}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", SUFFIXES)
def test_rows_in_any_order(kind: str, codec: str, tmp_path: Path) -> None:
    if codec.startswith("xz-") and not shutil.which("xz"):
        pytest.skip("no xz")
    rows, stored = plain(kind)
    suffix, compress = CODECS[codec]
    for number, start in enumerate(range(0, NUM_ROWS, 1000)):
        data = compress(stored[start : start + 1000], tmp_path / "scratch")
        (tmp_path / f"part-{number}{SUFFIXES[kind]}{suffix}").write_bytes(data)
    # Less than the blocks of one file stay in memory.
    dataset = open_files(str(tmp_path / "part-*"), cache_dir=tmp_path / "cache", block_bytes=3000, cache_bytes=20_000)
    assert dataset.kind == kind
    assert len(dataset.files) == 3 and len(dataset) == NUM_ROWS
    assert len(dataset.first_rows) > 20
    assert list(dataset) == rows
    shuffled = np.random.default_rng(0).permutation(NUM_ROWS)[:300].tolist()
    assert [dataset[row] for row in shuffled] == [rows[row] for row in shuffled]
    assert dataset.__getitems__(shuffled) == [rows[row] for row in shuffled]
    order = dataset.block_order(5, batch_size=32)(np.arange(NUM_ROWS)).tolist()
    assert sorted(order) == list(range(NUM_ROWS))
    assert [dataset[row] for row in order] == [rows[row] for row in order]
    assert dataset[-1] == rows[-1] and dataset[np.int64(7)] == rows[7]
    assert dataset.where(2001) == f"{tmp_path}/part-2{SUFFIXES[kind]}{suffix}, row 1"


@pytest.mark.parametrize("codec", CODECS)
def test_seek_points_are_where_the_format_has_them(codec: str, tmp_path: Path) -> None:
    if codec.startswith("xz-") and not shutil.which("xz"):
        pytest.skip("no xz")
    rows, stored = plain("text")
    suffix, compress = CODECS[codec]
    path = tmp_path / f"data.txt{suffix}"
    path.write_bytes(compress(stored, tmp_path / "scratch"))
    dataset = open_files(path, cache_dir=tmp_path / "cache", block_bytes=2000)
    index = dataset._indexes[0]
    expected = {"plain": index.num_blocks, "gzip": 1, "zstd": 1, "xz": 1}.get(codec)
    assert len(index.segments()) == expected if expected else 4 < len(index.segments()) < index.num_blocks
    # The last row is right when it is the first to be read.
    assert dataset[NUM_ROWS - 1] == rows[-1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.text(alphabet="aé{}\r\t ", max_size=6), max_size=30),
    ended=st.booleans(),
    block_bytes=st.integers(1, 40),
)
def test_lines_are_those_that_splitting_gives(tmp_path: Path, lines: list[str], ended: bool, block_bytes: int) -> None:
    path = tmp_path / "lines.txt"
    text = "\n".join(lines) + ("\n" if ended and lines else "")
    path.write_bytes(text.encode())
    expected = text.split("\n")
    expected = expected[:-1] if expected[-1] == "" else expected
    expected = [line[:-1] if line.endswith("\r") else line for line in expected]
    os.utime(path, ns=(len(text), hash((text, block_bytes)) % 2**60))
    if not expected:
        return
    dataset = open_files(path, cache_dir=tmp_path / "cache", block_bytes=block_bytes)
    assert list(dataset) == expected


def test_long_chunks_and_seams(tmp_path: Path) -> None:
    """Lines across the 1 MiB pieces that a file is indexed in, with \\r and \\n in different pieces."""
    first = "x" * ((1 << 20) - 1)
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(first[2:]).encode() + b"\r\n\r\n\n" + b'"after"\r\n\r')
    dataset = open_files(path, cache_dir=tmp_path / "cache")
    assert list(dataset) == [first[2:], "after"]


def test_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n[2]\n\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n\nfour\n\n")
    assert list(open_files(tmp_path / "a.jsonl", cache_dir=tmp_path)) == [{"a": 1}, [2]]
    assert list(open_files(tmp_path / "a.txt", cache_dir=tmp_path)) == ["one", "", "", "four", ""]


@pytest.mark.parametrize("block_bytes", [1 << 18, 1000])
@pytest.mark.parametrize("columns", [None, ["text"]])
def test_parquet(tmp_path: Path, block_bytes: int, columns: list[str] | None) -> None:
    rows = [{"id": number, "text": text, "ids": [number, 1]} for number, text in enumerate(TEXTS)]
    for number, start in enumerate(range(0, NUM_ROWS, 1000)):
        table = pa.Table.from_pylist(rows[start : start + 1000])
        pq.write_table(table, tmp_path / f"part-{number}.parquet", row_group_size=300, compression="zstd")
    dataset = open_files(
        tmp_path / "*.parquet",
        cache_dir=tmp_path / "cache",
        columns=columns,
        block_bytes=block_bytes,
        cache_bytes=30_000,
    )
    if columns:
        rows = [{"text": row["text"]} for row in rows]
    assert len(dataset.first_rows) - 1 == 12 if block_bytes > 1000 else len(dataset.first_rows) > 50
    assert list(dataset) == rows
    shuffled = np.random.default_rng(0).permutation(NUM_ROWS)[:200].tolist()
    assert [dataset[row] for row in shuffled] == [rows[row] for row in shuffled]
    order = dataset.block_order(5, batch_size=32, lanes=4)(np.arange(NUM_ROWS)).tolist()
    assert sorted(order) == list(range(NUM_ROWS))
    assert [dataset[row] for row in order[:500]] == [rows[row] for row in order[:500]]
    dataset.close()
    assert dataset[5] == rows[5]
    dataset.close()


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_urls(scheme: str, kind: str, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    root = f"{scheme}://{tmp_path}"
    rows = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
    for number in range(3):
        with fsspec.open(f"{root}/{number}.{kind}", "wb") as stream:
            some = rows[number * 1000 : number * 1000 + 1000]
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(some), stream, row_group_size=100)
            else:
                stream.write("".join(json.dumps(row) + "\n" for row in some).encode())
    for given_ in (f"{root}/*.{kind}", [f"{root}/{number}.{kind}" for number in range(3)], root):
        dataset = open_files(given_, cache_dir=tmp_path.parent / f"{tmp_path.name}-cache", block_bytes=5000)
        assert len(dataset) == NUM_ROWS
        for row in (0, 999, 1000, 2999, 1234):
            assert dataset[row] == rows[row]
    assert dataset.files[0].name == f"{root}/0.{kind}"


def test_directories_and_repeated_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "_SUCCESS", ".hidden/3.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name + "\n")
    cache = tmp_path / "cache"
    assert list(open_files(tmp_path / "data", cache_dir=cache)) == ["a/1.txt", "b/2.txt"]
    both = [tmp_path / "data/b/2.txt", f"{tmp_path}/data/*/*.txt"]
    assert list(open_files(both, cache_dir=cache)) == ["b/2.txt", "a/1.txt"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "jsonl"),
        ("A.JSONL.GZ", "jsonl"),
        ("data.tfrecord-00000-of-00004", "tfrecord"),
        ("data.tfrecord-00000-of-00004.gz", "tfrecord"),
        ("s/x.txt.zst", "text"),
        ("x.pq", "parquet"),
        ("x.json", None),
        ("x.gz", None),
        ("x", None),
    ],
)
def test_format_by_name(name: str, kind: str | None) -> None:
    assert format_of(name) == kind


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n" * 10)
    dataset = open_files(tmp_path / "*.txt", cache_dir=tmp_path / "cache")
    for number in (0, 1, 3):
        (tmp_path / f"{number}.txt").unlink()
    assert [dataset[row] for row in range(20, 30)] == ["2"] * 10
    assert not [link for link in os.listdir("/proc/self/fd") if _points_into(link, tmp_path)]


def _points_into(descriptor: str, directory: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(directory))
    except OSError:
        return False


def test_index_is_made_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one\ntwo\n")
    first = open_files(path, cache_dir=cache)
    (entry,) = (cache / "index").iterdir()
    made = entry.stat().st_mtime_ns
    assert open_files(path, cache_dir=cache).fingerprint == first.fingerprint
    assert [entry.stat().st_mtime_ns] == [made]
    # One that is broken, or was cut off by a full disk, is made again.
    for content in (b"", b"PK\x03\x04 broken", entry.read_bytes()[:200]):
        entry.write_bytes(content)
        assert list(open_files(path, cache_dir=cache)) == ["one", "two"]
    # Another size, another time: another file.
    path.write_text("one\ntwo\nthree\n")
    assert len(open_files(path, cache_dir=cache)) == 3
    path.write_text("a\nb\nc\nd\ne\nf\ng\n")
    os.utime(path, ns=(1, 1))
    assert len(open_files(path, cache_dir=cache)) == 7
    assert len(list((cache / "index").iterdir())) == 3


def test_a_cached_index_is_used(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one\ntwo\n")
    status = path.stat()
    open_files(path, cache_dir=cache)
    path.write_text("one two\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(open_files(path, cache_dir=cache)) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "file").write_text("")
    assert list(open_files(tmp_path / "a.txt", cache_dir=tmp_path / "file")) == ["one"]
    assert "cannot be kept" in caplog.text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def pieces() -> Any:
        yield b"half"
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomically(tmp_path / "entry", pieces())
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_tells_data_apart_and_not_places(tmp_path: Path) -> None:
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.txt").write_text("x\ny\n")
    one, two = (open_files(tmp_path / name, cache_dir=tmp_path / "cache").fingerprint for name in ("one", "two"))
    assert one == two
    (tmp_path / "two/a.txt").write_text("x\nyz\n")
    assert open_files(tmp_path / "two", cache_dir=tmp_path / "cache").fingerprint != one


def test_blocks_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("four\n" * 10)
    dataset = open_files(tmp_path / "a.txt", cache_dir=tmp_path / "cache", block_bytes=10)
    assert dataset.first_rows.tolist() == [0, 2, 4, 6, 8, 10]
    assert dataset.block_of(np.array([0, 1, 2, 9])).tolist() == [0, 0, 1, 4]
    assert repr(dataset) == "FileDataset(text, files=1, rows=10)"


@pytest.fixture
def gzipped(tmp_path: Path) -> FileDataset:
    for number in range(3):
        some = TEXTS[number * 1000 : number * 1000 + 1000]
        (tmp_path / f"{number}.txt.gz").write_bytes(gzip.compress("\n".join(some).encode()))
    return open_files(tmp_path / "*.gz", cache_dir=tmp_path / "cache", block_bytes=2000, cache_bytes=30_000)


@pytest.mark.parametrize("context", ["forkserver", "spawn"])
def test_torch_workers(gzipped: FileDataset, context: str) -> None:
    gzipped[5]  # a reader is open when the workers start
    loader = DataLoader(
        gzipped, batch_size=100, shuffle=True, num_workers=2, multiprocessing_context=context, timeout=60
    )
    rows = [row for batch in loader for row in batch]
    assert sorted(rows) == sorted(TEXTS) and rows != TEXTS


def test_threads_share_a_data_set(gzipped: FileDataset) -> None:
    failures: list[object] = []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(NUM_ROWS)[:150].tolist():
            if gzipped[row] != TEXTS[row]:
                failures.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_pickled_it_reads_on(gzipped: FileDataset) -> None:
    gzipped[5]
    again = pickle.loads(pickle.dumps(gzipped))
    assert again[1500] == TEXTS[1500] and len(again) == NUM_ROWS


def test_memory_of_blocks_is_bounded(gzipped: FileDataset) -> None:
    for row in range(0, NUM_ROWS, 7):
        gzipped[row]
    reader = gzipped._reader
    assert reader is not None and reader._held <= 30_000
    assert reader._held == sum(size for _, size in reader._blocks.values())


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_walking_in_lanes_decompresses_a_file_few_times(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each lane starts once, from the start of the file at worst; then cursors stay where they are."""
    made = 0
    more = Cursor._more

    def counting(cursor: Cursor) -> bytes:
        nonlocal made
        data = more(cursor)
        made += len(data)
        return data

    lines = [f"{number:07d}" + f" {number % 997}" * 150 for number in range(30_000)]
    text = "\n".join(lines).encode()
    suffix, compress = CODECS[codec]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress([text], tmp_path))
    dataset = open_files(path, cache_dir=tmp_path / "cache", block_bytes=50_000, cache_bytes=9_000_000)
    order = dataset.block_order(1, batch_size=8, lanes=8, window=4)(np.arange(len(lines)))
    monkeypatch.setattr(Cursor, "_more", counting)
    assert [dataset[row] for row in order.tolist()] == [lines[row] for row in order.tolist()]
    # Once for all the lanes, and 3.5 times to where they start; gzip's get there together, as forks of one another.
    assert made < {"gzip": 2.5, "zstd": 6.0}[codec] * len(text)
    reader = dataset._reader
    assert reader is not None and len(reader._cursors) <= 9


def test_a_fork_at_any_moment(gzipped: FileDataset, tmp_path: Path) -> None:
    """A process that is forked off while a thread is reading finds a lock that no one will ever release."""
    (tmp_path / "data.pickle").write_bytes(pickle.dumps(gzipped))
    # In an interpreter of its own: forking the one of the tests, which has threads of others, may hang by itself.
    script = """
import multiprocessing, pickle, sys
from torch.utils.data import DataLoader

data = pickle.load(open(sys.argv[1], "rb"))
data[5]
with data._reader._lock:
    child = multiprocessing.get_context("fork").Process(target=data.__getitem__, args=(6,))
    child.start()
child.join(20)
ended = child.exitcode
child.kill()
child.join()
assert ended == 0
rows = [row for batch in DataLoader(data, batch_size=100, shuffle=True, num_workers=2, timeout=60) for row in batch]
assert sorted(rows) == sorted(data[row] for row in range(len(data)))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "data.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr


def test_index_of_the_same_file_in_other_block_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("four\n" * 100)
    (file,) = open_files(tmp_path / "a.txt", cache_dir=tmp_path / "cache").files
    few = load_or_build(file, "text", 1000, tmp_path / "cache")
    many = load_or_build(file, "text", 10, tmp_path / "cache")
    assert (few.num_blocks, many.num_blocks) == (1, 50)
