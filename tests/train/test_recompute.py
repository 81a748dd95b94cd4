"""Recomputed and compiled layers: the same gradients, and fewer bytes kept for the backward pass."""

import pytest
import torch

from layerwise.analyze.ledger import saved_bytes
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.language import CausalLM
from layerwise.stack.around import StochasticDepth
from layerwise.train.loop import compiled
from layerwise.train.recompute import Recompute, recomputing

IDS = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(0))


def _model(**layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 4, "width": 32}
    data["stack"]["layer"] |= {"heads": 2, "dropout": 0.2, **layer}
    data["embedding"] = {"vocab": 97}
    return build(model_spec(data), 0).double().train()


def _gradients(model, **context):
    torch.manual_seed(3)
    model.zero_grad()
    CausalLM()(model, {"input_ids": IDS}, **context).mean.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layers", [True, ["::2"], [0, "2:4"]])
@pytest.mark.parametrize(
    ("layer", "context"),
    [
        ({}, {}),
        ({"position": "relative"}, {}),
        ({"drop": 0.4}, {}),
        ({}, {"path": [0, 1, 1, 3]}),
        ({}, {"around": (StochasticDepth([0.5] * 4),)}),
    ],
)
def test_recomputed_layers_have_the_same_gradients(layers, layer, context):
    model = _model(**layer)
    plain = _gradients(model, **context)
    again = _gradients(model, **context | {"around": (*context.get("around", ()), Recompute(layers, 4))})
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-12, atol=1e-14)


def test_the_more_layers_are_recomputed_the_less_is_kept():
    model = _model()

    def kept(*layers):
        around = (Recompute(list(layers), 4),)
        return saved_bytes(lambda: CausalLM()(model, {"input_ids": IDS}, around=around), model.parameters())

    nothing, half, everything = kept(), kept("::2"), kept(":")
    one_input = 4 * 24 * 32 * 8
    assert nothing > half > everything
    assert nothing - half == pytest.approx(half - everything, rel=0.05)
    assert (nothing - everything) / 4 > 5 * one_input, "a layer keeps its input and gives up far more"


def test_compiled_layers_have_the_same_gradients_with_recomputation_and_a_path():
    model = _model(dropout=0.0)
    context = {"path": [0, 1, 1, 3]}
    plain = _gradients(model, **context)
    with compiled(model, True):
        whole = _gradients(model, **context)
        again = _gradients(model, **context, around=(Recompute(True, 4),))
    assert not any("forward" in vars(layer) for layer in model.stack.layers)
    for name in plain:  # the rotary angles are float32, and fused ones are rounded elsewhere
        torch.testing.assert_close(whole[name], plain[name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-8)


def _pair():
    data = preset("encoder-decoder")
    for side in ("stack", "decoder"):
        data[side] |= {"depth": 3, "width": 32}
        data[side]["layer"] |= {"heads": 2, "dropout": 0.2}
    return build(model_spec(data | {"embedding": {"vocab": 97}}), 0).double().train()


def _pair_gradients(model, **context):
    torch.manual_seed(3)
    model.zero_grad()
    model({"input_ids": IDS, "decoder_input_ids": IDS.flip(1)}, **context).logits.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_both_sides_of_an_encoder_decoder_are_recomputed():
    model = _pair()
    plain = _pair_gradients(model)
    wrappers = recomputing(model, True)
    assert set(wrappers) == {"around", "source_around"} and not recomputing(model, False)
    for name, gradient in _pair_gradients(model, **wrappers).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-12, atol=1e-14)

    def kept(**context):
        return saved_bytes(lambda: model({"input_ids": IDS, "decoder_input_ids": IDS}, **context).hidden, model.parameters())

    assert kept(**wrappers) < kept(around=wrappers["around"]) < kept()


def test_both_sides_of_an_encoder_decoder_are_compiled():
    model = _pair()
    with compiled(model, True):
        assert all("forward" in layer.__dict__ for stack in (model.stack, model.decoder) for layer in stack.layers)
    assert not any("forward" in layer.__dict__ for stack in (model.stack, model.decoder) for layer in stack.layers)
