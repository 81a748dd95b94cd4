"""layerwise's command, killed (-9) in one rank in the middle of writing its second checkpoint: `killed_while_writing.py RANK COMMAND...`."""

import os
import signal
import sys
from pathlib import Path

from torch import Tensor

from layerwise.cli import main
from layerwise.train import checkpoint

VICTIM = sys.argv.pop(1)
_written: list[Path] = []
_plain = checkpoint.save_tensors


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    _plain(path, tensors)
    _written.append(path)
    if len(_written) == 2 and os.environ["RANK"] == VICTIM:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


checkpoint.save_tensors = _save_tensors
main()
