"""Two real processes (gloo) take the same steps as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_ranks.py")


def _run(out: Path, verses: Path, ranks: int, **options: object) -> list[dict[str, torch.Tensor]]:
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
        command = [sys.executable, str(SCRIPT), str(verses), str(out / f"{ranks}-{rank}.safetensors"), json.dumps(options)]
        processes.append(subprocess.Popen(command, env=here, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-2000:]
    made = [out / f"{ranks}-{rank}.safetensors" for rank in range(ranks)]
    return [load_file(path) if path.exists() else {} for path in made]


def _close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


POLICIES = [{"name": "gradient-norms", "every": 2}, {"name": "rotation", "every": 2}, {"name": "freeze", "layers": [0]}]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_replicas_equal_one_process(tmp_path: Path, verses: Path, accumulate: int):
    (alone,) = _run(tmp_path, verses, 1, spec={"log_every": 3})
    first, second = _run(tmp_path, verses, 2, spec={"log_every": 3, "accumulate": accumulate})
    _close(alone, first)
    for name in alone:
        assert torch.equal(first[name], second[name]), "both ranks hold the same weights and the same loss"


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        {"accumulate": 2, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, "clip": 0.05, "policies": POLICIES},
        {"recompute": ["::2"], "val_every": 2, "optimizer": {"name": "layca", "lr": 0.05}},
    ],
)
def test_shards_equal_one_process(tmp_path: Path, verses: Path, spec: dict):
    """FSDP2: clipping, optimizer state, accumulation and what policies see are those of the whole tensors."""
    (alone,) = _run(tmp_path, verses, 1, spec=spec)
    first, second = _run(tmp_path, verses, 2, spec=spec | {"parallel": "fsdp"})
    _close(alone, first)
    assert not [name for name in second if not name.startswith("found.")], "only the first rank holds the whole model afterwards"
