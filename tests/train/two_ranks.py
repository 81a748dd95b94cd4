"""One rank of `test_ranks.py`: trains small models on ragged rows and writes their weights. Arguments: text folder, output folder, cases.

Cases are JSON by name: `spec` (of training), `folder` (of checkpoints), `stop` (interrupted after so many steps), `spare` (the
model has a parameter that no step uses), `single` (float32). A case writes NAME-RANK.safetensors.
"""

import json
import os
import sys
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.train.loop import Listener, train
from layerwise.train.parallel import outline, outlined
from layerwise.train.ranks import join
from layerwise.train.spec import TrainSpec

torch.set_num_threads(1)
source, out, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
data = load_data(DataSpec(source=f"path:{source}", length=32, tokenizer=TokenizerSpec("bytes")))
plain = data.train.batch


def ragged(index):
    """Rows of very different numbers of labelled tokens, so that an average of averages would be wrong."""
    batch = plain(index)
    mask = torch.ones_like(batch["input_ids"])
    for row, i in enumerate(index.tolist()):
        mask[row, 4 + 3 * (i % 9) :] = 0
    return batch | {"attention_mask": mask}


data.train.batch = ragged
described = preset("decoder")
described["stack"] |= {"depth": 2, "width": 16}
described["stack"]["layer"] |= {"heads": 2}
described["embedding"] = {"vocab": data.vocab}


class Stops(Listener):
    def __init__(self, at):
        self.at = at

    def progress(self, step, total, values):
        if step == self.at:
            raise KeyboardInterrupt

    def say(self, message):
        print(message, flush=True)


join("cpu")
for name, options in cases.items():
    spec = {"objective": "causal-lm", "steps": 4, "batch": 8, "optimizer": {"name": "sgd", "lr": 0.1}} | options.get("spec", {})
    spec = TypeAdapter(TrainSpec).validate_python(spec)
    model = build(model_spec(described))
    if not options.get("single"):
        model = model.double()
    if spec.parallel == "fsdp" and os.environ.get("RANK", "0") != "0":
        # Only the leader has the values; this process gets its share of them from there.
        model = outlined(outline(model))
        assert all(t.is_meta for t in model.state_dict().values())
    if options.get("spare"):
        model.embedding.register_parameter("spare", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    folder = Path(options["folder"]) if "folder" in options else None
    try:
        trained = train(model, data, spec, seed=1, folder=folder, listener=Stops(options.get("stop")))
    except KeyboardInterrupt:
        continue
    values = {f"found.{k}": torch.tensor(v) for k, v in trained.findings.metrics.items()}
    held = {n: t.detach().clone() for n, t in trained.model.state_dict().items() if not t.is_meta}
    save_file(held | values, out / f"{name}-{os.environ.get('RANK', '0')}.safetensors")
