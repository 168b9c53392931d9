"""Bad input is named: which file, which row, and what to do."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hvdlm.errors import ConfigError, DataError
from hvdlm.sources import open_files
from tests.unit.test_sources_files import record

LINES = [f"row {number} {number * 7919 % 10007}" for number in range(2000)]
TEXT = "".join(line + "\n" for line in LINES).encode()


def opened(path: Path | str | list[str], **more: Any) -> Any:
    return open_files(path, **more)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def test_nothing_is_given() -> None:
    with pytest.raises(DataError, match="no files are given"):
        opened([])


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches '.*\*\.jsonl'.*\nHINT: check the path: ls "):
        opened(tmp_path / "*.jsonl")


def test_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches"):
        opened(tmp_path)


def test_a_file_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: No such file"):
        opened(tmp_path / "none.txt")


def test_urls_that_lead_nowhere() -> None:
    with pytest.raises(DataError, match=r"memory://nowhere/a\.txt: FileNotFoundError"):
        opened("memory://nowhere/a.txt")
    with pytest.raises(DataError, match="no file matches 'memory://nowhere"):
        opened("memory://nowhere/*.txt")
    with pytest.raises(DataError, match=r"(?s)nosuch://a\.txt: ValueError.*HINT: check the URL"):
        opened("nosuch://a.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        opened(tmp_path / "a.txt")


def test_mixed_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    (tmp_path / "b.jsonl").write_text("1\n")
    with pytest.raises(DataError, match=r"different formats: text \(.*a\.txt\), jsonl \(.*b\.jsonl\)"):
        opened(tmp_path / "*")
    assert len(opened(tmp_path / "*", format="text")) == 2


def test_a_name_that_tells_no_format(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_text("x\n")
    with pytest.raises(DataError, match=r"(?s)a\.dat: the name does not tell.*HINT: pass format="):
        opened(tmp_path / "a.dat")


def test_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(ConfigError, match="format is 'csv'; allowed: auto, jsonl"):
        opened(tmp_path / "a.txt", format="csv")
    with pytest.raises(ConfigError, match="block_bytes is 0"):
        opened(tmp_path / "a.txt", block_bytes=0)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="no rows in"):
        opened(tmp_path / "*")


@pytest.mark.parametrize("row", [5, -6])
def test_rows_out_of_range(tmp_path: Path, row: int) -> None:
    (tmp_path / "a.txt").write_text("x\n" * 5)
    with pytest.raises(IndexError, match=f"row {row} of a data set of 5 rows"):
        opened(tmp_path / "a.txt")[row]


@pytest.mark.parametrize("content", [b"{broken", b"", b"\xff\xfe"])
def test_a_row_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n[]\n' + content + b" \n1\n")
    dataset = opened(tmp_path / "a.jsonl")
    assert dataset[1] == [] and dataset[3] == 1
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: the row is no"):
        dataset[2]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"(?s)a\.txt, row 0: the row is not UTF-8.*HINT: convert"):
        opened(tmp_path / "a.txt")[0]


@pytest.mark.parametrize(
    ("suffix", "data"),
    [
        (".gz", gzip.compress(TEXT)),
        (".gz", gzip.compress(TEXT[:9000]) + gzip.compress(TEXT[9000:])),
        (".zst", zstandard.ZstdCompressor(write_checksum=True).compress(TEXT)),
        (".xz", lzma.compress(TEXT)),
    ],
)
def test_compressed_and_truncated_or_damaged(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DataError, match=r"a\.txt\.\w+, row \d+: its \w+ data ends in the middle: the file is trunc"):
        opened(path)
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0x55
    path.write_bytes(broken)
    with pytest.raises(DataError, match=r"a\.txt\.\w+, row \d+: its \w+ data is damaged"):
        opened(path)


def test_truncation_names_the_row_it_is_in(tmp_path: Path) -> None:
    data = gzip.compress(TEXT[:9000]) + gzip.compress(TEXT[9000:])
    whole = TEXT[:9000].count(b"\n")
    (tmp_path / "a.txt.gz").write_bytes(data[: len(gzip.compress(TEXT[:9000])) + 3])
    with pytest.raises(DataError, match=f"row {whole}: "):
        opened(tmp_path / "a.txt.gz")


def test_a_name_that_promises_compression(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(TEXT)
    with pytest.raises(DataError, match=r"a\.txt\.gz: is named like gzip but is not compressed by it"):
        opened(tmp_path / "a.txt.gz")
    (tmp_path / "b.txt").write_bytes(gzip.compress(TEXT))
    assert opened(tmp_path / "b.txt")[7] == LINES[7]


def test_tfrecords_truncated_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    data = b"".join(record(line.encode()) for line in LINES[:100])
    path.write_bytes(data[:-3])
    with pytest.raises(DataError, match=r"a\.tfrecord, row 99: .* bytes are left .*: the file is truncated"):
        opened(path)
    start = len(b"".join(record(line.encode()) for line in LINES[:42]))
    for at, message in ((start + 14, "the checksum of the record is wrong"), (start + 3, "of the record's length")):
        broken = bytearray(data)
        broken[at] ^= 1
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"row 42: .*{message}"):
            opened(path)
    path.write_bytes(TEXT)
    with pytest.raises(DataError, match=r"row 0: .*holds no TFRecords"):
        opened(path)


def test_damage_after_the_index_was_made(tmp_path: Path) -> None:
    """With its size and times as they were, only the checksum tells."""
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(record(line.encode()) for line in LINES[:100]))
    status = path.stat()
    opened(path)
    broken = bytearray(path.read_bytes())
    broken[len(b"".join(record(line.encode()) for line in LINES[:42])) + 14] ^= 1
    path.write_bytes(broken)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    dataset = opened(path)
    assert dataset[41] == LINES[41].encode()
    with pytest.raises(DataError, match="row 42: the checksum of the record is wrong"):
        dataset[42]


def test_parquet_truncated_damaged_or_something_else(tmp_path: Path) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": LINES}), stream, row_group_size=100, compression="zstd", use_dictionary=False)
    path = tmp_path / "a.parquet"
    for data in (stream.getvalue()[:-100], TEXT, b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
            opened(path)
    path.write_bytes(gzip.compress(stream.getvalue()))
    with pytest.raises(DataError, match=r"a\.parquet: is compressed as a whole"):
        opened(path)
    broken = bytearray(stream.getvalue())
    broken[60:300] = bytes(240)
    path.write_bytes(broken)
    dataset = opened(path)
    assert dataset[150] == {"text": LINES[150]}
    with pytest.raises(DataError, match=r"a\.parquet, row 0: cannot be read \("):
        dataset[1]


def test_parquet_of_different_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: its columns are \(text: int64\), those of .*a\.parquet"):
        opened(tmp_path / "*.parquet")


@pytest.mark.parametrize("change", ["longer", "shorter", "same size", "gone"])
@pytest.mark.parametrize("kind", ["txt", "txt.gz", "parquet"])
def test_a_file_that_changes_under_the_data_set(tmp_path: Path, change: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": LINES}), path, row_group_size=100)
    else:
        path.write_bytes(TEXT if kind == "txt" else gzip.compress(TEXT))
    dataset = opened(path, block_bytes=1000)
    data = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes({"longer": data + b"x\n", "shorter": data[:-10], "same size": data}[change])
        if change == "same size":
            os.utime(path, ns=(1, 1))
    message = "cannot be read" if change == "gone" else "has changed since it was indexed"
    with pytest.raises(DataError, match=rf"a\.{kind}.*: .*{message}"):
        dataset[1000]


def test_a_file_that_changes_between_two_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    dataset = opened(path, block_bytes=1000)
    assert dataset[0] == LINES[0]
    path.write_bytes(TEXT[1000:] + TEXT[:1000])
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.txt, row 1000: the file has changed since it was indexed"):
        dataset[1000]


def test_a_remote_file_that_changes() -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://changing/a.txt", "wb") as stream:
        stream.write(b"one\ntwo\n")
    dataset = opened("memory://changing/a.txt")
    with fsspec.open("memory://changing/a.txt", "wb") as stream:
        stream.write(b"two\none\n")
    with pytest.raises(DataError, match=r"memory://.*a\.txt: the file has changed since it was indexed"):
        dataset[0]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("zstandard", "a.txt.zst"),
        ("pyarrow", "a.parquet"),
        ("google_crc32c", "a.tfrecord"),
        ("fsspec.core", "memory://a.txt"),
    ],
)
def test_modules_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails now
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(TEXT))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.tfrecord").write_bytes(record(b"x"))
    with pytest.raises(
        DataError, match=rf"(?s)needs {module}, which is not installed.*HINT: pip install 'hvdlm\[data\]'"
    ):
        opened(name if "://" in name else tmp_path / name)


def test_without_optional_modules_text_is_read() -> None:
    code = """
import sys
for name in ("fsspec", "google_crc32c", "pyarrow", "zstandard", "torch", "tensorflow", "keras", "horovod"):
    sys.modules[name] = None
import gzip, tempfile
from hvdlm.sources import open_files
with tempfile.TemporaryDirectory() as directory:
    with gzip.open(directory + "/a.jsonl.gz", "wt") as stream:
        stream.write("1\\n2\\n")
    assert list(open_files(directory + "/*.gz", cache_dir=directory)) == [1, 2]
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_row_with_much_text_is_shown_in_short(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{" + "x" * 10_000 + "\n" + json.dumps("ok") + "\n")
    with pytest.raises(DataError) as caught:
        opened(tmp_path / "a.jsonl")[0]
    assert len(str(caught.value)) < 400
