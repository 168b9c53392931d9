"""Data sets of files in real processes: jobs of several workers, concurrent indexing, memory, TensorFlow and Keras."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.multiprocess.workers import ROOT, run_workers

NUM_ROWS = 4000


def write_shards(directory: Path) -> None:
    directory.mkdir()
    for number in range(8):
        first = number * NUM_ROWS // 8
        lines = [json.dumps({"x": row, "text": "word " * (row % 40)}) for row in range(first, first + NUM_ROWS // 8)]
        data = "\n".join(lines).encode()
        if number % 2:
            (directory / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
        else:
            (directory / f"{number}.jsonl").write_bytes(data)


def run(script: str, *arguments: object, cwd: Path, timeout: float = 100, **env: str) -> str:
    job = run_workers(
        ["-c", textwrap.dedent(script), *map(str, arguments)], 1, controller=None, cwd=cwd, timeout=timeout, env=env
    )
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    return job.stdout


@pytest.mark.parametrize(("workers", "partition"), [(2, "random"), (3, "hash")])
def test_a_job_reads_every_row_once(tmp_path: Path, workers: int, partition: str) -> None:
    """All workers index the same files at once; then each reads its part of every batch, in loader workers."""
    write_shards(tmp_path / "data")
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            import hvdlm
            from hvdlm.sources import open_files

            torch.set_num_threads(1)
            data = open_files("data/*", block_bytes=4000, cache_dir="cache")
            loader = torch.utils.data.DataLoader(
                data, batch_size=64, shuffle=True, num_workers=1, timeout=60,
                collate_fn=lambda rows: torch.tensor([[float(row["x"])] for row in rows]),
            )
            net = torch.nn.Linear(1, 1)
            net, optimizer, loader = hvdlm.wrap(
                net, torch.optim.SGD(net.parameters(), lr=1e-9), loader, partition=sys.argv[1]
            )
            for x in loader:
                optimizer.zero_grad()
                net(x).mean().backward()
                optimizer.step()
                with open(f"seen-{hvdlm.rank()}", "a") as seen:
                    seen.writelines(f"{int(value)}\\n" for value in x.flatten().tolist())
            """
        )
    )
    job = run_workers([str(script), partition], workers, controller="mpi", cwd=tmp_path, timeout=110)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    seen = [[int(line) for line in (tmp_path / f"seen-{rank}").read_text().split()] for rank in range(workers)]
    assert sorted(row for rows in seen for row in rows) == list(range(NUM_ROWS))
    assert all(abs(len(rows) - NUM_ROWS / workers) < 100 for rows in seen)
    (summary,) = tmp_path.glob("hvdlm-runs/*/summary.json")
    found = json.loads(summary.read_text())
    assert (found["samples_seen"], found["samples_missing"], found["samples_repeated"]) == (NUM_ROWS, 0, 0)


def test_many_builders_of_one_index(tmp_path: Path) -> None:
    write_shards(tmp_path / "data")
    code = textwrap.dedent(
        """
        import sys, time
        from hvdlm.sources import PackedBlocks, open_files
        print("ready", flush=True)
        sys.stdin.readline()
        data = open_files("data/*", cache_dir="cache", block_bytes=100)
        assert [row["x"] for row in data] == list(range(4000))
        blocks = PackedBlocks(data, lambda row: [row["x"]], 8, cache_dir="cache")
        assert blocks[100].tolist() == list(range(800, 808)) and len(blocks) == 500
        """
    )
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for job in jobs:
            assert job.stdout is not None and job.stdout.readline() == "ready\n"
        for job in jobs:
            assert job.stdin is not None
            job.stdin.write("\n")
            job.stdin.flush()
        for job in jobs:
            _, err = job.communicate(timeout=60)
            assert job.returncode == 0, err[-3000:]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    # One whole entry for each file, nothing half made.
    entries = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(entries) == 9 and not [name for name in entries if name.startswith(".")]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_data_larger_than_the_memory_it_takes(tmp_path: Path, kind: str) -> None:
    """300 MB of rows are indexed and read, in order and shuffled, in a fraction of that."""
    out = run(
        """
        import gzip, json, sys

        kind, name = sys.argv[1], "data." + sys.argv[1]
        lines = [json.dumps({"id": number, "text": "word " * 200}) + "\\n" for number in range(1000)]
        if kind == "parquet":
            import pyarrow as pa, pyarrow.parquet as pq
            table = pa.table({"id": range(300_000), "text": ["word " * 200] * 300_000})
            # One row group: nothing but reading it in parts keeps it out of memory.
            pq.write_table(table, name, row_group_size=300_000, use_dictionary=False)
        else:
            piece = "".join(lines).encode()
            with open(name, "wb") as stream:
                for _ in range(300):
                    stream.write(gzip.compress(piece, 1) if kind.endswith("gz") else piece)
        print("rows")
        """,
        kind,
        cwd=tmp_path,
    )
    assert out == "rows\n"
    out = run(
        """
        import json, resource, sys
        import numpy as np
        from hvdlm.sources import open_files
        if sys.argv[1] == "parquet":
            import pyarrow.parquet

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        before = peak()
        data = open_files("data." + sys.argv[1], cache_dir="cache")
        assert len(data) == 300_000
        order = data.block_order(1, batch_size=64, lanes=4)
        for row in [*range(0, 300_000, 1500), *order(np.arange(0, 300_000, 97))[:300].tolist()]:
            assert data[row]["id"] == (row if sys.argv[1] == "parquet" else row % 1000)
        data.close()
        print(peak() - before)
        """,
        kind,
        cwd=tmp_path,
    )
    assert float(out) < 250, "MB"


def test_tensorflow_and_keras(tmp_path: Path) -> None:
    """Records that TensorFlow writes are read without it, and its loaders read from a data set of files."""
    out = run(
        """
        import math
        import numpy as np
        import keras
        import tensorflow as tf
        from hvdlm.sources import open_files

        rows = [f"record {number}".encode() * (number % 5) for number in range(300)]
        for number, compression in enumerate(("", "GZIP")):
            name = f"data.tfrecord-0000{number}-of-00002" + (".gz" if compression else "")
            with tf.io.TFRecordWriter(name, tf.io.TFRecordOptions(compression_type=compression)) as writer:
                for row in rows:
                    writer.write(row)
        data = open_files("data.tfrecord*", cache_dir="cache", block_bytes=500)
        assert list(data) == rows + rows

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return math.ceil(len(data) / 32)

            def __getitem__(self, number):
                some = data.__getitems__(range(number * 32, min(number * 32 + 32, len(data))))
                lengths = np.array([[float(len(row))] for row in some])
                return lengths, lengths

        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        model.fit(Batches(workers=2, use_multiprocessing=False), verbose=0)

        read = tf.data.Dataset.range(len(data)).map(
            lambda row: tf.numpy_function(lambda row: data[int(row)], [row], tf.string), num_parallel_calls=2
        )
        assert list(read.as_numpy_iterator()) == rows + rows
        print("done")
        """,
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="",
        KERAS_BACKEND="tensorflow",
    )
    assert "done" in out
