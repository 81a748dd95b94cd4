"""One rank of `test_ranks.py`: how much memory a process takes that gets its shards of a model from rank 0. Argument: folder."""

import dataclasses
import resource
import sys
from pathlib import Path

import torch

from layerwise.errors import BadInput
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.objective import Objective
from layerwise.train.loop import TrainStep, train
from layerwise.train.parallel import dealt, outline, outlined, spread
from layerwise.train.ranks import join
from layerwise.train.spec import TrainSpec

torch.set_num_threads(1)
here, _ = join("cpu")
described = preset("decoder")
described["stack"] |= {"depth": 16, "width": 512}
spec = model_spec(described | {"embedding": {"vocab": 1000}})
plan = TrainSpec("causal-lm", steps=1, batch=2, parallel="fsdp")
small = build(model_spec(described | {"stack": {"depth": 1, "width": 16}, "embedding": {"vocab": 10}}), 0)
try:
    train(small, None, dataclasses.replace(plan, objective="mono-forward", parallel="ddp"))
except BadInput as error:
    print(error, flush=True)


def peak() -> int:
    """Bytes of memory this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What the first sharding of a process costs by itself is paid before measuring.
dealt_small = {n: t.detach() for n, t in small.state_dict().items()}
spread(TrainStep(small, Objective()), small, plan, torch.device("cpu"))
dealt(small, dealt_small, torch.device("cpu"))
if here.rank == 0:
    model = build(spec, 0)
    here.share(outline(model))
else:
    model = outlined(here.share())
values = {n: t.detach() for n, t in model.state_dict().items()} if here.rank == 0 else {}
before = peak()
spread(TrainStep(model, Objective()), model, plan, torch.device("cpu"))
dealt(model, values, torch.device("cpu"))
total = [p.numel() * p.element_size() for p in model.parameters()]
(Path(sys.argv[1]) / f"rank-{here.rank}").write_text(f"{sum(total)} {max(total)} {peak() - before}")
