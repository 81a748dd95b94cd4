"""Chains of layers: the exact checks of card 021."""

import pytest
import torch

from layerwise.errors import BadInput
from layerwise.evaluate.chains import chain_search
from layerwise.infer.chain_search import RandomSearch, TreeSearch, actions, applied, pareto, search, shortest
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.surgery import keep, repeat

IDS = torch.arange(10).view(2, 5)


def _decoder():
    data = preset("decoder")
    data["stack"] |= {"depth": 4, "width": 16, "init_std": 0.3}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] = {"vocab": 40}
    return build(model_spec(data)).double().eval()


def _classifier(digits, depth=4):
    data = preset("vit")
    data["stack"] |= {"depth": depth, "width": 16}
    data["stack"]["layer"] |= {"heads": 2}
    data["embedding"] |= {"channels": digits.channels, "size": list(digits.size)}
    data["head"]["classes"] = 10
    return build(model_spec(data)).eval()


def _run(one, simulations, reward=lambda path: float(len(path) % 2 == 0)):
    asked = []

    def evaluate(which, paths):
        asked.extend(paths)
        return [reward(p) for p in paths]

    search([one], evaluate, simulations)
    return asked


def test_the_identity_path_is_the_model_bitwise():
    model = _decoder()
    assert torch.equal(model({"input_ids": IDS}, path=[0, 1, 2, 3]).logits, model({"input_ids": IDS}).logits)
    assert torch.equal(model({"input_ids": IDS}, path=[[0, 1, 2, 3]] * 2).logits, model({"input_ids": IDS}).logits)


def test_skips_are_removed_layers_and_repeats_unrolled_ones():
    model = _decoder()
    made = model({"input_ids": IDS}, path=[(0, 3), (0, 1, 2, 1, 2, 3)]).logits
    cut, longer = model.with_stack(keep(model.stack, [0, 3])), model.with_stack(repeat(model.stack, [0, 1, 2, 1, 2, 3]))
    torch.testing.assert_close(made[:1], cut({"input_ids": IDS[:1]}).logits, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(made[1:], longer({"input_ids": IDS[1:]}).logits, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [4, 8, 28])
def test_number_of_edits(length):
    assert len(list(actions(length))) == len(set(actions(length))) == 20 * length - 30
    assert len(list(actions(length, "skip"))) == 4 * length - 6


def test_edits_do_what_they_say_and_stay_under_the_cap():
    assert applied((0, 1, 2, 3), (1, 2, 0)) == (0, 3)
    assert applied((0, 1, 2, 3), (1, 2, 1)) == (0, 1, 2, 1, 2, 3)
    path = (0, 1, 2, 3, 4)
    assert max(len(applied(path, a)) for a in actions(5, cap=8)) == 8


@pytest.mark.parametrize("moves", ["both", "skip", "repeat"])
def test_books_of_the_tree(moves):
    tree = TreeSearch(6, moves=moves, seed=1)
    asked = _run(tree, 150)
    assert tree.root.visits == tree.simulations == 150 and asked[0] == tuple(range(6))
    assert len(asked) == len(set(asked)) == len(tree.rewards) <= 150
    nodes = [tree.root]
    for node in nodes:
        nodes.extend(node.children)
        assert node.visits == node.own + sum(child.visits for child in node.children)
        assert 0 <= node.value <= node.visits
        assert len(node.path) <= 12
        assert moves != "skip" or len(set(node.path)) == len(node.path)
    assert sum(node.own for node in nodes) == 150


def test_a_tree_follows_from_its_seed():
    same, other = [_run(TreeSearch(6, seed=3), 60) for _ in range(2)], _run(TreeSearch(6, seed=4), 60)
    assert same[0] == same[1] != other


def test_the_penalty_wants_the_shortest_child_and_without_terms_the_best_one():
    for options, best in (({"penalty": 1e9}, lambda n: -len(n.path)), ({"penalty": 0.0, "c": 0.0}, lambda n: n.value / n.visits)):
        tree = TreeSearch(6, explore=0.5, seed=0, **options)
        _run(tree, 80)
        children = [n for n in tree.root.children if n.visits]
        assert len(children) > 3 and best(max(children, key=tree.score)) == max(map(best, children))


def test_no_path_of_the_front_is_dominated():
    tree = TreeSearch(6, seed=2)
    _run(tree, 150, reward=lambda p: (len(p) * 7 + sum(p)) % 5 / 4)
    front = pareto(tree.rewards)
    assert front
    for path in front:
        assert not [p for p, r in tree.rewards.items() if r >= tree.rewards[path] and len(p) < len(path)]
        assert not [p for p, r in tree.rewards.items() if r > tree.rewards[path] and len(p) <= len(path)]
    found = shortest(tree.rewards)
    assert found is not None and len(found) == min(len(p) for p, r in tree.rewards.items() if r == 1)


def test_random_search_tries_no_path_twice():
    asked = _run(RandomSearch(6, seed=0), 100)
    assert len(set(asked)) == len(asked) == 100 and asked[0] == tuple(range(6))


def test_a_search_among_others_is_as_alone(digits):
    model = _classifier(digits)
    many = chain_search(model, digits, simulations=12, questions=9).metrics
    assert many == chain_search(model, digits, simulations=12, questions=9).metrics
    once = chain_search(model, digits, simulations=1, questions=9).metrics
    assert once["oracle_accuracy"] == once["accuracy"] == many["accuracy"] and once["evaluations"] == 1
    assert many["oracle_accuracy"] >= many["accuracy"] and 1 < many["evaluations"] <= 12


def test_refusals(digits, text):
    with pytest.raises(BadInput, match="at least 1"):
        chain_search(_classifier(digits), digits, simulations=0)
    with pytest.raises(BadInput, match="needs labels"):
        chain_search(_decoder(), text)
