"""Two real processes (gloo) take the same steps as one. All cases share three launches, as starting a process costs most."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("two_ranks.py")
POLICIES = [{"name": "gradient-norms", "every": 2}, {"name": "rotation", "every": 2}, {"name": "freeze", "layers": [0]}]
ADAMW = {"accumulate": 2, "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}, "clip": 0.05, "policies": POLICIES}
LAYCA = {"recompute": ["::2"], "val_every": 2, "optimizer": {"name": "layca", "lr": 0.05}}
ADAM = {"steps": 5, "checkpoint_every": 2, "optimizer": {"name": "adamw", "lr": 0.01}}
FSDP = {"parallel": "fsdp"}


def launched(ranks: int, command: list[str]) -> list[str]:
    """What so many processes of a command say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        here = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
        if ranks > 1:
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            here |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = []
    for process in processes:
        said, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-2000:]
        told.append(said)
    return told


def _run(verses: Path, out: Path, ranks: int, cases: dict[str, dict]) -> list[str]:
    out.mkdir(exist_ok=True)
    return launched(ranks, [sys.executable, str(SCRIPT), str(verses), str(out), json.dumps(cases)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, verses: Path) -> Path:
    """Folders `one` and `two`: what a process alone and two together made of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    one, two = folder / "one", folder / "two"
    alone = {
        "plain": {"spec": {"log_every": 3}},
        "spare": {"spare": True},
        "adamw": {"spec": ADAMW},
        "layca": {"spec": LAYCA},
        "bf16": {"spec": {"precision": "bf16"}, "single": True},
        "resumed": {"spec": ADAM},
        "stopped": {"spec": ADAM, "folder": str(folder / "from-one"), "stop": 3},
    }
    _run(verses, one, 1, alone)
    together = {
        "plain": alone["plain"],
        "accumulated": {"spec": {"log_every": 3, "accumulate": 2}},
        "spare": alone["spare"],
        "adamw": {"spec": ADAMW | FSDP},
        "layca": {"spec": LAYCA | FSDP},
        "bf16": {"spec": {"precision": "bf16"} | FSDP, "single": True},
        "resumed": {"spec": ADAM | FSDP, "folder": str(folder / "from-one")},
        "stopped": {"spec": ADAM | FSDP, "folder": str(folder / "from-two"), "stop": 3},
    }
    assert "continuing from step 2" in _run(verses, two, 2, together)[0]
    assert "continuing from step 2" in _run(verses, one, 1, {"resumed-of-two": {"spec": ADAM, "folder": str(folder / "from-two")}})[0]
    return folder


def _close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("case", "alone"), [("plain", "plain"), ("accumulated", "plain"), ("spare", "spare")])
def test_replicas_equal_one_process(made: Path, case: str, alone: str):
    """Also with a parameter that no step uses, as a mask token is in training on labels."""
    first, second = (load_file(made / "two" / f"{case}-{rank}.safetensors") for rank in range(2))
    _close(load_file(made / "one" / f"{alone}-0.safetensors"), first)
    for name in first:
        assert torch.equal(first[name], second[name]), "both ranks hold the same weights and the same loss"


@pytest.mark.parametrize(("case", "alone"), [("adamw", "adamw"), ("layca", "layca")])
def test_shards_equal_one_process(made: Path, case: str, alone: str):
    """FSDP2: clipping, optimizer state, accumulation and what policies see are those of the whole tensors."""
    first, second = (load_file(made / "two" / f"{case}-{rank}.safetensors") for rank in range(2))
    _close(load_file(made / "one" / f"{alone}-0.safetensors"), first)
    assert not [name for name in second if not name.startswith("found.")], "only the first rank holds the whole model afterwards"


def test_shards_in_bfloat16_follow_one_process(made: Path):
    _close(load_file(made / "one" / "bf16-0.safetensors"), load_file(made / "two" / "bf16-0.safetensors"), rtol=2e-2, atol=2e-3)


def test_resumed_on_another_number_of_processes(made: Path):
    """One to two and two to one: the weights of a run that was never stopped."""
    never, *others = (
        load_file(made / place) for place in ("one/resumed-0.safetensors", "two/resumed-0.safetensors", "one/resumed-of-two-0.safetensors")
    )
    for other in others:
        # The loss is logged as a sum in single precision over a window that was interrupted.
        assert other.pop("found.train_loss").item() == pytest.approx(never["found.train_loss"].item(), rel=1e-6)
        _close({name: value for name, value in never.items() if name != "found.train_loss"}, other, rtol=1e-9, atol=1e-11)


def test_a_sharded_start_takes_one_share_and_one_tensor(tmp_path: Path):
    """Only rank 0 holds the whole model when training begins; the other gets its rows, one tensor after the other."""
    script = Path(__file__).with_name("sharded_start.py")
    told = launched(2, [sys.executable, str(script), str(tmp_path)])
    assert sum("one process" in text for text in told) == 2, "an objective that differentiates inside its forward pass is refused at once"
    whole, largest, taken = (int(n) for n in (tmp_path / "rank-1").read_text().split())
    assert taken < whole / 2 + 2 * largest + 0.1 * whole
