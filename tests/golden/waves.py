"""What authors' code was run on: numbers that no generator draws, so that anyone can make them again."""

import json
from pathlib import Path

import torch

import layerwise as lw


def golden(name):
    """The numbers that a repository's code gave; its name and commit stand in `source`."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def wave(*shape, at=0.0):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 1.7 + 0.3 * n.sqrt() + at).view(shape).float()


def decoder(depth):
    """A small Llama-like model whose weights are waves, in the order of their names."""
    model = lw.load("decoder", embedding={"vocab": 64}, stack={"depth": depth, "width": 24, "layer": {"heads": 3, "ffn_width": 40}})
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(model.named_parameters())):
            p.copy_(1 + 0.2 * wave(*p.shape, at=i) if p.dim() == 1 else 0.3 * wave(*p.shape, at=i))
    return model.eval()


def published(name):
    """The name that a parameter of `decoder` has in Hugging Face's Llama."""
    for ours, theirs in (
        ("embedding.tokens", "model.embed_tokens"),
        ("stack.layers", "model.layers"),
        ("stack.norm", "model.norm"),
        ("mixer.norm", "input_layernorm"),
        ("ffn.norm", "post_attention_layernorm"),
        ("mixer.branch.", "self_attn."),
        ("ffn.branch.", "mlp."),
    ):
        name = name.replace(ours, theirs)
    short = name.split(".")[-2]
    return (
        name.replace(f".{short}.", f".{short}_proj.")
        if short in ("q", "k", "v", "o", "gate", "up", "down")
        else name.replace("head.", "lm_head.")
    )


def tokens(rows=4, length=16):
    n = torch.arange(rows * length)
    return ((7 * n * n + 3 * n) % 61).view(rows, length)


class Rows:
    """Data of these tokens; shorter rows are padded at their ends."""

    def __init__(self, ids, lengths=None):
        self.ids, self.train = ids, self
        self.mask = None if lengths is None else (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()

    def __len__(self):
        return len(self.ids)

    def batch(self, rows):
        return {"input_ids": self.ids[rows], **({} if self.mask is None else {"attention_mask": self.mask[rows]})}
