"""A job that shuffles a data set of files: each worker reads blocks of its own."""

from __future__ import annotations

import textwrap
from pathlib import Path

from tests.multiprocess.workers import run_workers

SCRIPT = """
import torch
import hvdlm
from hvdlm.sources import open_files

torch.set_num_threads(1)
data = open_files("data/*", block_bytes=200, cache_dir="cache")
loader = torch.utils.data.DataLoader(
    data, batch_size=64, shuffle=True, collate_fn=lambda rows: torch.tensor([[float(row)] for row in rows])
)
net = torch.nn.Linear(1, 1)
net, optimizer, loader = hvdlm.wrap(net, torch.optim.SGD(net.parameters(), lr=1e-9), loader, partition="contiguous")
for x in loader:
    net(x).mean().backward()
    with open(f"seen-{hvdlm.rank()}", "a") as seen:
        seen.writelines(f"{int(value)}\\n" for value in x.flatten().tolist())
"""


def test_workers_read_blocks_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(64):
        rows = range(number * 100, number * 100 + 100)
        (tmp_path / "data" / f"{number:02d}.txt").write_text("".join(f"{row:07d}\n" for row in rows))
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    job = run_workers([str(script)], 2, controller="mpi", cwd=tmp_path, timeout=110)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    seen = [[int(line) for line in (tmp_path / f"seen-{rank}").read_text().split()] for rank in range(2)]
    assert sorted(seen[0] + seen[1]) == list(range(6400))
    assert seen[0] != sorted(seen[0])
    # 25 rows a block. A shuffle of single rows would have both workers read nearly all of the 256.
    blocks = [{row // 25 for row in rows} for rows in seen]
    assert len(blocks[0] & blocks[1]) <= 8
