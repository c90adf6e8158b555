"""Real processes: two ranks equal one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="gloo ranks are started by torchrun on Linux and macOS")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_law_8_two_ranks_equal_one(kind):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parent / "distributed_worker.py"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("agrees") == 2
