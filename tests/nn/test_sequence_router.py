"""Layers that a prompt decides about: the exact checks of card 117 that concern one forward pass and decoding with a cache."""

import pytest
import torch

import layerwise as lw
from layerwise.edit.routes import route_layers
from layerwise.infer.generate import generate
from layerwise.infer.routes import decisions
from layerwise.infer.speculative import self_speculate
from layerwise.models.model import build, rebuilt
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache
from layerwise.nn.sequence_router import GATING, Gating, SequenceRouter

DEPTH, EXACT = 6, {"rtol": 1e-10, "atol": 1e-12}
IDS = torch.randint(0, 40, (5, 9), generator=torch.Generator().manual_seed(3))


def _base(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": DEPTH, "width": 16, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 40, "std": 0.6}
    return build(model_spec(data), 1).double().eval()


def _routed(base=None, scale=0.6, **options):
    """A model whose prompts decide differently from one another."""
    model = route_layers(base or _base(), **{"bias": 0.0, "layers": [":"]} | options)
    generator = torch.Generator().manual_seed(5)
    for layer in model.stack.layers:
        if layer.router is not None:
            torch.nn.init.normal_(layer.router.weight, std=scale, generator=generator)
    return model


def _path(row):
    return row.nonzero().squeeze(1).tolist()


def test_where_all_layers_run_the_output_is_the_base_models_bitwise():  # check 1
    base = _base()
    model = _routed(base, threshold=0.0)
    assert torch.equal(model({"input_ids": IDS}).logits, base({"input_ids": IDS}).logits)
    assert torch.equal(generate(model, IDS, new=8), generate(base, IDS, new=8))
    untrained = route_layers(base)
    assert torch.equal(untrained({"input_ids": IDS}).logits, base({"input_ids": IDS}).logits)


@pytest.mark.parametrize("gate", ["soft", "straight-through"])
def test_open_gates_are_the_layer_and_closed_ones_the_identity(gate):  # check 2, limits
    base = _base()
    for bias, expected in ((1e4, base({"input_ids": IDS})), (-1e4, base({"input_ids": IDS}, path=[0, 5]))):
        model = _routed(base, scale=0.0, bias=bias, layers=["1:-1"])
        assert torch.equal(model({"input_ids": IDS}, extras={GATING: Gating(gate)}).hidden, expected.hidden)


def test_the_gradient_of_a_soft_gate_is_that_of_the_task_times_the_layers_change():  # check 2, gradient
    model = _routed()
    streams = {}

    def keep(i, layer, x, ctx, call):
        streams[i] = x, call(x, ctx)
        streams[i][1].retain_grad()
        return streams[i][1]

    gating = Gating("soft")
    logits = model({"input_ids": IDS}, around=(keep,), extras={GATING: gating}).logits
    for rho in gating.rho.values():
        rho.retain_grad()
    logits.square().sum().backward()
    for i in range(DEPTH):
        x, out = streams[i]
        rho = gating.rho[i].detach()[..., None]
        change = (out - x).detach() / rho
        expected = (out.grad * change).sum(dim=-1)
        assert expected.abs().min() > 0
        torch.testing.assert_close(gating.rho[i].grad.double(), expected, **EXACT)


def test_straight_through_computes_what_is_run_later_and_has_a_gradient():
    model = _routed()
    gating = Gating("straight-through")
    logits = model({"input_ids": IDS}, extras={GATING: gating}).logits
    torch.testing.assert_close(logits, model({"input_ids": IDS}).logits, rtol=1e-5, atol=1e-6)
    logits.square().sum().backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.stack.layers)


@pytest.mark.parametrize("full", [False, True])
def test_decisions_depend_on_the_prompt_alone_and_routers_are_asked_once_a_request(full, monkeypatch):  # check 4
    model = _routed(full_prefill=full)
    asked = []
    rho = SequenceRouter.rho
    monkeypatch.setattr(SequenceRouter, "rho", lambda self, x: asked.append(x.shape[1]) or rho(self, x))
    texts = [generate(model, IDS, new=n) for n in (3, 12)]
    assert asked == [9] * (2 * DEPTH) and torch.equal(texts[0], texts[1][:, :12])
    # Read with other tokens behind the prompt, the same decisions.
    prompt = (torch.arange(15) < 9).expand(5, -1)
    for seed in range(3):
        tail = torch.randint(0, 40, (5, 6), generator=torch.Generator().manual_seed(seed))
        made = decisions(model, {"input_ids": torch.cat([IDS, tail], dim=1), "prompt_mask": prompt})
        assert torch.equal(made, decisions(model, {"input_ids": IDS}))
    assert 0 < made.float().mean() < 1 and len({tuple(row) for row in made.tolist()}) > 2


