"""Caches with padding on the right and in the middle, and slots that share or do not share their positions."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache

EXACT = {"rtol": 1e-12, "atol": 1e-12}
KINDS = [(p, a) for p in ("none", "rotary", "alibi", "relative") for a in ("none", "learned", "sinusoidal")]


def _model(name="decoder", absolute="none", **layer):
    data = preset(name)
    for part in ("stack", "decoder"):
        if part in data:
            data[part] |= {"depth": 2, "width": 16, "init_std": 0.3}
            data[part]["layer"] |= {"heads": 2, "window": 4, **layer}
    data["embedding"] = {"vocab": 40, "position": absolute, "max_length": 16, "offset": 2 if absolute == "learned" else 0}
    return build(model_spec(data)).double().eval()


MODELS = {(p, a): _model(position=p, absolute=a) for p, a in KINDS}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=2, max_size=2), st.integers(1, 8), st.integers(0, 99))
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_anywhere_and_a_cache_equal_the_real_tokens_alone(kind, real, cut, seed):
    """Prompts padded on the right, continued, or with holes: whatever the mask, real tokens see real tokens only."""
    model = MODELS[kind]
    mask = torch.tensor(real).long()
    mask[:, -1] = 1
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
    cache = Cache()
    parts = [model({"input_ids": ids[:, :cut], "attention_mask": mask[:, :cut]}, cache=cache).logits]
    parts += [model({"input_ids": ids[:, i : i + 1], "attention_mask": mask[:, : i + 1]}, cache=cache).logits for i in range(cut, 9)]
    made = torch.cat(parts, dim=1)
    assert made.isfinite().all()
    for row in range(2):
        kept = mask[row].bool()
        torch.testing.assert_close(made[row, kept], model({"input_ids": ids[row, kept][None]}).logits[0], **EXACT)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@torch.no_grad()
def test_a_padded_target_decodes_from_a_cache_as_if_alone(position):
    model = _model("encoder-decoder", position=position, window=None)
    ids = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    source_mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
    source = {"input_ids": ids.flip(1), "attention_mask": source_mask}
    memory, cache, parts, at = None, Cache(), [], 0
    for n in (5, 1, 1):
        batch = source | {"decoder_input_ids": ids[:, at : at + n], "decoder_attention_mask": mask[:, : at + n]}
        out = model(batch, cache=cache, memory=memory)
        memory, at = out.memory, at + n
        parts.append(out.logits)
    made = torch.cat(parts, dim=1)
    for row in range(2):
        kept, seen = mask[row].bool(), source_mask[row].bool()
        alone = model({"input_ids": source["input_ids"][row, seen][None], "decoder_input_ids": ids[row, kept][None]}).logits[0]
        torch.testing.assert_close(made[row, kept], alone, **EXACT)


@settings(max_examples=60, deadline=None)
@example([(1, {0}), (1, {1})], 1, True)
@given(st.lists(st.tuples(st.integers(1, 3), st.sets(st.integers(0, 2))), min_size=1, max_size=7), st.integers(0, 12), st.booleans())
def test_every_slot_holds_its_own_entries_before_and_after_a_crop(passes, length, same):
    """Against plain lists: what was written when, also where two passes bring the very same positions."""
    cache = Cache()
    expected = {i: [] for i in range(3)}
    one = torch.zeros(1, 1, dtype=torch.long)
    for steps, layers in passes:
        steps = 1 if same else steps
        start = cache.length
        positions = one if same else torch.arange(start, start + steps)[None]
        cache.advance(steps)
        for i in layers:
            written = torch.arange(start, start + steps).double()[None, None, :, None]
            expected[i] += range(start, start + steps)
            keys, values, at = cache.append((i, 0), written, -written, positions)
            assert keys.flatten().tolist() == expected[i] and values.flatten().tolist() == [-t for t in expected[i]]
            assert at.shape == (1, len(expected[i])) and (same or at[0].tolist() == expected[i])
    cache.crop(length)
    total = cache.length
    cache.advance(1)
    for i in range(3):
        kept = [t for t in expected[i] if t < length]
        assert cache.held((i, 0)) == len(kept)
        keys, _, at = cache.append((i, 0), torch.full((1, 1, 1, 1), 99.0).double(), torch.zeros(1, 1, 1, 1).double(), one + total)
        assert keys.flatten().tolist() == [*kept, 99] and at.shape == (1, len(kept) + 1)
