"""Outlier channels that change nothing, which rotation is measured on (card 055)."""

import copy

import pytest
import torch
import transformers as T

import layerwise as lw
from layerwise.errors import BadInput

STACK = {"depth": 3, "width": 48, "init_std": 0.3}


def _model(**layer):
    model = lw.load(
        "decoder", seed=2, embedding={"vocab": 262, "std": 0.5}, stack={**STACK, "layer": {"heads": 3, "ffn_width": 80, **layer}}
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.rand(p.shape, generator=generator))
    return model.eval()


def _ids(text):
    return text.train.batch(torch.arange(4))


@pytest.mark.parametrize(
    "layer", [{}, {"kv_heads": 1, "qkv_bias": True, "out_bias": True}, {"norm": "layernorm"}, {"placement": "sandwich"}]
)
def test_a_power_of_two_changes_no_bit_of_what_is_computed(layer, text):
    model = _model(**layer)
    before = copy.deepcopy(model.state_dict())
    made = lw.edit.inject_outliers(model, channels=2, factor=16.0, seed=3)
    assert torch.equal(made(_ids(text)).logits, model(_ids(text)).logits)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    for old, new in zip(model.stack.layers, made.stack.layers, strict=True):
        grown = new.ffn.norm.weight / old.ffn.norm.weight
        assert (grown == 16).sum() == 2 and (grown == 1).sum() == 46 and torch.equal(grown, new.mixer.norm.weight / old.mixer.norm.weight)
        assert torch.equal(new.mixer.branch.q.weight * grown, old.mixer.branch.q.weight)


def test_gains_stored_less_one_and_other_factors_agree_to_rounding(text):
    model = _model(norm="rmsnorm_zero").double()
    made = lw.edit.inject_outliers(model, factor=5.0)
    torch.testing.assert_close(made(_ids(text)).logits, model(_ids(text)).logits, rtol=1e-9, atol=1e-9)


def test_rounding_suffers_and_folding_gains_undoes_it_to_the_bit(text):
    model, how = _model(), {"method": "rtn", "bits": 8, "symmetric": True}
    made = lw.edit.inject_outliers(model)

    def error(m):
        return (lw.edit.quantize(m, **how)(_ids(text)).logits - model(_ids(text)).logits).square().mean().item()

    assert error(made) > 3 * error(model)
    for rotate in ("identity", "hadamard"):
        clean, again = (lw.edit.quantize(m, **how, rotate=rotate, seed=1).state_dict() for m in (model, made))
        assert clean.keys() == again.keys() and all(torch.equal(clean[n], again[n]) for n in clean)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
def test_decoders_of_others_get_them_too(family, text, tmp_path):
    torch.manual_seed(0)
    if family == "GPT2":
        theirs = T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=262, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        )
    else:
        config = getattr(T, f"{family}Config")(
            vocab_size=262, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2,
            **({"num_key_value_heads": 2} if family == "Llama" else {}),
        )  # fmt: skip
        theirs = getattr(T, f"{family}ForCausalLM")(config)
    theirs.eval().save_pretrained(tmp_path)
    rows = {"input_ids": _ids(text)["input_ids"]}
    made = lw.edit.inject_outliers(lw.load(tmp_path))
    torch.testing.assert_close(made(rows).logits, theirs(rows["input_ids"]).logits, rtol=1e-4, atol=1e-4)


def test_where_a_norm_writes_the_stream_it_is_refused():
    for layer in ({"placement": "post"}, {"linears": {"q": {"kind": "lora", "rank": 2}}}):
        with pytest.raises(BadInput, match="layer 0 has"):
            lw.edit.inject_outliers(_model(**layer))
    with pytest.raises(BadInput, match="channels is 1 to 48"):
        lw.edit.inject_outliers(_model(), channels=49)
