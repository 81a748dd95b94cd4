"""Self-speculative decoding: the exact checks 4 to 8 of card 047, and rows with paths of their own."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from layerwise.data.load import Split
from layerwise.edit.adapt import lora
from layerwise.edit.linears import quantize_nf4
from layerwise.edit.quantization.quantize import quantize
from layerwise.errors import BadInput
from layerwise.evaluate.exits import self_speculation
from layerwise.infer.generate import generate, probabilities
from layerwise.infer.paths import generate_along
from layerwise.infer.speculative import SelfSpeculation, self_speculate
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.nn.cache import Cache


def _model(vocab=40, depth=4, std=0.3, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": depth, "width": 16, "init_std": std}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": vocab, "std": 0.6}
    return build(model_spec(data), 1).double().eval()


PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
ROWS = torch.randint(0, 40, (6, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("layer", [{}, {"kv_heads": 1, "window": 6}, {"position": "alibi"}, {"position": "relative"}])
def test_greedy_is_ordinary_decoding_token_for_token(layer):
    model = _model(**layer)
    for prompt in (PROMPT, PROMPT[:, :1], ROWS[:3]):
        plain = generate(model, prompt, new=17)
        for exit_layer in range(1, 5):
            for draft in (0, 2, 5):
                assert torch.equal(self_speculate(model, prompt, exit_layer=exit_layer, draft=draft, new=17).ids, plain)
            unsure = self_speculate(model, prompt, exit_layer=exit_layer, draft=5, confidence=0.2, new=17)
            assert torch.equal(unsure.ids, plain)


def test_drafting_ends_where_the_exit_is_unsure_and_costs_no_layer_then():
    model = _model()
    free = self_speculate(model, PROMPT, exit_layer=2, draft=4, new=24)
    picky = self_speculate(model, PROMPT, exit_layer=2, draft=4, confidence=0.2, new=24)
    assert 0 < picky.drafted < free.drafted and picky.accepted / picky.drafted > free.accepted / free.drafted
    never = self_speculate(model, PROMPT, exit_layer=2, draft=4, confidence=1.0, new=24)
    assert never.drafted == 0 and never.rounds == 24
    calls = Counter()
    for i, layer in enumerate(model.stack.layers):
        layer.register_forward_pre_hook(lambda _m, given, i=i: calls.update({i: 1}))
    self_speculate(model, PROMPT, exit_layer=2, draft=4, confidence=1.0, new=24)
    assert calls == dict.fromkeys(range(4), 24)  # as many as ordinary decoding makes


def test_the_evaluation_counts_the_calls_of_layers():
    model = _model()
    data = SimpleNamespace(validation=Split({"rows": ROWS[:, :6].numpy()}))
    options = {"prompts": 3, "prompt": 5, "new": 20, "repeats": 1}
    counted, most = [], {}
    for layer in model.stack.layers:
        layer.register_forward_pre_hook(lambda _m, given: counted.append(1))
    for pair in ((1, 2), (3, 2)):
        counted.clear()
        texts = [self_speculate(model, row, exit_layer=pair[0], draft=pair[1], new=20) for row in ROWS[:3, :5].split(1)]
        most[pair] = len(counted), texts
    counted.clear()
    for row in ROWS[:3, :5].split(1):
        generate(model, row, new=20)
    ordinary = len(counted)
    # The better pair is not the first.
    found = self_speculation(model, data, exits=sorted((1, 3), key=lambda e: -most[e, 2][0]), drafts=[2], **options)
    calls, texts = min(most.values(), key=lambda one: one[0])
    assert found.metrics["calls_share"] == pytest.approx(calls / ordinary) and found.metrics["identical"] == 1
    assert found.metrics["tokens_per_pass"] == pytest.approx(60 / sum(text.rounds for text in texts))
    assert found.metrics["acceptance"] == pytest.approx(sum(t.accepted for t in texts) / sum(t.drafted for t in texts))
    assert [row[4] for row in found.tables[0].rows] == pytest.approx([most[e, 2][0] / ordinary for e, *_ in found.tables[0].rows])


def test_all_layers_accept_every_draft_and_no_draft_is_ordinary_decoding():
    model = _model()
    whole = self_speculate(model, PROMPT, exit_layer=4, draft=3, new=16)
    assert whole.accepted == whole.drafted == 12 and whole.rounds == 4
    none = self_speculate(model, PROMPT, exit_layer=2, draft=0, new=16)
    assert none.drafted == 0 and none.rounds == 16


@pytest.mark.parametrize("exit_layer", [1, 3])
@torch.no_grad()
def test_after_every_round_the_cache_is_that_of_one_pass_over_all_but_the_newest(exit_layer):
    model = _model()
    text = SelfSpeculation(model, PROMPT, exit_layer=exit_layer, draft=4)
    while text.ids.shape[1] < 30:
        text.round()
        fresh = Cache()
        model({"input_ids": text.ids[:, :-1]}, cache=fresh)
        assert text.cache.length == fresh.length == text.ids.shape[1] - 1
        for slot, pair in fresh._buffers.items():
            assert text.cache.held(slot) == fresh.held(slot) == fresh.length
            for ours, theirs in zip(text.cache._buffers[slot], pair, strict=True):
                torch.testing.assert_close(ours[:, :, : fresh.length], theirs[:, :, : fresh.length], rtol=1e-10, atol=1e-12)
            assert torch.equal(text.cache._positions[slot], fresh._positions[slot])
    assert 0 < text.accepted < text.drafted or exit_layer == 1


@torch.no_grad()
def test_no_layer_sees_a_token_twice_in_a_round():
    model = _model()
    seen = Counter()
    for i, layer in enumerate(model.stack.layers):
        layer.register_forward_pre_hook(lambda _m, given, i=i: seen.update({i: given[0].shape[1]}))
    text = SelfSpeculation(model, PROMPT, exit_layer=2, draft=3)
    text.round()
    assert seen == dict.fromkeys(range(4), 5 + 3)  # the prompt goes through once, in the draft, and with it the drafts
    seen.clear()
    text.round()
    assert seen == dict.fromkeys(range(4), 1 + 3)


@pytest.mark.parametrize(("top_p", "draws"), [(1.0, 20000), (0.8, 5000)])
@torch.no_grad()
def test_samples_come_from_the_whole_models_distribution(top_p, draws):
    model = _model(vocab=8)
    text = SelfSpeculation(model, PROMPT, exit_layer=1, draft=2, temperature=1.5, top_p=top_p)
    logits = model({"input_ids": PROMPT}).logits[:, -1]
    q = model({"input_ids": PROMPT}, path=[0]).logits[:, -1]
    expected, belief = probabilities(logits, 1.5, top_p)[0], probabilities(q, 1.5, top_p)
    assert (expected - belief[0]).abs().sum() > 0.2  # the draft is another distribution
    count = torch.zeros(8)
    drafts = torch.multinomial(belief[0].expand(draws, 8), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    for draft in drafts.split(1):
        kept, last = text._sampled(draft[None], [q], torch.stack([logits, logits], dim=1))
        count[draft if kept else last[0]] += 1
    real = expected > 0
    assert count[~real].sum() == 0
    assert stats.chisquare(count[real].double(), expected[real].double() / expected[real].double().sum() * count.sum()).pvalue > 1e-3


@pytest.mark.parametrize("confidence", [0.0, 0.4])
def test_sampled_texts_follow_the_distribution_of_two_tokens(confidence):
    model = _model(vocab=4, depth=2, std=0.15)
    first = model({"input_ids": PROMPT % 4}).logits[0, -1].softmax(0)
    count, expected = torch.zeros(16), torch.zeros(16)
    for a in range(4):
        second = model({"input_ids": torch.cat([PROMPT % 4, torch.tensor([[a]])], dim=1)}).logits[0, -1].softmax(0)
        expected[4 * a : 4 * a + 4] = (first[a] * second).detach()
    for seed in range(250):  # rows share a round, which must not change what any of them draws
        made = self_speculate(
            model, PROMPT.expand(4, -1) % 4, exit_layer=1, draft=2, confidence=confidence, new=2, temperature=1.0, seed=seed
        ).ids[:, -2:]
        count += torch.bincount(4 * made[:, 0] + made[:, 1], minlength=16)
    assert expected.min() > 0.005
    assert stats.chisquare(count.double(), expected.double() / expected.double().sum() * count.sum()).pvalue > 1e-3


def test_a_stop_token_ends_the_text_where_ordinary_decoding_does():
    model = _model()
    for prompt in (PROMPT, ROWS[:3]):
        free = generate(model, prompt, new=20)
        stop = int(free[0, prompt.shape[1] + 7])
        for new in (20, 9):
            made = self_speculate(model, prompt, exit_layer=2, draft=4, new=new, stop=stop).ids
            assert torch.equal(made, generate(model, prompt, new=new, stop=stop))


def test_an_exit_is_the_path_that_ends_there():
    model = _model()
    x = model({"input_ids": PROMPT}, hiddens=True).hiddens[1]
    torch.testing.assert_close(model({"input_ids": PROMPT}, path=[0, 1]).logits, model.head(model.stack.norm(x), model.token_matrix))


PATHS = [[0, 1, 2, 3], [0, 2, 3], [0, 1, 1, 2, 2, 3], [3, 0], [], [0, 1, 2, 3]]


@pytest.mark.parametrize("layer", [{}, {"position": "alibi"}, {"position": "relative"}])
def test_rows_along_paths_of_their_own_are_as_alone(layer):
    model = _model(**layer)
    mask = torch.ones_like(ROWS)
    mask[2, :3] = 0
    made = model({"input_ids": ROWS, "attention_mask": mask}, path=PATHS).logits
    for r, path in enumerate(PATHS):
        alone = model({"input_ids": ROWS[r : r + 1], "attention_mask": mask[r : r + 1]}, path=path).logits[0]
        torch.testing.assert_close(made[r, mask[r] == 1], alone[mask[r] == 1], rtol=1e-10, atol=1e-12)


def test_rows_that_differ_share_the_calls_of_layers():
    model = _model()
    calls = []
    for i, layer in enumerate(model.stack.layers):
        layer.register_forward_hook(lambda _m, given, _out, i=i: calls.append((i, len(given[0]))))
    model({"input_ids": ROWS[:3]}, path=PATHS[:3])
    assert len(calls) == 6 and sum(rows for _, rows in calls) == 13
    gradient = model({"input_ids": ROWS}, path=PATHS).logits.sum()
    gradient.backward()
    assert all(layer.ffn.branch.down.weight.grad is not None for layer in model.stack.layers)


def test_texts_go_on_along_paths_of_their_own():
    model = _model()
    paths = [p for p in PATHS if p]
    made = generate_along(model, ROWS[:5], paths, new=8)
    for r, path in enumerate(paths):
        assert torch.equal(made[r : r + 1], generate(model, ROWS[r : r + 1], new=8, path=path))


def test_refusals():
    model = _model()
    with pytest.raises(BadInput, match="length >= 1"):
        self_speculate(model, ROWS[:, :0], exit_layer=2)
    with pytest.raises(BadInput, match="exit_layer is 1 to 4"):
        self_speculate(model, PROMPT, exit_layer=5)
    with pytest.raises(BadInput, match="2 paths were given for 6 rows"):
        model({"input_ids": ROWS}, path=[[0], [1]])
    with pytest.raises(BadInput, match="share no cache"):
        model({"input_ids": ROWS}, path=PATHS, cache=Cache())
    with pytest.raises(BadInput, match="give one for each"):
        generate_along(model, ROWS, [[0]])


@pytest.mark.parametrize("how", ["nf4", "packed", "packed-lora"])
def test_a_quantized_model_drafts_for_itself(how):
    data = preset("decoder")
    data["stack"] |= {"depth": 3, "width": 64, "init_std": 0.1}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] = {"vocab": 40}
    model = build(model_spec(data), 0)
    model = quantize_nf4(model) if how == "nf4" else quantize(model, bits=4, group=16, method="rtn")
    if how == "packed-lora":
        model = lora(model, rank=2)
        for layer in model.stack.layers:
            torch.nn.init.normal_(layer.ffn.branch.down.lora_b, std=0.1)
    model = model.double().eval()
    for prompt in (PROMPT, ROWS[:3]):
        plain = generate(model, prompt, new=12)
        for confidence in (0.0, 0.1):
            assert torch.equal(self_speculate(model, prompt, exit_layer=1, draft=3, confidence=confidence, new=12).ids, plain)
    text = self_speculate(model, PROMPT, exit_layer=1, draft=2, new=12, temperature=1.0, seed=3)
    assert 0 < text.accepted < text.drafted  # sampled from the packed model too
