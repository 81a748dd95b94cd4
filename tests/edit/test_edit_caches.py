"""Models with compressed caches: made, saved, merged, refused. Numbers in brackets are those of the list of exact checks for CSKV."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.infer.speculative import SelfSpeculation
from layerwise.models.hf import import_hf
from layerwise.nn.linears.shrunk import Shrunk

LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 32, "qkv_bias": True}


def _model(**layer: Any) -> Any:
    stack = {"depth": 2, "width": 16, "init_std": 0.2, "layer": {**LAYER, **layer}}
    return lw.load("decoder", embedding={"vocab": 40, "std": 1.0}, stack=stack).eval()


def _ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(0))


def _data() -> Any:
    class Rows:
        def __len__(self) -> int:
            return 8

        def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"input_ids": _ids(8, 24)[index]}

    return types.SimpleNamespace(train=Rows(), validation=Rows(), test=None)


@pytest.mark.parametrize("start", ["svd", "asvd"])
def test_all_channels_lose_nothing(start: Any) -> None:
    """[1] At density 1 the factors are the matrices, and what is generated is what the base model generates."""
    model, ids = _model(), _ids(3, 20)
    whole = lw.edit.shrink_cache(model, _data(), density=1.0, window=8, start=start)
    for module in whole.modules():
        if isinstance(module, Shrunk):
            torch.testing.assert_close(module.factor_b @ module.factor_a, module.weight, atol=1e-5, rtol=1e-4)
    assert torch.equal(lw.generate(whole, ids, new=30), lw.generate(model, ids, new=30))


def test_scales_come_from_what_is_read() -> None:
    """[2] ASVD loses less of the keys scaled by the square root of their inputs' mean magnitude than SVD, which loses less unscaled."""
    model = _model()
    with torch.no_grad():
        model.embedding.tokens.weight[:, :4] *= 8
        for layer in model.stack.layers:  # else the norm would make all channels alike
            layer.mixer.norm.weight[:4] *= 4
    scaled, plain = (lw.edit.shrink_cache(model, _data(), density=0.5, start=s, samples=8) for s in ("asvd", "svd"))
    magnitude: list[torch.Tensor] = []
    hook = model.stack.layers[0].mixer.branch.k.register_forward_pre_hook(
        lambda _m, given: magnitude.append(given[0].abs().mean(dim=(0, 1)))
    )
    with torch.no_grad():
        model({"input_ids": _ids(8, 24)})
    hook.remove()
    lost = []
    for made in (scaled, plain):
        k = made.stack.layers[0].mixer.branch.k
        gap = k.weight - k.factor_b @ k.factor_a
        lost.append([gap.square().sum().item(), (gap * magnitude[0].sqrt()).square().sum().item()])
    assert lost[0][1] < lost[1][1]
    assert lost[0][0] > lost[1][0]
    values = torch.linalg.svdvals(model.stack.layers[0].mixer.branch.k.weight)
    assert lost[1][0] == pytest.approx(values[4:].square().sum().item(), rel=1e-4)


def test_ranks_follow_density_and_split() -> None:
    """A density rho is int(rho head_dim) channels for each key/value head, of the joint matrix."""
    made = lw.edit.shrink_cache(_model(head_dim=8), density=0.5, key_share=0.25, start="svd")
    branch = made.stack.layers[1].mixer.branch
    assert (branch.k.rank, branch.v.rank) == (2 * 2, 6 * 2)
    with pytest.raises(BadInput, match="at most"):
        lw.edit.shrink_cache(_model(), density=0.8, key_share=0.2, start="svd")
    with pytest.raises(BadInput, match="rank 0"):
        lw.edit.shrink_cache(_model(), density=0.2, start="svd")
    with pytest.raises(BadInput, match="give data"):
        lw.edit.shrink_cache(_model(), density=0.5)


def test_saved_merged_and_not_exported(tmp_path: Path) -> None:
    model, ids = _model(), _ids(2, 20)
    made = lw.edit.quantize_cache(lw.edit.shrink_cache(model, density=0.5, window=8, start="svd"), bits=4)
    lw.save(made, tmp_path / "thin")
    again = lw.load(tmp_path / "thin")
    assert again.spec == made.spec
    assert torch.equal(lw.generate(again, ids, new=20), lw.generate(made, ids, new=20))
    merged = lw.edit.merge(made)
    assert merged.spec.stack.layers == model.spec.stack.layers
    assert torch.equal(merged({"input_ids": ids}).logits, model({"input_ids": ids}).logits)
    with pytest.raises(BadInput, match="merge them first"):
        lw.export(made, tmp_path / "hf", format="hf")
    with pytest.raises(BadInput, match="cache"):
        lw.export(lw.edit.evict_cache(model, kind="recent"), tmp_path / "hf", format="hf")


