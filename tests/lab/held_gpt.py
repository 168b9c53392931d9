"""The GPT example as it is, small; its steps are held back while there is a file ``slow``."""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples" / "gpt_torch" / "train_hvdlm.py")
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--batch-size", "64", "--block-size", "64", "--epochs", "2"]

register_optimizer_step_post_hook(lambda *_: time.sleep(0.7 if os.path.exists("slow") else 0))
sys.argv = [EXAMPLE, *SMALL]
runpy.run_path(EXAMPLE, run_name="__main__")