@torch.no_grad()
def test_cached_decoding_is_the_sub_network_read_anew_and_skipped_layers_have_no_memory():  # checks 5 and 8
    model = _routed()
    runs = decisions(model, {"input_ids": IDS})
    text = generate(model, IDS, new=10)
    cache, parts = Cache(), []
    for piece in (text[:, :9], *text[:, 9:].split(1, dim=1)):
        parts.append(model({"input_ids": piece}, cache=cache).logits)
    plain = rebuilt(model, _base().spec)
    along = plain({"input_ids": text}, path=[_path(row) for row in runs]).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), along, **EXACT)
    for r, row in enumerate(runs):
        assert torch.equal(generate(plain, IDS[r : r + 1], new=10, path=_path(row)), text[r : r + 1])
    whole = Cache()
    plain({"input_ids": text}, cache=whole)
    assert cache.bytes / whole.bytes == pytest.approx(runs.float().mean().item())
    given = Gating(decisions=dict(enumerate(runs.T)))
    torch.testing.assert_close(model({"input_ids": text}, extras={GATING: given}).logits, along, **EXACT)
    assert not given.means  # no router was asked


@torch.no_grad()
@pytest.mark.parametrize("full", [False, True])
def test_padding_on_either_side_and_company_change_nothing(full):  # check 6
    model = _routed(full_prefill=full)
    lengths = [9, 4, 7, 2, 5]
    alone = [generate(model, IDS[r : r + 1, :n], new=6)[0, n:] for r, n in enumerate(lengths)]
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    left, mask = torch.full_like(IDS, 7), real.flip(1)
    left[mask] = IDS[real]
    together = generate(model, left, new=6, attention_mask=mask.long())[:, 9:]
    assert torch.equal(together, torch.stack(alone))
    right = decisions(model, {"input_ids": IDS, "attention_mask": real.long()})
    assert torch.equal(right, decisions(model, {"input_ids": left, "attention_mask": mask.long()}))
    for r, n in enumerate(lengths):
        assert torch.equal(right[r : r + 1], decisions(model, {"input_ids": IDS[r : r + 1, :n]}))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(decisions(model, {"input_ids": IDS[order]}), decisions(model, {"input_ids": IDS})[order])


@torch.no_grad()
def test_full_prefill_runs_the_prompt_whole_and_keeps_nothing_of_it_where_a_layer_is_skipped():
    base = _base()
    model = _routed(base, full_prefill=True)
    whole = base({"input_ids": IDS}).logits
    cache = Cache()
    torch.testing.assert_close(model({"input_ids": IDS}, cache=cache).logits, whole, **EXACT)
    runs = decisions(model, {"input_ids": IDS})
    assert [cache._buffers[i, 0][0].shape[0] if (i, 0) in cache._buffers else 0 for i in range(DEPTH)] == runs.sum(dim=0).tolist()
    text = generate(model, IDS, new=8)
    stepped = torch.cat([whole, *(model({"input_ids": t}, cache=cache).logits for t in text[:, 9:].split(1, dim=1))], dim=1)
    prompt = (torch.arange(17) < 9).expand(5, -1)
    torch.testing.assert_close(model({"input_ids": text, "prompt_mask": prompt}).logits, stepped, **EXACT)
    assert not torch.allclose(stepped[:, -1], base({"input_ids": text}).logits[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("rows", [[4, 0, 2], [1, 1, 3, 0], [2]])
def test_a_reordered_or_cropped_cache_goes_on_with_the_rows_it_keeps(rows):
    model = _routed()
    cache, rows = Cache(), torch.tensor(rows)
    model({"input_ids": IDS[:, :7]}, cache=cache)
    model({"input_ids": IDS[:, 7:]}, cache=cache)
    cache.crop(7)
    cache.reorder(rows)
    prompt = (torch.arange(9) < 7).expand(len(rows), -1)
    expected = model({"input_ids": IDS[rows], "prompt_mask": prompt}).logits[:, 7:]
    torch.testing.assert_close(model({"input_ids": IDS[rows, 7:]}, cache=cache).logits, expected, **EXACT)
    cache.crop(0)
    torch.testing.assert_close(model({"input_ids": IDS[rows]}, cache=cache).logits, model({"input_ids": IDS[rows]}).logits, **EXACT)


def test_self_speculation_decides_by_the_prompt_too():
    model = _routed()
    for r in range(5):
        prompt = IDS[r : r + 1]
        assert torch.equal(self_speculate(model, prompt, exit_layer=3, draft=3, new=12).ids, generate(model, prompt, new=12))


def test_a_routed_model_is_saved_and_read_back(tmp_path):
    model = _routed(temperature=0.5, threshold=0.45)
    lw.save(model, tmp_path / "m")
    again = lw.load(tmp_path / "m")
    assert again.spec == model.spec
    torch.testing.assert_close(again({"input_ids": IDS}).logits, model({"input_ids": IDS}).logits, **EXACT)
