"""What the input of one of two workers costs under Keras: whole batches that are cut, or its own samples only.

    python tests/perf/bench_input.py

Lines of prose are split into words, the words hashed and padded, by functions of TensorFlow; shuffled, in batches of
32. No training, no other process: this is the time one worker needs for its input in a pass over the data. The passes
alternate, and a figure is the median of the ratios of passes next to each other.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from pydoc_data.topics import topics  # noqa: E402

import tensorflow as tf  # noqa: E402

from hvdlm.adapters.keras_job import Job  # noqa: E402
from hvdlm.adapters.keras_own_part import OwnPart  # noqa: E402
from hvdlm.adapters.keras_pipeline import DatasetFeed, Way  # noqa: E402
from hvdlm.adapters.keras_recipe import Recipe, read_back  # noqa: E402
from hvdlm.adapters.keras_whole_batches import WholeBatches  # noqa: E402
from hvdlm.adapters.single import SingleCollectives  # noqa: E402
from hvdlm.bench.stats import median_interval  # noqa: E402
from hvdlm.options import Options  # noqa: E402
from hvdlm.world import World  # noqa: E402

BATCH, LENGTH, LINES = 32, 64, 8192


def words(line: Any, label: Any) -> Any:
    """Numbers for the words of a paragraph."""
    parts = tf.strings.split(tf.strings.regex_replace(tf.strings.lower(line), r"[^a-z ]", " "))[:LENGTH]
    numbers = tf.strings.to_hash_bucket_fast(parts, 20_000)
    return tf.pad(numbers, [[0, LENGTH - tf.shape(numbers)[0]]]), label


def pipeline(cached: bool) -> Any:
    text = [line for topic in topics.values() for line in topic.split("\n\n") if line]
    lines = list(itertools.islice(itertools.cycle(text), LINES))
    dataset = tf.data.Dataset.from_tensor_slices((lines, list(range(LINES)))).map(words)
    return (dataset.cache() if cached else dataset).shuffle(1024, seed=0).batch(BATCH)


def feed(whole: bool, cached: bool) -> DatasetFeed:
    dataset, recorder = pipeline(cached), None
    job = Job(
        options=Options(),
        world=World(rank=0, size=2, local_rank=0, local_size=2),
        collectives=SingleCollectives(),
        recorder=recorder,  # type: ignore[arg-type]
    )
    recipe = read_back(dataset)
    assert isinstance(recipe, Recipe)
    way: Way = WholeBatches(dataset, job.shares, False) if whole else OwnPart(recipe, job.partition, BATCH)
    return DatasetFeed(way, lambda ordered, _: ordered, endless=False)


def seconds(dataset: tf.data.Dataset) -> float:
    began = time.perf_counter()
    for _ in dataset:
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=20)
    args = parser.parse_args()
    for cached in (False, True):
        whole, own = feed(True, cached).dataset, feed(False, cached).dataset
        if not cached:
            seconds(whole), seconds(own)
        first = [seconds(own), seconds(whole)]
        ratios, times = [], []
        for turn in range(args.passes):
            pair = [seconds(d) for d in ((own, whole) if turn % 2 else (whole, own))]
            pair = pair if turn % 2 else pair[::-1]
            ratios.append(pair[0] / pair[1])
            times.append(pair)
        title = "with .cache()" if cached else "without .cache()"
        if cached:
            print(f"{title}, first pass: own {first[0]:.2f} s, whole {first[1]:.2f} s")
        middle = sorted(times)[len(times) // 2]
        print(f"{title}: own {middle[0]:.2f} s, whole {middle[1]:.2f} s; own / whole {median_interval(ratios)}")


if __name__ == "__main__":
    main()
