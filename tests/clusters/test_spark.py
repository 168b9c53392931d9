"""Train functions on Spark: executors that are processes of their own, and DataFrames as data sets."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hvdlm.errors import ConfigError, WorkerFailed
from tests.clusters.test_dask import fails_on_one, train_on_rows
from tests.clusters.trained import check_summary, train_the_gpt_example
from tests.multiprocess.workers import ROOT

pyspark = pytest.importorskip("pyspark")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        shutil.which("java") is None, reason="Spark needs Java: apt-get install openjdk-17-jre-headless"
    ),
]


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Spark keeps its gateway, a Java process, and its threads until this process ends."""


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("spark")
    given = {"PYSPARK_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "SPARK_LOCAL_IP": "127.0.0.1"}
    given["SPARK_HOME"] = str(Path(pyspark.__file__).parent)
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    session = (
        pyspark.sql.SparkSession.builder.master(os.environ.get("TEST_SPARK_MASTER", "local[2]"))
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.local.dir", str(directory))
        .config("spark.sql.warehouse.dir", str(directory / "warehouse"))
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    yield session
    session.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def run(function: Any, **settings: Any) -> list[Any]:
    import hvdlm.spark

    env = {"OMP_NUM_THREADS": "1", "HVDLM_PROGRESS": "none", **settings.pop("env", {})}
    return hvdlm.spark.run(function, env=env, **settings)


def train_and_tell(rows: Any) -> tuple[int, list[int], list[str]]:
    seen = train_on_rows(rows, 2.0)
    return (*seen, [name for name in ("A_TOKEN", "B_TOKEN", "OTHER", "LANGUAGE") if name in os.environ])


def test_a_frame_is_shared_out(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A_TOKEN", "OTHER", "LANGUAGE"):
        monkeypatch.setenv(name, "tok-17a9c3e5")
    frame = spark.createDataFrame([(number, f"text {number}") for number in range(40)], "n int, s string").repartition(
        3
    )
    env = {"HVDLM_CACHE_DIR": str(tmp_path / "cache"), "HVDLM_RUN_DIR": str(tmp_path / "run"), "B_TOKEN": "given"}
    results = run(train_and_tell, args=(frame,), num_proc=2, data_dir=str(tmp_path / "rows"), env=env)
    assert [rank for rank, _, _ in results] == [0, 1], "in the order of ranks"
    assert sorted(number for _, seen, _ in results for number in seen) == list(range(40))
    assert min(len(seen) for _, seen, _ in results) >= 15
    assert [names for *_, names in results] == [["B_TOKEN", "LANGUAGE"]] * 2, "what is given, and what a job needs"
    assert len(list((tmp_path / "rows").rglob("part-*.parquet"))) == 3
    check_summary(tmp_path / "run", 2)


def test_what_is_refused(spark: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"9 workers were asked for, and Spark's local"):
        run(print, num_proc=9)
    with pytest.raises(ConfigError, match="data_dir"):
        run(print, args=(spark.range(3),), num_proc=1)


@pytest.mark.lab
def test_a_failure_is_told(spark: Any) -> None:
    with pytest.raises(WorkerFailed, match="the job on Spark failed"):
        run(fails_on_one, num_proc=2)


@pytest.mark.lab
def test_the_gpt_example(spark: Any, tmp_path: Path) -> None:
    sizes = run(train_the_gpt_example, num_proc=2, env={"HVDLM_RUN_DIR": str(tmp_path / "run")})
    assert sizes == [2, 2]
    summary = check_summary(tmp_path / "run", 2)
    assert summary["loss_last"] < summary["loss_first"]
