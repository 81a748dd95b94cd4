"""The cost model and the search: bytes as on disk, and the best combination as trying all of them finds it."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.edit.quantization.engine import calibration_rows
from layerwise.errors import BadInput
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.plan.choice import FAMILIES, LEVELS, Choice, How, applied, check_plannable, choices, previewed, stages
from layerwise.plan.damage import Damage, Probe, damages
from layerwise.plan.knapsack import solve
from layerwise.plan.latency import LayerLatency, Work, milliseconds
from layerwise.plan.measure import measure_for
from layerwise.plan.search import Candidate, Space, check_reachable, learned
from layerwise.plan.size import LayerBytes, model_bytes
from layerwise.plan.trials import mean
from layerwise.stack.surgery import keep, replace

HOW = How(samples=4, batch=4, group=32)
FEW: dict[str, Any] = {"drop": (True,), "heads": (0.5,), "ffn": (0.5,), "rank": (0.5,), "bits": (4, 2)}


def _model(depth: int = 4, seed: int = 0, **layer: Any) -> Any:
    return lw.load("decoder", seed=seed, embedding={"vocab": 262}, stack={"depth": depth, "width": 32, "layer": _layer(**layer)}).eval()


def _layer(**more: Any) -> dict[str, Any]:
    return {"causal": True, "position": "rotary", "ffn": "swiglu", "heads": 4, "kv_heads": 2, "ffn_width": 64, **more}


def _on_disk(model: Any, folder: Path) -> int:
    """Bytes of the tensors in a saved checkpoint."""
    lw.save(model, folder)
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")


# --- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_expected_bytes_are_those_of_the_saved_checkpoint(dtype: torch.dtype, tie: bool, tmp_path: Path, text: Any) -> None:
    model = _model().to(dtype)
    if tie:
        model = lw.load("decoder", embedding={"vocab": 262}, stack={"depth": 4, "width": 32, "layer": _layer()}, head={"tie": True}).to(
            dtype
        )
    levels = {name: LEVELS[name] for name in LEVELS if name != "tokens"}
    space = Space(model.spec, LayerBytes(dtype), levels, HOW)
    plan = (Choice(heads=0.5, bits=3), Choice(drop=True), Choice(rank=0.5, bits=4), Choice(ffn=0.625, bits=16))
    candidate = space.candidate([space.options.index(c) for c in plan], "")
    made = applied(model, text, stages(plan, HOW), 0)
    assert candidate.bytes == _on_disk(made, tmp_path / "made") == model_bytes(previewed(model.spec, stages(plan, HOW)), dtype)
    assert model_bytes(model.spec, dtype) == _on_disk(model, tmp_path / "as-it-is")


def test_every_choice_has_its_own_bytes_whatever_its_neighbours_are() -> None:
    model = _model()
    space = Space(model.spec, LayerBytes(torch.float32), FEW, HOW)
    generator = random.Random(0)
    for _ in range(5):
        chosen = [generator.randrange(len(space.options)) for _ in range(4)]
        plan = tuple(space.options[k] for k in chosen)
        if not all(c.drop for c in plan):
            assert space.candidate(chosen, "").bytes == model_bytes(previewed(model.spec, stages(plan, HOW)), torch.float32)


# --- the knapsack


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_what_trying_all_combinations_finds(seed: int) -> None:
    generator = random.Random(seed)
    costs = [[generator.randrange(0, 50) for _ in range(4)] for _ in range(5)]
    damages_ = [[generator.uniform(-0.1, 1) for _ in range(4)] for _ in range(5)]
    front = solve(costs, damages_)
    every = [
        (sum(c[k] for c, k in zip(costs, ks, strict=True)), sum(d[k] for d, k in zip(damages_, ks, strict=True)))
        for ks in itertools.product(range(4), repeat=5)
    ]
    for budget in range(min(c for c, _ in every) - 1, 250, 7):
        found = front.best(budget)
        fitting = [d for c, d in every if c <= budget]
        if found is None:
            assert not fitting
            continue
        assert sum(c[k] for c, k in zip(costs, found, strict=True)) <= budget
        assert sum(d[k] for d, k in zip(damages_, found, strict=True)) == pytest.approx(min(fitting), abs=1e-12)


def test_a_limit_and_choices_that_are_not_allowed_are_kept() -> None:
    costs, inf = [[1, 2, 3]] * 3, float("inf")
    front = solve(costs, [[9.0, inf, 1.0]] * 3, most=7)
    assert front.best(7) in ([0, 2, 2], [2, 0, 2], [2, 2, 0]) and int(front.cost.max()) <= 7
    assert front.best(2) is None and solve(costs, [[inf] * 3] * 3).best(100) is None


def test_thinned_states_stay_within_the_budget_and_near_the_best() -> None:
    generator = random.Random(1)
    costs = [[generator.randrange(1, 10**6) for _ in range(6)] for _ in range(12)]
    damages_ = [[generator.random() for _ in range(6)] for _ in range(12)]
    exact, thin = solve(costs, damages_, states=10**6), solve(costs, damages_, states=200)
    budget = 4 * 10**6
    total = [sum(d[k] for d, k in zip(damages_, f.best(budget) or [], strict=True)) for f in (exact, thin)]
    assert total[0] <= total[1] <= total[0] * 1.05
    assert sum(c[k] for c, k in zip(costs, thin.best(budget) or [], strict=True)) <= budget


# --- sensitivities


def test_a_mean_loss_counts_every_token_once() -> None:
    assert mean([(4.0, 2), (9.0, 3)]) == 13 / 5


def test_a_matrix_is_decomposed_once_for_all_levels_and_the_candidates_are_the_same(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decomposed, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *given, **more: decomposed.append(1) or svd(*given, **more))
    model, kept = _model(depth=2), {}
    uneven = (Choice(rank=0.25, bits=4), Choice(rank=0.5))
    plans = [(Choice(rank=rank),) * 2 for rank in LEVELS["rank"]] + [uneven]
    ours = [applied(model, text, stages(plan, HOW), 0, kept=kept).state_dict() for plan in plans]
    assert len(decomposed) == 2 * 7
    anew = [applied(model, text, stages(plan, HOW), 0).state_dict() for plan in plans]
    assert all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(ours, anew, strict=True))


def test_a_damage_is_what_the_model_does_with_one_layer_changed(text: Any) -> None:
    model = _model(depth=3, seed=1)
    moves = [Choice(drop=True), Choice(bits=2), Choice(ffn=0.5)]
    make = lambda plan: applied(model, text, stages(plan, HOW), 0)  # noqa: E731
    found = damages(Probe(model, text, measure_for(model, text, ""), samples=8, batch=4, seed=1), moves, make)
    rows = calibration_rows(text, 8, 4, "train", 1, 1, model.device)

    def scores(one: Any) -> Any:
        with torch.no_grad():
            return [one(r).logits[:, :-1].log_softmax(-1) for r in rows]

    def loss(made: Any) -> float:
        each = [-p.gather(-1, r["input_ids"][:, 1:, None]) for p, r in zip(made, rows, strict=True)]
        return float(torch.cat(each).mean())

    whole = scores(model)
    for move in moves:
        for i in range(3):
            if move.drop:
                changed = model.with_stack(keep(model.stack, [j for j in range(3) if j != i]))
            else:
                changed = model.with_stack(replace(model.stack, i, make((move,) * 3).stack.layers[i]))
            made = scores(changed)
            apart = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(whole, made, strict=True)]).mean()
            assert found[move][i].added == pytest.approx(loss(made) - loss(whole), abs=1e-5)
            assert found[move][i].divergence == pytest.approx(float(apart), abs=1e-5)


def test_layers_that_stay_damage_nothing_and_pieces_are_the_whole(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(depth=3)
    measure = measure_for(model, text, "")
    probe = Probe(model, text, measure, samples=8, batch=4)
    assert probe.of(list(model.stack.layers)) == [Damage(pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))] * 3
    whole = probe.of([None] * 3)
    monkeypatch.setattr("layerwise.plan.measure.NUMBERS", 1)  # row by row, and nothing kept
    pieces = Probe(model, text, measure, samples=8, batch=4)
    assert pieces.targets[0]._kept is None and pieces.loss == pytest.approx(probe.loss, abs=1e-6)
    assert pieces.of([None] * 3) == [Damage(pytest.approx(d.added, abs=1e-6), pytest.approx(d.divergence, abs=1e-6)) for d in whole]


# --- the space of choices


def _space(depth: int = 3, seed: int = 0, latency: Any = None) -> Space:
    space = Space(_model(depth).spec, LayerBytes(torch.float32), FEW, HOW, latency)
    generator = random.Random(seed)
    moves = [Choice(**{n: level}) for n, levels in FEW.items() for level in levels]
    space.expect({move: [Damage(0.0, generator.random()) for _ in range(depth)] for move in moves})
    return space


def test_expected_damages_of_a_choice_are_the_sum_of_its_changes() -> None:
    space = _space()
    k = space.options.index(Choice(heads=0.5, ffn=0.5, bits=2))
    singles = [space.options.index(Choice(heads=0.5)), space.options.index(Choice(ffn=0.5)), space.options.index(Choice(bits=2))]
    assert space.parts[:, k].sum(axis=1) == pytest.approx(space.parts[:, singles].sum(axis=(1, 2)))
    assert space.candidate([k] * 3, "").parts["rank"] == 0 and list(FAMILIES) == ["drop", "width", "rank", "bits", "tokens"]


def test_what_candidates_did_to_single_layers_replaces_sums_and_tells_of_choices_like_them() -> None:
    space = _space()
    both, other = (space.options.index(Choice(rank=0.5, bits=b)) for b in (4, 2))
    single, width = space.options.index(Choice(bits=4)), space.options.index(Choice(ffn=0.5, bits=4))
    before = space.expected()
    space.correct([both, single, both], [Damage(0, 3 * before[0, both].sum()), Damage(0, 0.25), Damage(0, 3 * before[2, both].sum())])
    after = space.expected()
    assert after[[0, 2], both].sum(axis=1) == pytest.approx(3 * before[[0, 2], both].sum(axis=1))
    assert after[1, single].sum() == pytest.approx(0.25)
    assert after[:, other] == pytest.approx(3 * before[:, other]) and after[1, both] == pytest.approx(3 * before[1, both])
    assert after[:, width] == pytest.approx(before[:, width])
    families = list(FAMILIES)
    assert (after[:, both][:, [families.index("drop"), families.index("width")]] == 0).all()


def test_no_change_is_expected_to_damage_less_than_a_milder_one() -> None:
    space = Space(_model(2).spec, LayerBytes(torch.float32), {"bits": (8, 4, 2)}, HOW)
    seen = {8: (0.0, 0.2), 4: (0.3, 0.1), 2: (0.2, 0.4)}
    space.expect({Choice(bits=b): [Damage(0.0, d) for d in each] for b, each in seen.items()})
    at = [space.options.index(Choice(bits=b)) for b in (8, 4, 2)]
    assert space.parts[:, at, list(FAMILIES).index("bits")].tolist() == [[0.0, 0.3, 0.3], [0.2, 0.2, 0.4]]


def test_the_best_plan_is_what_trying_all_plans_finds_and_a_method_keeps_to_its_own() -> None:
    space = _space()
    for families in (list(FAMILIES), ["bits"], ["drop", "bits"]):
        allowed = [k for k, o in enumerate(space.options) if set(o.families) <= set(families)]
        budget = (space.smallest(families) + space.outside + int(space.cost[:, 0].sum())) // 2
        every = [space.candidate(ks, "") for ks in itertools.product(allowed, repeat=3)]
        every = [c for c in every if not all(choice.drop for choice in c.plan)]
        best = min(c.predicted for c in every if c.bytes <= budget)
        chosen = space.best(families, budget)
        assert chosen is not None and set(chosen) <= set(allowed)
        assert space.candidate(chosen, "").predicted == pytest.approx(best) and space.candidate(chosen, "").bytes <= budget
        others = list(space.near(families, chosen, budget, 3))
        second = min(c.predicted for c in every if c.bytes <= budget and c.plan != space.candidate(chosen, "").plan)
        assert chosen not in others and space.candidate(others[0], "").predicted == pytest.approx(second)


def test_a_target_that_cannot_be_reached_is_refused_with_what_can() -> None:
    space = _space()
    whole = space.outside + int(space.cost[:, 0].sum())
    least = min(
        space.candidate(ks, "").bytes
        for ks in itertools.product(range(len(space.options)), repeat=3)
        if not all(space.options[k].drop for k in ks)
    )
    assert space.smallest(list(FAMILIES)) == least
    check_reachable(space, list(FAMILIES), least, whole, None)
    with pytest.raises(BadInput, match=rf"the smallest that a plan reaches is {least / whole:.3f}"):
        check_reachable(space, list(FAMILIES), least - 1, whole, None)


def test_a_layer_is_always_left() -> None:
    space = _space()
    one = space.smallest(["drop"])
    assert one == space.outside + int(space.cost[0, 0])
    chosen = space.best(["drop"], one)
    assert chosen is not None and sum(space.options[k].drop for k in chosen) == 2
    assert space.best(["drop"], one - 1) is None and space.best(["drop", "bits"], space.smallest(["drop", "bits"])) is not None
    drop = next(k for k, o in enumerate(space.options) if o.drop)
    every = [space.candidate([0 if i == j else drop for i in range(3)], "").predicted for j in range(3)]
    assert space.candidate(chosen, "").predicted == pytest.approx(min(every))


def test_one_setting_for_all_layers_is_the_largest_that_fits() -> None:
    space = _space()
    sizes = {b: space.outside + int(space.cost[:, space.options.index(Choice(bits=b))].sum()) for b in (4, 2)}
    for budget, bits in ((sizes[4], 4), (sizes[4] - 1, 2)):
        assert space.uniform(["bits"], budget) == [space.options.index(Choice(bits=bits))] * 3
    assert space.uniform(["bits"], sizes[2] - 1) is None
    half = space.uniform(["heads", "ffn"], sizes[4] * 10)
    assert half == [space.options.index(Choice(heads=0.5, ffn=0.5))] * 3
    unknown = Space(_model(3).spec, LayerBytes(torch.float32), FEW, HOW)  # all alike: the largest
    assert unknown.uniform(["bits"], sizes[4] * 10) == [unknown.options.index(Choice(bits=4))] * 3


def test_what_candidates_lost_says_how_families_add_up() -> None:
    generator = random.Random(0)
    tried = []
    for _ in range(12):
        parts = {f: generator.random() for f in FAMILIES} | {"tokens": 0.0}
        added = 2 * parts["drop"] + 0.5 * parts["bits"] + parts["width"] + parts["rank"]
        tried.append(Candidate((), 0, parts, added=added))
    assert learned(tried) == pytest.approx([2, 1, 1, 0.5, 1], abs=0.1)
    assert learned([]) == pytest.approx([1, 1, 1, 1, 1])


# --- latency


class _Clock:
    """Milliseconds that are known: of a layer, its inner channels over 64."""

    outside = 1.0

    def __call__(self, layer: Any) -> float:
        return layer.ffn_width / 64


def test_with_a_limit_on_latency_the_plan_keeps_both_limits() -> None:
    space = _space(depth=3, latency=_Clock())
    every = [space.candidate(ks, "") for ks in itertools.product(range(len(space.options)), repeat=3)]
    budget = space.outside + int(space.cost[:, 0].sum())
    assert space.candidate(space.best(list(FAMILIES), budget) or [], "").ms == pytest.approx(4.0)  # nothing need be done
    for ms in (3.6, 2.6, 1.6):
        made = space.candidate(space.best(list(FAMILIES), budget, ms=ms) or [], "")
        assert made.ms is not None and made.ms <= ms and made.bytes <= budget
        least = [min(c.predicted for c in every if c.ms is not None and c.ms <= limit) for limit in (ms, ms - 0.6)]
        assert least[0] - 1e-9 <= made.predicted <= least[1] + 1e-9
    assert space.best(list(FAMILIES), budget, ms=0.9) is None
    with pytest.raises(BadInput, match="without a layer the model takes 1 ms"):
        check_reachable(space, list(FAMILIES), budget, budget, 0.9)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_latency_is_measured_by_kind_of_layer_and_a_stack_is_about_its_layers(phase: Any) -> None:
    model, work = _model(depth=6), Work(phase, 2, 16)
    latency = LayerLatency(model.spec, work, torch.float32)
    layer: Any = model.spec.stack.layers[0]
    expected = latency.outside + 6 * latency(layer)
    assert latency(layer) == latency(model.spec.stack.layers[5]) > 0 and len(latency._known) == 1
    # Timers on a busy machine: only the order of magnitude is sure.
    assert expected / 5 < milliseconds(model, work) < 5 * expected


# --- what can be planned


@pytest.mark.parametrize(
    ("name", "message"), [("encoder-decoder", "encoder-decoder"), ("vit", "models of text"), ("mlp", "models of text")]
)
def test_models_that_nothing_measures_are_refused(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check_plannable(model_spec(preset(name)))


def test_choices_are_named_and_every_pair_of_ways_is_among_them() -> None:
    made = choices(FEW)
    assert (
        str(Choice()) == "as it is" and str(Choice(heads=0.5, bits=3)) == "0.5 of the heads, 3 bits" and str(Choice(drop=True)) == "dropped"
    )
    assert {c.families for c in made} == {(), ("drop",), ("width",), ("rank",), ("bits",), ("width", "bits"), ("rank", "bits")}
    assert len(set(made)) == len(made)
