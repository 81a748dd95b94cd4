"""Caches that do not keep everything. Numbers in brackets are those of the list of exact checks for CSKV."""

import copy
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.nn.cache import Cache
from layerwise.nn.caches.blocks import Blocks, as_stored
from layerwise.nn.integers import fake_quantize
from layerwise.nn.positions import rotary_angles, rotate

WINDOW = 32
LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 32, "qkv_bias": True}
THIN = {"k": {"kind": "shrunk", "rank": 4}, "v": {"kind": "shrunk", "rank": 6}}
SMALL: list[dict[str, Any]] = [
    {"window": 8},
    {"window": 8, "sliding": True},
    {"window": 8, "bits": 4},
    {"window": 8, "bits": 3, "sliding": True, "group": 2},
    {"kind": "recent", "window": 8, "sinks": 3},
    {"kind": "heavy", "window": 8, "heavy": 8},
]


def _model(cache: dict[str, Any] | None, seed: int = 0, **layer: Any) -> Any:
    linears = THIN if cache is not None and cache.get("kind", "low-rank") == "low-rank" else {}
    stack = {"depth": 2, "width": 16, "init_std": 0.2, "layer": {**LAYER, "cache": cache, "linears": linears, **layer}}
    return lw.load("decoder", embedding={"vocab": 40, "std": 1.0}, stack=stack, seed=seed).eval()


def _ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(seed))


