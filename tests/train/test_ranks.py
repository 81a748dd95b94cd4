"""Two real processes (gloo) take the same steps as one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_ranks.py")


def _run(out: Path, verses: Path, ranks: int, accumulate: int) -> list[dict[str, torch.Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        here = os.environ | {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            here |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(ranks),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            here |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
        command = [sys.executable, str(SCRIPT), str(verses), str(out / f"{ranks}-{rank}.safetensors"), str(accumulate)]
        processes.append(subprocess.Popen(command, env=here, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-2000:]
    return [load_file(out / f"{ranks}-{rank}.safetensors") for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_equal_one_process(tmp_path: Path, verses: Path, accumulate: int):
    (alone,) = _run(tmp_path, verses, 1, 1)
    first, second = _run(tmp_path, verses, 2, accumulate)
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), "both ranks hold the same weights"
        torch.testing.assert_close(first[name], weight, rtol=1e-10, atol=1e-12)
