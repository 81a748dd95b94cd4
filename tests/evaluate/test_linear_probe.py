"""A linear probe reads what is there, of any layer, and says so against scikit-learn by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import layerwise as lw
from layerwise.data.turns import LEVELS, turned
from layerwise.errors import BadInput
from layerwise.evaluate.probing import fitted


@pytest.fixture
def model():
    embedding = {"patch": [4, 4], "size": [8, 8], "channels": 1}
    made = lw.load(
        "vit", embedding=embedding, stack={"depth": 2, "width": 16, "layer": {"heads": 2}}, head={"kind": "classifier", "classes": 10}
    )
    return lw.edit.add_filters(made, size=4)


def test_it_is_logistic_regression_on_the_pooled_states(model, digits):
    found = lw.evaluate.linear_probe(model, digits, layers=[0, -1], penalty=2.0, batch=100)
    states = {}
    for name in ("train", "validation"):
        rows = getattr(digits, name).batch(torch.arange(len(getattr(digits, name))))
        with torch.no_grad():
            states[name] = model.eval()(rows, hiddens=True).hiddens[1].mean(dim=1).double().numpy(), rows["labels"].numpy()
    scale = StandardScaler().fit(states["train"][0])
    probe = LogisticRegression(C=0.5, max_iter=500).fit(scale.transform(states["train"][0]), states["train"][1])
    by_hand = probe.score(scale.transform(states["validation"][0]), states["validation"][1])
    assert found.metrics["probe_accuracy"] == pytest.approx(by_hand, abs=2 / len(states["validation"][1]))
    assert [row[0] for row in found.tables[0].rows] == [0, 1]
    assert found.metrics["best_probe_accuracy"] == max(row[1] for row in found.tables[0].rows)


def test_filters_are_read_through_and_the_output_is_what_leaves_the_norm(model, digits):
    raw, filtered = (
        lw.evaluate.linear_probe(model, digits, layers="all", filtered=f, target="quarters", batches_at_most=4) for f in (False, True)
    )
    assert raw.tables[0].rows != filtered.tables[0].rows
    assert lw.evaluate.linear_probe(model, digits, batches_at_most=2).tables[0].rows[0][0] == 2
    with pytest.raises(BadInput, match="add-filters"):
        lw.evaluate.linear_probe(lw.edit.drop_filters(model), digits, layers=[0], filtered=True)
    with pytest.raises(BadInput, match="cannot probe layer 2"):
        lw.evaluate.linear_probe(model, digits, layers=[2])


def test_separable_classes_are_separated_and_chance_is_chance():
    rng = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (300,), generator=rng)
    noise = torch.randn(300, 5, generator=rng)
    x = noise + 8 * torch.nn.functional.one_hot(y, 5)
    assert fitted((x[:200], y[:200]), (x[200:], y[200:])) > 0.98
    assert abs(fitted((noise[:200], y[:200]), (noise[200:], y[200:])) - 1 / 3) < 0.15


def test_images_are_turned_and_dimmed_as_said():
    pixels = torch.rand(40, 1, 5, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    made, quarters, levels = turned(pixels, torch.Generator().manual_seed(1))
    for image, old, k, level in zip(made, pixels, quarters, levels, strict=True):
        assert np.allclose(image[0], np.rot90(old[0], int(k)) * LEVELS[level])
    assert set(quarters.tolist()) == {0, 1, 2, 3} == set(levels.tolist())
    with pytest.raises(BadInput, match="square"):
        turned(torch.zeros(2, 1, 4, 5))
