"""Training thin features of keys and values. Numbers in brackets are those of the list of exact checks for CSKV."""

import types
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.nn.positions import rotary_angles, rotate
from layerwise.objectives.cache import CacheReconstruction
from layerwise.train.loop import train
from layerwise.train.spec import TrainSpec

LAYER = {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 32, "qkv_bias": True}


def _model(bits: int | None = None, **layer: Any) -> Any:
    stack = {"depth": 3, "width": 16, "init_std": 0.2, "layer": {**LAYER, **layer}}
    base = lw.load("decoder", embedding={"vocab": 40, "std": 1.0}, stack=stack)
    return lw.edit.shrink_cache(base, density=0.5, window=8, start="svd", bits=bits)


def _batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(40, (2, 21), generator=torch.Generator().manual_seed(0))}


def _rows(ids: torch.Tensor) -> Any:
    class Rows:
        tokens_per_row = ids.shape[1]

        def __len__(self) -> int:
            return len(ids)

        def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"input_ids": ids[index]}

    return Rows()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    objective = CacheReconstruction()
    objective.attach(model, _batch())
    objective(model, _batch()).mean.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_loss_is_that_of_rotated_keys_and_of_values() -> None:
    """[3] Rotation keeps lengths: the mean squared difference of rotated keys is that of keys before it. Padding counts nowhere."""
    model = _model(qk_norm=True)
    ids = _batch()["input_ids"]
    positions = torch.arange(21)
    total = 0.0
    read: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(model.stack.layers):
        layer.mixer.branch.k.register_forward_pre_hook(lambda _m, given, i=i: read.__setitem__(i, given[0]))
    with torch.no_grad():
        model({"input_ids": ids})
        for i, layer in enumerate(model.stack.layers):
            part = layer.mixer.branch
            x = read[i]
            cos, sin = rotary_angles(positions, part.size, part.spec.rope_theta)
            keys = [rotate(part.heads(k, part.k_norm), cos, sin) for k in (part.k(x), part.k.widen(part.k.shrink(x)))]
            total += (keys[0] - keys[1]).square().mean() + (part.v(x) - part.v.widen(part.v.shrink(x))).square().mean()
    loss = CacheReconstruction()(model, {"input_ids": ids})
    torch.testing.assert_close(loss.mean, torch.as_tensor(total))
    padded = {
        "input_ids": torch.cat([ids, ids[:, :4]], dim=1),
        "attention_mask": torch.cat([torch.ones(2, 21), torch.zeros(2, 4)], dim=1).long(),
    }
    torch.testing.assert_close(CacheReconstruction()(model, padded).mean, loss.mean)


def test_layers_do_not_depend_on_one_another() -> None:
    """[4] The gradient of a layer's factors stays when the factors of all others are random."""
    model = _model()
    before = _gradients(model)
    generator = torch.Generator().manual_seed(1)
    for i in (0, 2):
        for linear in (model.stack.layers[i].mixer.branch.k, model.stack.layers[i].mixer.branch.v):
            linear.reset_factors(generator)
    after = _gradients(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("stack.layers.1.")


def test_only_factors_are_trained_and_all_is_as_before() -> None:
    """[8] Exactly A and B of keys and values get a gradient; afterwards the model is as it was, its factors aside."""
    model = _model(bits=4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    names = {f"stack.layers.{i}.mixer.branch.{r}.factor_{f}" for i in range(3) for r in "kv" for f in "ab"}
    assert set(_gradients(_model(bits=4))) == names

    data = types.SimpleNamespace(train=_rows(_batch()["input_ids"]), validation=_rows(_batch()["input_ids"]))
    spec = TrainSpec("cache-reconstruction", steps=40, batch=2, log_every=1)
    start = CacheReconstruction()(model, _batch()).mean
    found = train(model, data, spec)
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])} == names
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert found.findings.metrics["train_loss"] < 0.97 * start
    assert set(found.findings.metrics) == {"train_loss", "key_error", "value_error", "cache_loss"}
    # What is measured on held-out rows is the objective, and falls with it.
    errors = lw.analyze.cache_errors(model, data)
    measured, layers = errors.metrics, errors.tables[0].rows
    for column, name in enumerate(("key_error", "value_error"), start=1):
        assert measured[name] == pytest.approx(sum(row[column] for row in layers) / 3) and len({row[column] for row in layers}) == 3
    assert measured == {name: found.findings.metrics[name] for name in measured}
    assert measured["cache_loss"] == pytest.approx(CacheReconstruction()(model, _batch()).mean.item(), rel=1e-5)
    assert measured["cache_loss"] < 0.97 * start


def test_rounding_reaches_the_loss() -> None:
    """Without bits the loss is that of the features as they are; with few it is larger, and the gradient another."""
    exact, coarse = _model(), _model(bits=2)
    assert CacheReconstruction()(coarse, _batch()).mean > CacheReconstruction()(exact, _batch()).mean
    name = "stack.layers.0.mixer.branch.v.factor_a"
    assert not torch.allclose(_gradients(exact)[name], _gradients(coarse)[name])


def test_errors_are_shares_of_keys_and_of_values() -> None:
    """By layer, against norms of matrices; a decomposition of full rank loses nothing, and a model that keeps everything is refused."""
    model = _model()
    ids = _batch()["input_ids"]
    data = types.SimpleNamespace(validation=_rows(ids))
    found = lw.analyze.cache_errors(model, data, batch=1, batches_at_most=2)
    with torch.no_grad():
        for i, layer in enumerate(model.stack.layers):
            part, read = layer.mixer.branch, []
            hook = part.k.register_forward_pre_hook(lambda _m, given, read=read: read.append(given[0]))
            model({"input_ids": ids})
            hook.remove()
            for j, linear in ((1, part.k), (2, part.v)):
                exact = linear(read[0])
                lost = torch.linalg.norm(exact - linear.widen(linear.shrink(read[0]))) ** 2 / torch.linalg.norm(exact) ** 2
                assert found.tables[0].rows[i][j] == pytest.approx(lost.item(), rel=1e-4)
    base = lw.load("decoder", embedding={"vocab": 40, "std": 1.0}, stack={"depth": 1, "width": 16, "layer": LAYER})
    whole = lw.edit.shrink_cache(base, density=1.0, start="svd")
    assert lw.analyze.cache_errors(whole, data).metrics["cache_loss"] < 1e-10
    with pytest.raises(BadInput, match="keeps thin features"):
        lw.analyze.cache_errors(base, data)
