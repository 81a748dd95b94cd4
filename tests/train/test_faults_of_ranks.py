"""One of two real processes (gloo) is killed: the other ends with a clear message, and the run goes on from its checkpoint."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ranks_until_killed.py")


def _ranks(verses: Path, folder: Path, steps: int, out: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        here = os.environ | {
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
        }  # fmt: skip
        command = [sys.executable, str(SCRIPT), str(verses), str(folder), str(steps), str(out / f"{rank}.safetensors")]
        started.append(subprocess.Popen(command, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_ends_with_a_message_and_the_run_goes_on(verses: Path, tmp_path: Path, victim: int):
    ranks = _ranks(verses, tmp_path / "checkpoints", 100_000, tmp_path)
    try:
        for line in ranks[victim].stdout:
            if line.strip() == "step 12":
                break
        ranks[victim].send_signal(signal.SIGKILL)
        _, told = ranks[1 - victim].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[1 - victim].returncode == 1, told
    assert "another process of this run ended or cannot be reached" in told and "Traceback" not in told, told
    again = _ranks(verses, tmp_path / "checkpoints", 30, tmp_path)
    outputs = [process.communicate(timeout=120) for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert all("continuing from step" in output for output, _ in outputs)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
