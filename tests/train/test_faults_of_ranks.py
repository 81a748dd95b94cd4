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


SUMS = """
import os, signal, sys, torch
import torch.distributed as dist
from layerwise.train.ranks import end
dist.init_process_group("gloo")
try:
    for step in range(100):
        sums = [dist.all_reduce(torch.ones(500_000), async_op=True) for _ in range(200)]
        if dist.get_rank() == 0 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        first = sums[0]
        sums.clear()
        first.wait()
except RuntimeError:
    print("lost")
    end(3)
"""


def _ranks(verses: Path, folder: Path, steps: int, out: Path) -> list[subprocess.Popen]:
    return _started([str(SCRIPT), str(verses), str(folder), str(steps)], out)


def _started(arguments: list[str], out: Path | None = None) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        here = os.environ | {
            "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu",
        }  # fmt: skip
        command = [sys.executable, *arguments, *([] if out is None else [str(out / f"{rank}.safetensors")])]
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


def test_a_process_whose_sums_are_still_in_flight_ends_with_the_code_it_is_given():
    """Threads of gloo that let go of tensors while Python shuts down would abort it."""
    ranks = _started(["-c", SUMS])
    printed, told = ranks[1].communicate(timeout=60)
    ranks[0].communicate()
    assert ranks[1].returncode == 3 and printed == "lost\n", told
