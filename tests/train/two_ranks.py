"""One rank of `test_ranks.py`: trains a small model on ragged rows and writes its weights. Arguments: text folder, output, accumulate."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.optim.spec import OptimizerSpec
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

torch.set_num_threads(1)
source, out, accumulate = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
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
model = build(model_spec(described)).double()
train(model, data, TrainSpec("causal-lm", steps=4, batch=8, accumulate=accumulate, optimizer=OptimizerSpec("sgd", lr=0.1)), seed=1)
save_file(model.state_dict(), out)