def test_generating_padded_prompts_is_generating_each_alone() -> None:
    made = lw.edit.shrink_cache(_model(), density=0.5, window=8, bits=4, start="svd")
    ids = _ids(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    together = lw.generate(made, ids, new=25, attention_mask=mask)
    assert torch.equal(together[0, 20:], lw.generate(made, ids[:1, 7:], new=25)[0, 13:])
    assert torch.equal(together[1], lw.generate(made, ids[1:], new=25)[0])


@pytest.mark.parametrize("edit", [{"bits": 4}, {"kind": "recent"}, {"kind": "heavy", "heavy": 4}], ids=str)
def test_rows_that_skip_layers_are_kept_as_alone(edit: dict[str, Any]) -> None:
    """With routers that decide for each prompt which layers run, a layer's cache holds some rows of the batch only."""
    model = _model(router={"decides": "layer"})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.copy_(3 * torch.randn(parameter.shape, generator=generator))
    shrink = "kind" not in edit
    made = (
        lw.edit.shrink_cache(model, density=0.5, window=8, start="svd", **edit) if shrink else lw.edit.evict_cache(model, window=6, **edit)
    )
    ids = _ids(4, 20)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    together = lw.generate(made, ids, new=20, attention_mask=mask)
    assert torch.equal(together[1, 20:], lw.generate(made, ids[1:2, 6:], new=20)[0, 14:])
    for row in (0, 2, 3):
        assert torch.equal(together[row], lw.generate(made, ids[row : row + 1], new=20)[0])


FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "gpt_neox"])
def test_decoders_from_elsewhere(family: str, tmp_path: Path) -> None:
    """Grouped queries, biases, norms on keys, learned positions and partly rotated heads: at density 1 nothing changes, below something does."""
    torch.manual_seed(0)
    if family in FAMILIES:
        config: Any = FAMILIES[family](
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
            initializer_range=0.2,
        )  # fmt: skip
    elif family == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    else:
        config = transformers.GPTNeoXConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            rotary_pct=0.5,
            initializer_range=0.2,
        )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = import_hf(tmp_path), _ids(2, 20)
    whole = lw.edit.shrink_cache(model, _data(), density=1.0, window=8, samples=4)
    assert torch.equal(lw.generate(whole, ids, new=20), lw.generate(model, ids, new=20))
    less = lw.edit.shrink_cache(model, density=0.25, window=8, start="svd")
    assert lw.generate(less, ids, new=20).shape == (2, 40)


def test_what_thin_features_give_back_is_an_ordinary_model(tmp_path: Path) -> None:
    """Its keys and values are those of the thin cache, position by position; `transformers` computes the same; shrunk again it loses nothing."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "from")
    model, ids = import_hf(tmp_path / "from"), _ids(2, 20)
    thin = lw.edit.shrink_cache(model, _data(), density=0.5, window=8, samples=4)
    wide = lw.edit.widen_cache(thin)
    assert wide.spec.stack.layers == model.spec.stack.layers
    before = thin.stack.layers[1].mixer.branch
    after = wide.stack.layers[1].mixer.branch
    x = torch.randn(3, 16)
    for role in ("k", "v"):
        old, new = getattr(before, role), getattr(after, role)
        torch.testing.assert_close(new(x), old.widen(old.shrink(x)), atol=1e-5, rtol=1e-4)
        assert old.weight.shape == new.weight.shape and not torch.allclose(old.weight, new.weight)
    lw.export(wide, tmp_path / "to", format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to").eval()
    with torch.no_grad():
        torch.testing.assert_close(wide({"input_ids": ids}).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    again = lw.edit.shrink_cache(wide, density=0.5, window=1, start="svd")
    assert torch.equal(lw.generate(again, ids, new=20), lw.generate(wide, ids, new=20))
    assert not torch.equal(lw.generate(again, ids, new=20), lw.generate(model, ids, new=20))
    with pytest.raises(BadInput, match="shrink-cache"):
        lw.edit.widen_cache(wide)


def test_layers_with_a_window_keep_the_newest() -> None:
    """What they never look at is not kept; as the window of attention is kept whole, nothing is lost there."""
    model, ids = _model(window=6), _ids(2, 20)
    made = lw.edit.evict_cache(model, kind="heavy", window=4, heavy=4)
    assert [layer.cache.kind for layer in made.spec.stack.layers] == ["recent", "recent"]
    assert torch.equal(lw.generate(made, ids, new=20), lw.generate(model, ids, new=20))


def test_refused() -> None:
    thin = lw.edit.shrink_cache(_model(), density=0.5, start="svd")
    with pytest.raises(BadInput, match="already"):
        lw.edit.shrink_cache(thin, density=0.5, start="svd")
    with pytest.raises(BadInput, match="already"):
        lw.edit.evict_cache(thin)
    with pytest.raises(BadInput, match="shrink-cache"):
        lw.edit.quantize_cache(_model())
    with pytest.raises(BadInput, match="steps back"):
        SelfSpeculation(thin, _ids(1, 8), exit_layer=1)
    with pytest.raises(BadInput, match="encoder-decoder"):
        lw.edit.evict_cache(lw.load("encoder-decoder", embedding={"vocab": 40}))
    with pytest.raises(BadInput, match="causal"):
        lw.edit.evict_cache(lw.load("encoder", embedding={"vocab": 40}))
    with pytest.raises(BadInput, match="merge"):
        lw.edit.shrink_cache(lw.edit.lora(_model(), targets=("k",)), density=0.5, start="svd")
