"""``hvdlm partition``: figures, chart, files and mistakes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from hvdlm.algorithms.hashing import hash_keys
from hvdlm.algorithms.partition import split_shares
from hvdlm.algorithms.rendezvous import slot_homes
from hvdlm.algorithms.slots import home_of
from hvdlm.cli.partition import partition
from hvdlm.errors import HvdlmError


def report(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(partition, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    loaded = json.loads(result.output)
    assert isinstance(loaded, dict)
    return loaded


def test_figures_of_unequal_workers() -> None:
    got = report("--num-samples", 1_000_000, "--weights", "1,2,3,4,5,6,7", "--batch-size", 1000)
    shares = (1000 * split_shares(1000, range(1, 8))).tolist()
    assert [row["count"] for row in got["workers"]] == shares
    assert [row["share"] for row in got["workers"]] == [count / 10**6 for count in shares]
    assert sum(row["home_count"] for row in got["workers"]) == 10**6
    assert 1 <= got["skew"] <= 1.01
    assert 0 < got["spill_fraction"] < 0.06
    assert got["num_batches"] == 1000
    assert got["resize"] is None


@pytest.mark.parametrize(("before", "after"), [(8, 9), (9, 8)])
def test_figures_of_a_resize(before: int, after: int) -> None:
    resize = report("--num-samples", 10**6, "--workers", before, "--resize-to", after)["resize"]
    assert resize["num_workers"] == after
    assert resize["least_fraction"] == pytest.approx(1 / 9)
    assert resize["moved_fraction"] <= 1.05 / 9


def test_short_last_batch_and_workers_of_weight_zero() -> None:
    got = report("--num-samples", 10, "--weights", "0,1,1", "--batch-size", 4, "--resize-to", 4)
    assert [row["count"] for row in got["workers"]] == [0, 5, 5]
    assert got["workers"][0]["home_count"] == 0
    assert got["num_batches"] == 3
    assert got["resize"]["weights"] == [0, 1, 1, 1]


@pytest.mark.parametrize("strategy", ["random", "contiguous"])
def test_strategies_without_homes(strategy: str) -> None:
    got = report("--num-samples", 1000, "--workers", 2, "--strategy", strategy, "--resize-to", 3, "--batch-size", 10)
    assert got["spill_fraction"] is None
    assert [row["home_count"] for row in got["workers"]] == [None, None]
    # Of 10 places, 5 + 5 become 4 + 3 + 3: those from 5 to 7 on stay, as do the first 4.
    assert got["resize"]["moved_fraction"] == pytest.approx(0.4)


def test_a_huge_data_set_is_counted_without_going_through_it() -> None:
    got = report("--num-samples", 10**18, "--workers", 1000)
    assert sum(row["count"] for row in got["workers"]) == 10**18
    assert sum(row["home_count"] for row in got["workers"]) == 10**18


def test_rows_of_files(tmp_path: Path) -> None:
    odd = tmp_path / "a dir; with 'odd' name"
    (odd / "sub").mkdir(parents=True)
    (odd / "text.txt").write_text("one\n\nthree")
    (odd / "sub" / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    (odd / ".hidden").write_text("no\n")
    assert report("--data", odd, "--workers", 2)["num_samples"] == 5
    assert report("--data", odd / "text.txt", "--workers", 2)["num_samples"] == 3


def test_rows_are_placed_by_a_column(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    names = [f"document {n // 10}" for n in range(1000)]
    file.write_text("".join(json.dumps({"doc": name}) + "\n" for name in names))
    got = report("--data", file, "--key", "doc", "--workers", 3, "--seed", 5)
    expected = home_of(hash_keys(names), slot_homes([1] * 3), 5)
    assert [row["home_count"] for row in got["workers"]] == [int((expected == worker).sum()) for worker in range(3)]
    assert all(row["home_count"] % 10 == 0 for row in got["workers"])


def test_rows_of_everything_that_is_read_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVDLM_CACHE_DIR", str(tmp_path / "cache"))
    names = [f"document {n // 10}" for n in range(200)]
    lines = "".join(json.dumps({"doc": name}) + "\n" for name in names).encode()
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    pq.write_table(pa.table({"doc": names}), tmp_path / "rows.parquet")
    plain = report("--data", tmp_path / "rows.jsonl", "--key", "doc", "--workers", 3)
    for path in ("rows.jsonl.gz", "rows.parquet", "*.gz"):
        assert report("--data", tmp_path / path, "--workers", 3)["num_samples"] == 200
        assert report("--data", tmp_path / path, "--key", "doc", "--workers", 3) == plain
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(b"[1]\n"))
    for arguments, told in (
        ([tmp_path / "rows.parquet", "--key", "day"], "rows.parquet, row 0 has no column 'day'; it has: 'doc'"),
        ([tmp_path / "list.jsonl.gz", "--key", "doc"], "list.jsonl.gz, row 0 holds a list"),
        ([tmp_path / "cut.jsonl.gz"], r"cut.jsonl.gz, row \d+: its gzip data ends in the middle"),
        (["memory://nowhere/a.jsonl"], "memory://nowhere/a.jsonl"),
    ):
        with pytest.raises(HvdlmError, match=told):
            report("--data", *arguments, "--workers", 3)


def test_table_and_chart() -> None:
    result = CliRunner().invoke(
        partition, ["--num-samples", "1000", "--weights", "1,3", "--resize-to", "3"], catch_exceptions=False
    )
    for text in ("250", "750", "25.00%", "75.00%", "█" * 10, "skew ", "spill_fraction ", "moved_fraction "):
        assert text in result.output
    long = CliRunner().invoke(partition, ["--num-samples", "1000", "--workers", "100"], catch_exceptions=False)
    assert "... and 36 more; --json shows all" in long.output


MISTAKES = [
    ("--num-samples 5", "neither --workers nor --weights"),
    ("--workers 2", "neither --num-samples nor --data was given"),
    ("--workers 2 --num-samples 5 --data text.txt", "both --num-samples and --data"),
    ("--workers 0 --num-samples 5", "--workers is 0; allowed: 1 to 65,536"),
    ("--workers 70000 --num-samples 5", "--workers is 70000"),
    ("--workers 2 --num-samples 0", "--num-samples is 0"),
    ("--workers 2 --num-samples 4611686018427387905", "--num-samples is 4611686018427387905"),
    ("--workers 2 --num-samples 5 --batch-size 0", "--batch-size is 0"),
    ("--workers 2 --num-samples 5 --resize-to 0", "--resize-to is 0"),
    ("--weights 0,1 --num-samples 5 --resize-to 1", "leaves only workers of weight 0"),
    ("--weights 1,-1 --num-samples 5", "weight of worker 1 is -1.0"),
    ("--weights nan,1 --num-samples 5", "weight of worker 0 is nan"),
    ("--weights 0,0 --num-samples 5", "all weights are 0"),
    ("--weights 1,x --num-samples 5", "--weights is '1,x'"),
    ("--weights 1,2,3 --workers 2 --num-samples 5", "3 weights for 2 workers"),
    ("--workers 2 --num-samples 5 --strategy none", "every worker reads everything"),
    ("--workers 2 --num-samples 5 --strategy hsah", "allowed: 'hash', 'random', 'contiguous'"),
    ("--workers 2 --num-samples 5 --key a", "--key was given without --data"),
    ("--workers 2 --data missing", "missing does not exist"),
    ("--workers 2 --data empty", "empty is a directory without files"),
    ("--workers 2 --data empty.txt", "empty.txt holds no row"),
    ("--workers 2 --data empty.jsonl --key a", "empty.jsonl holds no row"),
    ("--workers 2 --data binary.txt", "binary.txt is not a text file"),
    ("--workers 2 --data binary.jsonl", "binary.jsonl is not a text file"),
    ("--workers 2 --data text.txt --key a", "text.txt is not a JSONL file"),
    ("--workers 2 --data cut.jsonl --key a", "cut.jsonl, line 3 is not valid JSON"),
    ("--workers 2 --data list.jsonl --key a", "list.jsonl, line 1 holds a list"),
    ("--workers 2 --data rows.jsonl --key b", "rows.jsonl, line 1 has no column 'b'; it has: 'a'"),
    ("--workers 2 --data rows.jsonl --key a", r"rows.jsonl, line 2, column 'a': a key is \[1\], a list"),
    ("--workers 2 --data /dev/null", "neither a file nor a directory"),
]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("empty.txt").touch()
    Path("empty.jsonl").write_text("\n")
    Path("binary.txt").write_bytes(b"a\0b")
    Path("binary.jsonl").write_bytes(b"a\0b\n")
    Path("text.txt").write_text("a\n")
    Path("cut.jsonl").write_text('{"a": 1}\n\n{"a":')
    Path("list.jsonl").write_text("[1]\n")
    Path("rows.jsonl").write_text('{"a": "x"}\n{"a": [1]}\n')
    return tmp_path


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_say_what_is_allowed_and_what_to_do(arguments: str, message: str) -> None:
    with pytest.raises(HvdlmError, match=message) as caught:
        CliRunner().invoke(partition, arguments.split(), catch_exceptions=False, standalone_mode=False)
    assert caught.value.hint


def test_the_command_ends_in_a_message_and_loads_no_framework(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    wrong = [sys.executable, "-m", "hvdlm", "partition", "--num-samples", "5", "--weights", "1,-1"]
    result = subprocess.run(wrong, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "HINT:" in result.stderr
    assert "Traceback" not in result.stderr
    code = (
        "import sys; from hvdlm.cli import group\n"
        "group.main(['partition', '--num-samples', '5', '--workers', '2'], standalone_mode=False)\n"
        "print({'torch', 'tensorflow', 'keras', 'horovod'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=60)
    assert output.splitlines()[-1] == "set()"
