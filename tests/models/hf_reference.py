"""Small transformers models with weights of every kind off their defaults, and what tests compare with them."""

import json

import torch
import transformers
from torch import nn
from torch.nn import functional as F

from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf

SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def random_model(make, config, seed=0, **more):
    """A transformers model of a config in eval mode, every parameter drawn anew: gains near 1, the rest near 0."""
    torch.manual_seed(seed)
    model = make(config, **more).eval()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # sinusoids
            continue
        gain = ("norm" in name.lower().replace("layer_norm", "norm") and name.endswith("weight")) or (
            ".ln_" in name and name.endswith("weight")
        )
        nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=0.25 if parameter.dim() > 1 else 0.1)
    return model


class _Honest(nn.Module):
    """A transformers norm without its detour through float32."""

    def __init__(self, old):
        super().__init__()
        self.weight, self.zero = old.weight, type(old).__name__.startswith("Gemma")
        self.eps = getattr(old, "variance_epsilon", None) or old.eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight + 1 if self.zero else self.weight, self.eps)


def in_double(model):
    """Let a transformers model compute in float64 all through: its RMSNorms and eager softmax go down to float32 otherwise."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")):
                setattr(module, name, _Honest(child))
    model.double().set_attn_implementation("sdpa")
    return model


def tensors_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def config_of(folder):
    """What transformers makes of a folder's config, less what says who wrote it."""
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in found.items() if k not in ("transformers_version", "_name_or_path")}


def goes_and_comes_back(folder, kind, through_ours):
    """A folder of theirs in and out again: every tensor and the config as they were, and `kind` loads it. Returns what it loads.

    Args:
        through_ours: by way of our own format.
    """
    model = import_hf(folder)
    if through_ours:
        model = load(save(model, folder.with_name("ours")))
    back = export_hf(model, folder.with_name("back"))
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    assert config_of(back) == config_of(folder)
    loaded, info = kind.from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    return loaded.eval()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
