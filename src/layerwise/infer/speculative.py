"""Self-speculative decoding: the first layers of a model draft, the others check the draft in one pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.evaluate.batches import inference
from layerwise.infer.generate import probabilities, sample
from layerwise.infer.paths import enter, exit_logits, resume
from layerwise.models.model import Model
from layerwise.models.spec import ModelSpec
from layerwise.nn.cache import Cache


class SelfSpeculation:
    """Texts of one length under way, drafted and checked together; a round keeps as many drafts as hold in every one.

    Layers below `exit_layer` see every token once: their keys, values and outputs for the drafted tokens serve the check. Between
    rounds the cache holds all tokens but the newest.

    With `confidence`, a row's next token is drafted only if the exit gives some token that probability. The exit reads the last draft
    anyway, for the check, so asking costs one head; and what is asked is known before the token is drawn, so samples stay those of the whole model.

    Source: Elhoushi et al. 2024, "LayerSkip", section 4.3 (arXiv 2404.16710); acceptance of samples as Leviathan et al. 2023, "Fast
    Inference from Transformers via Speculative Decoding", algorithm 1; drafts that end by confidence after Zhang et al. 2023, "Draft &
    Verify" (arXiv 2309.08168), section 3.3, with a fixed threshold.

    Args:
        ids: prompts without padding.
        exit_layer: layers that draft, 1 to all. draft: tokens drafted a round, at most; 0 is ordinary decoding.
        confidence: 0 drafts them all.
        temperature, top_p, seed: as in `layerwise.infer.generate`.

    Attributes:
        ids: prompt and continuation. drafted, accepted, rounds: counts so far.
    """

    def __init__(
        self,
        model: Model,
        ids: Int[Tensor, "b s"],
        *,
        exit_layer: int,
        draft: int = 4,
        confidence: float = 0.0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_drafting(model.spec, exit_layer=exit_layer, draft=draft, confidence=confidence)
        if ids.dim() != 2 or not ids.shape[1]:
            raise BadInput(f"prompts are a (batch, length) tensor with length >= 1; got shape {tuple(ids.shape)}")
        self.model, self.ids, self.exit_layer, self.draft, self.confidence = model, ids, exit_layer, draft, confidence
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator(device=ids.device).manual_seed(seed)
        self.cache = Cache()
        self.drafted = self.accepted = self.rounds = 0

    def round(self, most: int | None = None) -> Int[Tensor, "b n"]:
        """Draft, check, keep what holds; returns the new tokens, at least one and no more than `most`."""
        model, depth = self.model, self.model.stack.depth
        length = self.draft if most is None else min(self.draft, most - 1)
        before = self.ids.shape[1]
        fed = self.ids[:, self.cache.length :]
        states: list[Tensor] = []
        drafts: list[Tensor] = []
        beliefs: list[Tensor] = []
        while True:
            states.append(self._early(fed))
            if len(drafts) == length:
                break
            logits = exit_logits(model, states[-1][:, -1:])[:, 0]
            if self.confidence and float(logits.softmax(dim=-1).amax(dim=-1).min()) < self.confidence:
                break
            fed = sample(logits, self.temperature, self.top_p, self.generator)[:, None]
            drafts.append(fed)
            beliefs.append(logits)
        x, ctx = resume(model, states, self.cache)
        x = model.stack.part(x, ctx, range(self.exit_layer, depth))
        logits = exit_logits(model, x[:, -len(drafts) - 1 :])
        draft = torch.cat(drafts, dim=1) if drafts else self.ids[:, :0]
        kept, last = self._sampled(draft, beliefs, logits) if self.temperature else self._greedy(draft, logits)
        new = torch.cat([draft[:, :kept], last], dim=1)
        self.cache.crop(before + kept)
        self.ids = torch.cat([self.ids, new], dim=1)
        self.rounds, self.drafted, self.accepted = self.rounds + 1, self.drafted + draft.numel(), self.accepted + kept * len(draft)
        return new

    def _early(self, ids: Tensor) -> Tensor:
        x, ctx = enter(self.model, ids, self.cache)
        return self.model.stack.part(x, ctx, range(self.exit_layer))

    def _greedy(self, draft: Int[Tensor, "b d"], logits: Float[Tensor, "b d1 vocab"]) -> tuple[int, Tensor]:
        """How many drafts are in every row what the whole model says, and what it says behind them."""
        said = logits.argmax(dim=-1)
        kept = int((draft == said[:, :-1]).long().cumprod(dim=1).sum(dim=1).min())
        return kept, said[:, kept : kept + 1]

    def _sampled(self, draft: Int[Tensor, "b d"], beliefs: list[Tensor], logits: Float[Tensor, "b d1 vocab"]) -> tuple[int, Tensor]:
        """Draft x stays with probability min(1, p(x) / q(x)); the first that does not is drawn anew from max(0, p - q).

        A row that would keep more than another has its next draft as the next token, which is what it accepted there.
        """
        p = probabilities(logits, self.temperature, self.top_p)
        if not draft.shape[1]:
            return 0, self._draw(p[:, 0])
        q = probabilities(torch.stack(beliefs, dim=1), self.temperature, self.top_p)
        chance = (p[:, :-1] / q).gather(2, draft[..., None])[..., 0]
        luck = torch.rand(draft.shape, generator=self.generator, device=draft.device)
        each = (luck < chance).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        kept = int(each.min())
        if kept == draft.shape[1]:
            return kept, self._draw(p[:, kept])
        accepts = each > kept
        rest = torch.where(accepts, p[:, kept], (p[:, kept] - q[:, kept]).clamp(min=0))
        return kept, torch.where(accepts, draft[:, kept : kept + 1], self._draw(rest))

    def _draw(self, weights: Float[Tensor, "b vocab"]) -> Int[Tensor, "b 1"]:
        return torch.multinomial(weights, 1, generator=self.generator)


def check_drafting(spec: ModelSpec, *, exit_layer: int, draft: int, confidence: float) -> None:
    """Raises BadInput: a model that cannot decode so, or numbers that there are not."""
    if not spec.causal or spec.decoder is not None or spec.head is None or spec.head.kind != "lm":
        raise BadInput("self-speculation continues a text: it needs a causal decoder with a head of kind lm")
    if any(getattr(layer, "cache", None) is not None for layer in spec.stack.layers):
        raise BadInput(
            "self-speculation takes steps back, which a compressed cache cannot: merge it (edit: merge), or decode without drafts"
        )
    if not 1 <= exit_layer <= spec.stack.depth or draft < 0:
        raise BadInput(f"exit_layer is 1 to {spec.stack.depth} and draft >= 0; got {exit_layer} and {draft}")
    if not 0 <= confidence <= 1:
        raise BadInput(f"confidence is a probability; it is {confidence}")


def self_speculate(
    model: Model,
    ids: Int[Tensor, "b s"],
    *,
    exit_layer: int,
    draft: int = 4,
    confidence: float = 0.0,
    new: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int | None = None,
    seed: int = 0,
) -> SelfSpeculation:
    """Continue `ids` by up to `new` tokens, `stop` filling rows it has ended: greedily the texts of `generate`, sampled, texts from its distribution.

    Returns:
        The finished texts in `.ids`, with `.accepted` of `.drafted` tokens in `.rounds`.
    """
    text = SelfSpeculation(
        model, ids, exit_layer=exit_layer, draft=draft, confidence=confidence, temperature=temperature, top_p=top_p, seed=seed
    )
    start, end = ids.shape[1], ids.shape[1] + new
    with inference(model):
        while (left := end - text.ids.shape[1]) > 0:
            text.round(left)
            if stop is not None and bool((text.ids[:, start:] == stop).any(dim=1).all()):
                break
    if stop is not None:
        before = (text.ids[:, start:] == stop).long().cumsum(dim=1)
        before[:, 1:] = before[:, :-1].clone()
        before[:, 0] = 0
        text.ids[:, start:].masked_fill_(before > 0, stop)
        text.ids = text.ids[:, : start + int((before == 0).sum(dim=1).max())]
    return text