def _decode(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Scores of the tokens behind a prompt, fed one by one."""
    cache = Cache()
    with torch.no_grad():
        model({"input_ids": ids[:, :prompt]}, cache=cache)
        return torch.cat([model({"input_ids": ids[:, i : i + 1]}, cache=cache).logits for i in range(prompt, ids.shape[1])], dim=1)


def _naive(model: Any, ids: torch.Tensor, prompt: int, sliding: bool) -> torch.Tensor:
    """[6] The same for one text from its definition: keeps what every layer read, and makes all keys and values anew at every step."""
    layers = model.stack.layers
    read: list[list[torch.Tensor]] = [[] for _ in layers]
    hooks = [
        layer.mixer.branch.k.register_forward_pre_hook(lambda _m, given, i=i: read[i].extend(given[0][0])) for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        model({"input_ids": ids[:, :prompt]})
        for hook in hooks:
            hook.remove()
        made = []
        for step in range(prompt, ids.shape[1]):
            x = model.embedding({"input_ids": ids[:, step : step + 1]}, torch.tensor([[step]]))
            for i, layer in enumerate(layers):
                inner = layer.mixer.norm(x)
                read[i].append(inner[0, 0])
                x = x + _attend(layer.mixer.branch, torch.stack(read[i]), step, sliding)
                x = x + layer.ffn.branch(layer.ffn.norm(x))
            made.append(model.head(model.stack.norm(x), model.token_matrix))
    return torch.cat(made, dim=1)


def _attend(part: Any, seen: torch.Tensor, step: int, sliding: bool) -> torch.Tensor:
    """Attention of position `step` over all positions, the old ones made from thin features."""
    window = part.spec.cache.window
    old = max(0, step - window) if sliding else step // window * window
    keys = torch.cat([part.k.widen(part.k.shrink(seen[:old])), part.k(seen[old:])])
    values = torch.cat([part.v.widen(part.v.shrink(seen[:old])), part.v(seen[old:])])
    heads = [t.unflatten(-1, (-1, part.size)).transpose(0, 1) for t in (part.q(seen[-1:]), keys, values)]
    cos, sin = rotary_angles(torch.arange(step + 1), part.size, part.spec.rope_theta)
    q, k, v = rotate(heads[0], cos[-1:], sin[-1:]), rotate(heads[1], cos, sin), heads[2]
    k, v = k.repeat_interleave(2, dim=0), v.repeat_interleave(2, dim=0)
    out = (q @ k.transpose(1, 2) * part.size**-0.5).softmax(dim=-1) @ v
    return part.o(out.transpose(0, 1).flatten(1))[None]


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("prompt", [31, 32, 33, 63, 64])
def test_decoding_reads_old_positions_from_thin_features(prompt: int, sliding: bool) -> None:
    """[6] Around multiples of the window, and across the next one; and it does differ from a cache that keeps everything."""
    model = _model({"window": WINDOW, "sliding": sliding})
    ids = _ids(1, prompt + 36)
    made = _decode(model, ids, prompt)
    torch.testing.assert_close(made, _naive(model, ids, prompt, sliding), atol=2e-5, rtol=1e-4)
    assert (made[:, -1] - model({"input_ids": ids}).logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", SMALL, ids=str)
def test_a_prompt_is_read_exactly(cache: dict[str, Any]) -> None:
    """[5] Whatever is kept, what a pass makes of its own positions is what the model makes without a cache."""
    model, ids = _model(cache), _ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model({"input_ids": ids}, cache=Cache()).logits, model({"input_ids": ids}).logits)


@pytest.mark.parametrize("kind", [{}, {"sliding": True}, {"kind": "recent", "sinks": 0}, {"kind": "heavy", "heavy": 1}], ids=str)
def test_within_the_window_nothing_is_lost(kind: dict[str, Any]) -> None:
    """[5] A window of at least the whole length."""
    model, ids = _model({"window": 40, **kind}), _ids(2, 40)
    torch.testing.assert_close(_decode(model, ids, 7), model({"input_ids": ids}).logits[:, 7:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", SMALL, ids=str)
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 17])
def test_padding_moves_nothing(cache: dict[str, Any], prompt: int) -> None:
    """A row is kept as it would be alone, whatever the lengths of the others: blocks are counted in every row for itself."""
    model, ids = _model(cache), _ids(3, prompt + 20)
    long = _ids(1, prompt + 24, seed=1)
    mask = torch.ones(3, prompt + 4, dtype=torch.long)
    mask[0, :4] = mask[2, :4] = 0
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    padded[1] = long[0]
    alone = _decode(model, ids, prompt), _decode(model, long, prompt + 4)
    together = Cache()
    with torch.no_grad():
        model({"input_ids": padded[:, : prompt + 4], "attention_mask": mask}, cache=together)
        for i in range(20):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            made = model({"input_ids": padded[:, prompt + 4 + i][:, None], "attention_mask": mask}, cache=together).logits[:, 0]
            torch.testing.assert_close(made[[0, 2]], alone[0][[0, 2], i], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(made[1], alone[1][0, i], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", SMALL, ids=str)
def test_rows_are_reordered(cache: dict[str, Any]) -> None:
    model, ids = _model(cache), _ids(3, 40)
    rows = torch.tensor([2, 0])
    kept = Cache()
    mask = torch.ones(3, 18, dtype=torch.long)
    mask[2, :5] = 0
    with torch.no_grad():
        model({"input_ids": ids[:, :18], "attention_mask": mask}, cache=kept)
        whole, some = copy.deepcopy(kept), copy.deepcopy(kept)
        some.reorder(rows)
        for i in range(18, 30):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            a = model({"input_ids": ids[:, i : i + 1], "attention_mask": mask}, cache=whole).logits
            b = model({"input_ids": ids[rows, i : i + 1], "attention_mask": mask[rows]}, cache=some).logits
            torch.testing.assert_close(a[rows], b, atol=2e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="no step back"):
        kept.crop(17)


def test_what_is_stored() -> None:
    """[7] r_K + r_V numbers a token and layer in blocks; 2 d_kv, and thin features too, for each place of the window."""
    model = _model({"window": 8})
    plain, cache = Cache(), Cache()
    with torch.no_grad():
        model({"input_ids": _ids(1, 40)}, cache=cache)
        _model(None)({"input_ids": _ids(1, 40)}, cache=plain)
    assert sum(t.numel() for t in cache.kept()) == 2 * (40 * (4 + 6) + 8 * (2 * 8 + 4 + 6))
    assert sum(t.numel() for t in plain.kept()) == 2 * 40 * 2 * 8


def test_four_bits_are_four_bits() -> None:
    """[7] Of the blocks' bytes: half a byte a number, and for every group two bytes of scale and half a byte of zero."""
    model = _model({"window": 8, "bits": 4})
    cache = Cache()
    with torch.no_grad():
        model({"input_ids": _ids(1, 40)}, cache=cache)
    blocks = [t for t in cache.kept() if t.dtype in (torch.uint8, torch.float16)]
    numbers, key_groups, value_groups = 40 * (4 + 6), 5 * 4, 40 * 2
    filled = 5 * 4 // 2  # four zeros beside 32 codes of keys are filled up to a multiple of eight numbers
    assert sum(t.numel() * t.element_size() for t in blocks) == 2 * (numbers / 2 + (key_groups + value_groups) * 2.5 + filled)


@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_training_sees_what_the_cache_stores(bits: int, group: int | None) -> None:
    """Rounding in training and in the cache share their groups, whose borders are multiples of the window."""
    thin = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0))
    seen = as_stored(thin, 8, bits, group)
    blocks = Blocks(8, bits, group)
    none = torch.empty(0, dtype=torch.long)
    blocks.put(thin[:, :8], 1, (none, torch.tensor([0]), torch.tensor([0])))
    blocks.put(thin[:, 8:16], 2, (none, torch.tensor([1]), torch.tensor([0])))
    torch.testing.assert_close(blocks.read(), seen[:, :16])
    assert torch.equal(seen[:, 16:], thin[:, 16:])
    assert (seen[:, :16] - thin[:, :16]).abs().max() > 1e-3


