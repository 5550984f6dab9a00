"""Runs a script under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def torchrun(count: int, script: Path, *args: str, fails: bool = False) -> str:
    """Standard output and error of ``torchrun --nproc-per-node count script args``, in the script's folder."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), *args]
    done = subprocess.run(command, cwd=script.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr
