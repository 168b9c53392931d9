"""What a step of ``fit`` costs under hvdlm, under MultiWorkerMirroredStrategy, and under plain Keras.

    python tests/perf/bench_keras.py                   # 2 workers each, and 1 process
    python tests/perf/bench_keras.py --rounds 5        # more runs of each arm
    python tests/perf/bench_keras.py --only one        # 1 process only; or: --only workers
    python tests/perf/bench_keras.py --check           # exit 1 if a limit is missed

A causal transformer of 1.3 million parameters, a global batch of 16 sequences of 64 tokens, Adam. Both arms that are
compared run on ``tf_keras``, since ``fit`` of Keras 3 fails under that strategy; hvdlm with Keras 3 stands beside. The
runs alternate, and a figure is the median of the ratios of runs next to each other; a run's figure is its median step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from hvdlm.bench.stats import Interval, median_interval  # noqa: E402

VOCABULARY, LENGTH, WIDTH, LAYERS, BATCH = 1024, 64, 128, 4, 16
WARM_UP, STEPS = 10, 60
ARMS = {
    "strategy": "MultiWorkerMirroredStrategy, tf_keras",
    "legacy": "hvdlm, tf_keras",
    "keras": "hvdlm, Keras 3",
}
LIMITS = {("legacy", "strategy"): 1.00, ("one", "plain"): 1.02}


def build(keras: Any) -> Any:
    """The same model for ``keras`` and ``tf_keras``."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    inputs = layers.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(LAYERS):
        normal = layers.LayerNormalization()(x)
        attended = layers.MultiHeadAttention(4, WIDTH // 4)(normal, normal, use_causal_mask=True)
        x = layers.Add()([x, attended])
        hidden = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(WIDTH)(hidden)])
    model = keras.Model(inputs, layers.Dense(VOCABULARY)(layers.LayerNormalization()(x)))
    # Without XLA, which has no Horovod operations on CPUs and which Keras does not choose there either.
    model.compile(
        keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
    )
    return model


def data(steps: int) -> tuple[Any, Any]:
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(steps * BATCH, LENGTH + 1)).astype(np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def clock(keras: Any, times: list[float]) -> Any:
    began = [0.0]

    class Clock(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            began[0] = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            times.append(time.perf_counter() - began[0])

    return Clock()


def worker(arm: str, out: str) -> None:
    """One worker of one arm."""
    times: list[float] = []
    x, y = data(STEPS)
    if arm == "strategy":
        import tensorflow as tf

        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        keras = importlib.import_module("tf_keras")
        with strategy.scope():
            model = build(keras)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
        model.fit(dataset.with_options(options), epochs=1, verbose=0, callbacks=[clock(keras, times)])
        main = os.environ["HVDLM_BENCH_TASK"] == "0"
    else:
        import hvdlm

        keras = importlib.import_module("tf_keras" if arm == "legacy" else "keras")
        model = build(keras)

        @hvdlm.distribute
        def train(model: Any) -> bool:
            fit = {"batch_size": BATCH, "shuffle": False, "epochs": 1, "verbose": 0}
            model.fit(x, y, callbacks=[clock(keras, times)], **fit)
            return hvdlm.is_main()

        main = train(model)
    if main:
        Path(out).write_text(json.dumps(float(np.median(times[WARM_UP:]))))


def one(out: str) -> None:
    """One process: epochs of plain Keras and of Keras with hvdlm in turn."""
    import keras

    import hvdlm

    x, y = data(12)
    arms: dict[str, list[float]] = {"plain": [], "one": []}
    plain = build(keras)

    @hvdlm.distribute
    def train(model: Any) -> None:
        for turn in range(9):
            for name, own in (("plain", plain), ("one", model)) if turn % 2 else (("one", model), ("plain", plain)):
                times: list[float] = []
                own.fit(x, y, batch_size=BATCH, epochs=1, verbose=0, callbacks=[clock(keras, times)])
                if turn:
                    arms[name] += times[2:]

    train(build(keras))
    Path(out).write_text(json.dumps(arms))


def start(command: list[str], environment: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run(arm: str, directory: Path) -> Any:
    """Run an arm; returns what its first worker wrote."""
    out = directory / "out.json"
    out.unlink(missing_ok=True)
    program = [sys.executable, __file__, "--worker", arm, "--out", str(out)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": str(ROOT), "HVDLM_PROGRESS": "none"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
    if arm == "strategy":
        addresses = _addresses(2)
        jobs = []
        for task in range(2):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": task}}
            own = {**environment, "TF_CONFIG": json.dumps(config), "HVDLM_BENCH_TASK": str(task)}
            jobs.append(
                subprocess.Popen(program, env=own, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
    else:
        launcher = [] if arm == "one" else [sys.executable, "-m", "hvdlm", "run", "--mpi", "-np", "2"]
        command = launcher + program
        jobs = [
            subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        ]
    for job in jobs:
        _, err = job.communicate(timeout=170)
        if job.returncode:
            raise SystemExit(f"{arm} failed:\n{err.decode()[-3000:]}")
    return json.loads(out.read_text())


def _addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("workers", "one"))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return one(args.out) if args.worker == "one" else worker(args.worker, args.out)
    figures: dict[tuple[str, str], Interval] = {}
    with tempfile.TemporaryDirectory() as path:
        times: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(0 if args.only == "one" else args.rounds):
            for arm in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                times[arm].append(run(arm, Path(path)))
        for arm in ("legacy", "keras") if args.only != "one" else ():
            ratios = [own / other for own, other in zip(times[arm], times["strategy"], strict=True)]
            figures[arm, "strategy"] = median_interval(ratios)
        if args.only != "workers":
            alone = run("one", Path(path))
            ratios = [own / other for own, other in zip(alone["one"], alone["plain"], strict=True)]
            figures["one", "plain"] = median_interval(ratios)
    for arm, label in ARMS.items() if args.only != "one" else ():
        milliseconds = ", ".join(f"{1000 * value:.1f}" for value in times[arm])
        print(f"{label:40} {milliseconds} ms a step")
    missed = False
    for (arm, other), figure in figures.items():
        limit = LIMITS.get((arm, other))
        missed |= limit is not None and not figure.holds(limit)
        print(f"{arm} / {other}: {figure}" + ("" if limit is None else f"  limit {limit:.2f}"))
    sys.exit(int(args.check and missed))


if __name__ == "__main__":
    main()