def test_straight_through() -> None:
    """[8] The gradient is 1 within a grid's range and 0 at its ends and beyond; without bits nothing is done."""
    x = torch.tensor([[-1.0, -0.4, 0.1, 0.77, 2.0]], requires_grad=True)
    made = fake_quantize(x, 2)
    made.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    assert made.tolist() == [[-1.0, 0.0, 0.0, 1.0, 2.0]]
    assert fake_quantize(x, None) is x


def test_heavy_hitters_are_those_most_attended() -> None:
    """Against a naive loop over heads: the newest, and of the others those with the largest sums of probabilities."""
    model, ids = _model({"kind": "heavy", "window": 4, "heavy": 3}), _ids(1, 20)
    cache = Cache()
    with torch.no_grad():
        model({"input_ids": ids}, cache=cache)
        record = lw.record(model, {"input_ids": ids}, attention="all")
    for i in range(2):
        sums = record.attention[i][0].sum(dim=1).view(2, 2, 20).sum(dim=1)
        store: Any = cache._stores[i, 0]
        for head in range(2):
            best = [*sorted(sorted(range(16), key=lambda t: -sums[head, t])[:3]), 16, 17, 18, 19]
            assert store.numbers[0, head].tolist() == best


def test_heavy_hitters_add_up_over_steps() -> None:
    """Against a loop for the lowest layer, whose full attention, restricted to what is kept and rescaled, is the attention of a step."""
    model, ids = _model({"kind": "heavy", "window": 4, "heavy": 3}, seed=2), _ids(1, 40)
    prompt = 12
    with torch.no_grad():
        full = lw.record(model, {"input_ids": ids}, attention=[0]).attention[0][0].unflatten(0, (2, 2))  # key head, its query heads
        cache = Cache()
        model({"input_ids": ids[:, :prompt]}, cache=cache)
        for step in range(prompt, 40):
            model({"input_ids": ids[:, step : step + 1]}, cache=cache)
        for head in range(2):
            sums = {t: float(full[head, :, :prompt, t].sum()) for t in range(prompt)}
            sums = _kept(sums, prompt)
            for step in range(prompt, 40):
                keys = [*sums, step]
                given = full[head, :, step, keys] / full[head, :, step, keys].sum(dim=1, keepdim=True)
                sums = _kept({t: sums.get(t, 0.0) + float(given[:, j].sum()) for j, t in enumerate(keys)}, step + 1)
            store: Any = cache._stores[0, 0]
            assert store.numbers[0, head].tolist() == sorted(sums)
            torch.testing.assert_close(store.sums[0, head], torch.tensor([sums[t] for t in sorted(sums)]))


def _kept(sums: dict[int, float], seen: int) -> dict[int, float]:
    newest = [t for t in sums if t >= seen - 4]
    best = sorted((t for t in sums if t < seen - 4), key=lambda t: -sums[t])[:3]
    return {t: sums[t] for t in sorted([*best, *newest])}


def test_the_first_and_the_newest() -> None:
    """Positions that a cache of kind recent holds after every step."""
    model, ids = _model({"kind": "recent", "window": 6, "sinks": 2}), _ids(1, 30)
    with torch.no_grad():
        cache = Cache()
        model({"input_ids": ids[:, :20]}, cache=cache)
        kept = []
        for i in range(20, 30):
            model({"input_ids": ids[:, i : i + 1]}, cache=cache)
            layout: Any = cache._stores[0, 0].layout
            kept.append(sorted(layout.positions[0].tolist()))
    assert kept == [[0, 1, *range(i - 5, i + 1)] for i in range(20, 30)]


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ({"causal": False}, "causal attention"),
        ({"linears": {}}, "edit: shrink-cache"),
        ({"linears": {**THIN, "q": {"kind": "shrunk", "rank": 2}}}, "keys and values"),
        ({"cache": {"window": 0}}, "window"),
        ({"cache": {"bits": 5}}, "bits"),
        ({"cache": {"bits": 4, "group": 4}}, "divisor of 6"),
        ({"cache": {"kind": "recent", "bits": 4}, "linears": {}}, "low-rank"),
        ({"cache": {"kind": "heavy"}, "linears": {}, "position": "alibi"}, "every head"),
    ],
)
def test_impossible_caches_are_refused(layer: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        _model(**{"cache": {"window": 8}, **layer})
