"""One rank of a run that `test_faults_of_ranks.py` kills. Arguments: text folder, checkpoint folder, steps, output."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import LayerwiseError
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.train.loop import Listener, train
from layerwise.train.ranks import end
from layerwise.train.spec import TrainSpec

torch.set_num_threads(1)
source, folder, steps, out = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
data = load_data(DataSpec(source=f"path:{source}", length=32, tokenizer=TokenizerSpec("bytes")))
described = preset("decoder")
described["stack"] |= {"depth": 2, "width": 16}
described["stack"]["layer"] |= {"heads": 2}
described["embedding"] = {"vocab": data.vocab}
model = build(model_spec(described))


class Told(Listener):
    def progress(self, step, total, values):
        print(f"step {step}", flush=True)

    def say(self, message):
        print(message, flush=True)


try:
    spec = TrainSpec("causal-lm", steps=steps, batch=8, checkpoint_every=5)
    train(model, data, spec, seed=1, folder=folder, listener=Told())
except LayerwiseError as error:
    print(f"failed: {error}", file=sys.stderr)
    end(1)
save_file(model.state_dict(), out)
