"""What a way of communicating costs in quality: validation loss of a small GPT after 2,000 steps, for several seeds.

    nice python tests/perf/bench_quality.py                     # all modes, 3 seeds; goes on where it was stopped
    nice python tests/perf/bench_quality.py --mode none --mode int8 --seeds 1 --steps 500
    python tests/perf/bench_quality.py --table --plot tests/perf/results/quality.png    # only what is there

A GPT of one million parameters on the text that ships with Python, by bytes; 2 workers, 8 sequences of 64 bytes for
each step, AdamW, learning rate 1e-3 with a warm-up of 100 steps and a cosine to a tenth. All modes see the same samples
in the same order. Workers that train on their own step along the gradients of half a batch, and the mean of their moves
is shorter than each: the *tuned* modes have twice the learning rate, average Adam's moments, and an outer momentum of
0.5, since 0.9 takes longer to build up than there are outer steps. The *late* modes are ``none`` for the first 1,000
steps, at the plain learning rate. Each run is a line of
``tests/perf/results/quality.jsonl``; a run that is there is not made again.

The plot has seconds on its axis: steps times the seconds of a step between two hosts over 100 Mbit. ``--seconds``
measures these (as root, in network namespaces, on an idle machine) into ``tests/perf/results/quality-seconds.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import hvdlm  # noqa: E402
from hvdlm.bench.tables import table  # noqa: E402
from hvdlm.bench.torch_arms import Gpt  # noqa: E402
from tests.lab.hosts import lab  # noqa: E402

SECONDS = Path(__file__).parent / "results" / "quality-seconds.json"
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
LENGTH, BATCH, WARM_UP, RATE = 64, 8, 100, 1e-3
LOOK_EVERY, LOOK_AT = 200, 128
TIMED_FROM = 10
MODES = {
    **{codec: ["--compression", codec] for codec in ("none", "fp16", "bf16", "int8", "powersgd", "topk")},
    "powersgd, late": ["--compression", "powersgd", "--compression-warmup-steps", "1000"],
    "powersgd, rank 16": ["--compression", "powersgd", "--powersgd-rank", "16"],
    "local SGD, H = 8": ["--sync", "local", "--sync-every", "8"],
    "local SGD, H = 8, tuned": ["--sync", "local", "--sync-every", "8", "--local-moments", "average"],
    "local SGD, H = 8, late": [
        *("--sync", "local", "--sync-every", "8", "--local-moments", "average", "--sync-warmup-steps", "1000"),
    ],
    "DiLoCo, H = 8, late": [
        *("--sync", "local", "--sync-every", "8", "--local-moments", "average", "--sync-warmup-steps", "1000"),
        *("--outer-optimizer", "nesterov", "--outer-momentum", "0.5"),
    ],
    "DiLoCo, H = 50": ["--sync", "local", "--sync-every", "50", "--outer-optimizer", "nesterov"],
    "DiLoCo, H = 50, tuned": [
        *("--sync", "local", "--sync-every", "50", "--local-moments", "average"),
        *("--outer-optimizer", "nesterov", "--outer-momentum", "0.5"),
    ],
    "DiLoCo, H = 50, late": [
        *("--sync", "local", "--sync-every", "50", "--local-moments", "average", "--sync-warmup-steps", "1000"),
        *("--outer-optimizer", "nesterov", "--outer-momentum", "0.5"),
    ],
}
LATE = 1000
"""Steps that the *late* modes make as ``none``."""
TUNED_RATE = 2.0


def blocks() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation sequences of bytes: (n, LENGTH + 1)."""
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)).encode()
    count = len(text) // (LENGTH + 1)
    data = torch.from_numpy(np.frombuffer(text[: count * (LENGTH + 1)], np.uint8).copy()).long().view(count, -1)
    return data[: count * 9 // 10], data[count * 9 // 10 :]


def loss_on(model: Gpt, ids: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        total = sum(float(model.loss(part)) * len(part) for part in ids.split(64))
    model.train()
    return total / len(ids)


@hvdlm.distribute
def train(model: Gpt, optimizer: Any, scheduler: Any, loader: Any, valid: torch.Tensor, steps: int) -> dict[str, Any]:
    curve: list[Any] = []
    began = 0.0
    step = 0
    while True:
        for (ids,) in loader:
            # Where replicas train on their own they are equal here: the batch was asked for.
            if step % LOOK_EVERY == 0 and hvdlm.is_main():
                curve.append((step, loss_on(model, valid[:LOOK_AT])))
            if step == steps:
                return {"curve": curve, "seconds": (time.perf_counter() - began) / (steps - TIMED_FROM)}
            if step == TIMED_FROM:
                began = time.perf_counter()
            optimizer.zero_grad()
            model.loss(ids).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            step += 1


def work(seed: int, steps: int, rate: float, result: Path) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    training, valid = blocks()
    model = Gpt(layers=5, width=128, vocabulary=256, length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate * RATE)
    scale = lambda t: min(1.0, (t + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * t / steps))  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    data = torch.utils.data.TensorDataset(training)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
    found = train(model, optimizer, scheduler, loader, valid, steps)
    if hvdlm.is_main():
        size = sum(p.numel() for p in model.parameters())
        result.write_text(json.dumps({"parameters": size, "loss": loss_on(model, valid), **found}))


def rate_of(mode: str) -> float:
    return TUNED_RATE if mode.endswith("tuned") else 1.0


def run(mode: str, seed: int, steps: int) -> None:
    result = RESULTS.with_name(f"quality.{list(MODES).index(mode)}.{seed}.partial")
    result.parent.mkdir(exist_ok=True)
    own = ["--run-dir", f"{result}.run", *MODES[mode], "--seed", str(seed), "--bucket-cap-mb", "32"]
    words = ["--work", str(result), "--seeds", str(seed), "--steps", str(steps), "--rate", str(rate_of(mode))]
    command = [sys.executable, "-m", "hvdlm", "run", "-np", "2", *own, __file__, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    shutil.rmtree(f"{result}.run", ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{mode}, seed {seed} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    line = {"mode": mode, "seed": seed, "steps": steps, **json.loads(result.read_text(encoding="utf-8"))}
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    result.unlink()


def measure_seconds(modes: list[str]) -> None:
    """Seconds of a step in each mode, between two hosts over 100 Mbit. The steps that count hold one of 50."""
    seconds = json.loads(SECONDS.read_text()) if SECONDS.exists() else {}
    for mode in modes:
        options = MODES[mode]
        if mode.endswith("late"):
            continue  # steps of two kinds, which other modes have
        with tempfile.TemporaryDirectory() as made, lab(Path(made), 2, "100mbit") as up:
            result = Path(made) / "result.json"
            flags = ["-np", "2", "-H", "h1:1,h2:1", "--network-interfaces", "eth0", "--run-dir", f"{made}/run"]
            words = [__file__, "--work", str(result), "--seeds", "0", "--steps", str(TIMED_FROM + 50)]
            env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", "hvdlm", "run", *flags, *options, *words]
            done = up.run(up.hosts[0], command, timeout=300, cwd=Path(made), env=env)
            if done.returncode:
                raise SystemExit(f"{mode} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            seconds[mode] = json.loads(result.read_text())["seconds"]
        print(f"{mode}: {seconds[mode] * 1e3:.0f} ms a step", flush=True)
        SECONDS.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")


def kind_of(mode: str) -> str:
    """The mode whose steps this one makes in the end."""
    return mode.removesuffix(", late").replace("DiLoCo, H = 8", "local SGD, H = 8")


def seconds_at(step: int, mode: str, seconds: dict[str, float]) -> float:
    """When a step is reached."""
    if not mode.endswith("late"):
        return step * seconds[mode]
    first = min(step, LATE)
    return first * seconds["none"] + (step - first) * seconds[kind_of(mode)]


def plot(path: Path, steps: int) -> None:
    """Validation loss against seconds of training over 100 Mbit, the mean over seeds."""
    from matplotlib.figure import Figure

    seconds = json.loads(SECONDS.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for mode in MODES:
        curves = [run["curve"] for run in made() if run["mode"] == mode and run["steps"] == steps]
        if curves and kind_of(mode) in seconds:
            at = [seconds_at(step, mode, seconds) for step, _ in curves[0]]
            axes.plot(at, np.mean([[loss for _, loss in curve] for curve in curves], axis=0), label=mode)
    axes.set(
        xlabel="seconds (steps x measured seconds of a step over 100 Mbit)", ylabel="validation loss", xscale="log"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def made() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def show(steps: int) -> None:
    found = {(r["mode"], r["seed"]): r["loss"] for r in made() if r["steps"] == steps}
    rows = [["", "seeds", "validation loss", "against none", "of each seed"]]
    for mode in MODES:
        losses = {seed: loss for (name, seed), loss in found.items() if name == mode}
        pairs = [loss / found["none", seed] - 1 for seed, loss in losses.items() if ("none", seed) in found]
        if losses:
            against = [f"{np.mean(pairs):+.2%}" if pairs else "", ", ".join(f"{pair:+.2%}" for pair in pairs)]
            rows.append([mode, str(len(losses)), f"{np.mean(list(losses.values())):.4f}", *against])
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", action="append", choices=list(MODES), help="may be repeated; all by default")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--plot", type=Path, help="also write a PNG")
    parser.add_argument("--seconds", action="store_true", help="measure the seconds of a step, and train nothing")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=1.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.seeds, args.steps, args.rate, args.work)
        return
    if args.seconds:
        measure_seconds(args.mode or list(MODES))
        return
    there = {(r["mode"], r["seed"], r["steps"]) for r in made()}
    for seed in range(args.seeds):
        for mode in args.mode or MODES:
            if not args.table and (mode, seed, args.steps) not in there:
                run(mode, seed, args.steps)
    show(args.steps)
    if args.plot:
        plot(args.plot, args.steps)


if __name__ == "__main__":
    main()
