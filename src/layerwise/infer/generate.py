"""Continuing a text token by token."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.models.model import Model
from layerwise.models.origin import origin_of
from layerwise.nn.cache import Cache


def generate(
    model: Model,
    ids: Int[Tensor, "b s"],
    *,
    new: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int | None = None,
    attention_mask: Tensor | None = None,
    start: int | None = None,
    path: list[int] | None = None,
    cache: Cache | None = None,
    extras: dict[str, Any] | None = None,
    seed: int = 0,
) -> Int[Tensor, "b s_new"]:
    """Continue `ids` by up to `new` tokens; returns prompts and continuations, rows that stopped early filled with `stop`.

    An encoder-decoder reads `ids` and writes a text of its own: what is returned begins with `start`.

    Args:
        temperature: 0 takes the most probable token; above, samples from the softened distribution.
        top_p: sample among the smallest set of tokens whose probability exceeds it (Holtzman et al. 2020).
        stop: token that ends a row.
        attention_mask: (b, s), 0 where prompts are padded (on the left; an encoder's on either side).
        start: the token before the first of an encoder-decoder's text (None: the one its checkpoint's config names).
        path: layers to run, in order, instead of each once.
        cache: what was read before `ids` (attention_mask covers it too); it goes on from there. None: nothing.
        extras: what parts of the model look for in `Context.extras`.
        seed: of the sampling.
    """
    if not model.causal:
        raise BadInput("only a causal model can continue a text; this one sees both sides")
    if ids.dim() != 2 or not ids.shape[1]:
        raise BadInput(f"prompts are a (batch, length) tensor with length >= 1; got shape {tuple(ids.shape)}")
    generator = torch.Generator(device=ids.device).manual_seed(seed)
    cache, source, memory = Cache() if cache is None else cache, None, None
    if model.decoder is not None:
        source = {"input_ids": ids} if attention_mask is None else {"input_ids": ids, "attention_mask": attention_mask}
        ids = torch.full((len(ids), 1), _start(model) if start is None else start, device=ids.device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    fed, mask = ids, attention_mask if source is None else None
    with inference(model):
        for _ in range(new):
            if source is not None:
                batch = {**source, "decoder_input_ids": fed}
            else:
                batch = {"input_ids": fed} if mask is None else {"input_ids": fed, "attention_mask": mask}
            out = model(batch, cache=cache, memory=memory, path=path, extras=extras or {})
            memory = out.memory
            out.hidden = out.hidden[:, -1:]
            token = sample(out.logits[:, -1], temperature, top_p, generator)
            if stop is not None:
                token = torch.where(done, stop, token)
                done |= token == stop
            fed = token[:, None]
            ids = torch.cat([ids, fed], dim=1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            if stop is not None and bool(done.all()):
                break
    return ids


def _start(model: Model) -> int:
    origin = origin_of(model)
    for settings in (origin.generation, origin.config) if origin is not None else ():
        if isinstance(found := settings.get("decoder_start_token_id"), int):
            return found
    raise BadInput("an encoder-decoder begins its text with a token that this model's config does not name: give start")


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Int[Tensor, " b"]:
    """One token a row from (b, vocab) scores."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    return torch.multinomial(probabilities(logits, temperature, top_p), 1, generator=generator).squeeze(1)


def probabilities(logits: Float[Tensor, "... vocab"], temperature: float, top_p: float) -> Float[Tensor, "... vocab"]:
    """What `sample` draws from at a temperature above 0."""
    made = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, index = made.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the most probable one always does.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        made = torch.zeros_like(made).scatter(-1, index, ordered)
    return made / made.sum(dim=-1, keepdim=True)
