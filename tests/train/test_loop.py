"""The training loop: what it computes, and that it computes it again."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from layerwise.errors import BadInput, Diverged
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives.language import CausalLM
from layerwise.optim.schedule import factor
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.train.checkpoint import checkpoints
from layerwise.train.loop import Listener, train
from layerwise.train.spec import TrainSpec

SPEC = TrainSpec("causal-lm", steps=12, batch=8, log_every=3, optimizer=OptimizerSpec("adamw", lr=3e-3, weight_decay=0.1))


def _model(seed=0, **layer):
    data = preset("decoder")
    data["stack"] |= {"depth": 2, "width": 16}
    data["stack"]["layer"] |= {"heads": 2, **layer}
    data["embedding"] = {"vocab": 262}
    return build(model_spec(data), seed)


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class _Keeps(Listener):
    def __init__(self, stop_at=None):
        self.lines, self.said, self.stop_at = [], [], stop_at

    def metrics(self, values):
        self.lines.append(values)

    def say(self, message):
        self.said.append(message)

    def progress(self, step, total, values):
        if step == self.stop_at:
            raise RuntimeError("power cut")


def test_equals_a_hand_written_loop(text):
    """Same data, same steps, same weights, to the last bit."""
    ours = _model()
    train(ours, text, SPEC, seed=5)
    theirs, objective = _model(), CausalLM()
    from layerwise.data.order import Order

    order = Order(len(text.train), 8, 5)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() >= 2) == m] for m in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=3e-3, fused=True
    )
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * factor(SPEC.schedule, step, 12)
        loss = objective(theirs, text.train.batch(order.indices(step)))
        (loss.total / loss.count).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(text):
    a, b, c = _model(dropout=0.1), _model(dropout=0.1), _model(dropout=0.1)
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        train(model, text, SPEC, seed=seed)
    assert _same(a, b) and not _same(a, c)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "layca"])
@pytest.mark.parametrize("cut", [1, 4, 5, 11])
def test_resumed_run_ends_in_the_same_bits(text, tmp_path, cut, optimizer):
    options = {"inner": "adam"} if optimizer == "layca" else {}
    policies = ({"name": "rotation", "every": 3}, {"name": "gradient-norms", "every": 3}, {"name": "layer-dropout", "rate": 0.3})
    spec = dataclasses.replace(SPEC, optimizer=OptimizerSpec(optimizer, lr=1e-2, options=options), checkpoint_every=2, policies=policies)
    whole = _model(dropout=0.1)
    first = train(whole, text, spec, seed=3)
    with pytest.raises(RuntimeError, match="power cut"):
        train(_model(dropout=0.1), text, spec, seed=3, folder=tmp_path, listener=_Keeps(stop_at=cut))
    resumed = _model(seed=9, dropout=0.1)
    resumed.load_state_dict(_model(dropout=0.1).state_dict())
    again = train(resumed, text, spec, seed=3, folder=tmp_path, listener=_Keeps())
    assert _same(whole, resumed)
    assert again.findings.metrics == first.findings.metrics and again.tokens == first.tokens


def test_damaged_checkpoint_falls_back_to_the_one_before(text, tmp_path):
    spec = dataclasses.replace(SPEC, checkpoint_every=3)
    whole = _model()
    train(whole, text, spec, seed=3)
    with pytest.raises(RuntimeError):
        train(_model(), text, spec, seed=3, folder=tmp_path, listener=_Keeps(stop_at=8))
    newest = checkpoints(tmp_path)[-1]
    assert newest.name.endswith("6")
    file = newest / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    model, listener = _model(), _Keeps()
    train(model, text, spec, seed=3, folder=tmp_path, listener=listener)
    assert any("does not match its checksum" in m for m in listener.said) and any("from step 3" in m for m in listener.said)
    assert _same(whole, model)


def test_accumulation_gives_the_exact_mean_when_counts_differ(text, monkeypatch):
    """Micro-batches with different numbers of labelled tokens weigh by tokens, not by micro-batch."""
    real = type(text.train).batch

    def ragged(self, index):
        batch = real(self, index)
        mask = torch.ones_like(batch["input_ids"])
        for row, i in enumerate(index.tolist()):
            mask[row, 4 + 3 * (i % 9) :] = 0
        return batch | {"attention_mask": mask}

    monkeypatch.setattr(type(text.train), "batch", ragged)
    one, four = _model().double(), _model().double()
    spec = dataclasses.replace(SPEC, steps=3, optimizer=OptimizerSpec("sgd", lr=0.1))
    a = train(one, text, spec, seed=1)
    b = train(four, text, dataclasses.replace(spec, accumulate=4), seed=1)
    for x, y in zip(one.state_dict().values(), four.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    assert a.findings.metrics["train_loss"] == pytest.approx(b.findings.metrics["train_loss"], rel=1e-6)


def test_divergence_stops_with_a_clear_word_and_keeps_the_last_good_checkpoint(text, tmp_path):
    class Breaks(CausalLM):
        def forward(self, model, batch, generator=None, **context):
            loss = super().forward(model, batch, generator, **context)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 8:
                loss.total = loss.total * float("nan")
            return loss

    import layerwise.objectives.language as language

    old = language.CausalLM
    language.CausalLM = Breaks
    try:
        with pytest.raises(Diverged, match=r"step 7: the gradient is not finite; the last good checkpoint is kept.*[Ll]ower"):
            train(_model(), text, dataclasses.replace(SPEC, checkpoint_every=3), folder=tmp_path)
    finally:
        language.CausalLM = old
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["3", "6"]


def test_running_away_is_divergence_too(text):
    spec = dataclasses.replace(
        SPEC, steps=60, clip=None, optimizer=OptimizerSpec("sgd", lr=300.0), schedule=ScheduleSpec("constant", warmup=0)
    )
    with pytest.raises(Diverged, match=r"the loss has grown|not finite"):
        train(_model(), text, spec)


def test_logged_values_and_progress(text):
    listener = _Keeps()
    train(_model(), text, dataclasses.replace(SPEC, val_every=6), listener=listener)
    assert [line["step"] for line in listener.lines] == [1, 3, 6, 9, 12]
    assert [line["step"] for line in listener.lines if "val_loss" in line] == [6, 12]
    assert listener.lines[-1]["tokens"] == 12 * 8 * 32
    assert listener.lines[0]["loss"] > listener.lines[-1]["loss"]


def test_bf16_keeps_float32_weights_and_learns(text):
    model = _model()
    trained = train(model, text, dataclasses.replace(SPEC, precision="bf16", steps=30))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert trained.findings.metrics["train_loss"] < 5


def test_frozen_layers_do_not_move_and_are_free_afterwards(text):
    model = _model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, text, dataclasses.replace(SPEC, policies=({"name": "freeze", "layers": ["0:1"], "embedding": True},)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(n.startswith(("stack.layers.0.", "embedding.")) for n in moved)
    assert all(p.requires_grad for p in model.parameters())


def test_checkpoints_are_few_and_without_pickle(text, tmp_path):
    with pytest.raises(RuntimeError):
        train(_model(), text, dataclasses.replace(SPEC, checkpoint_every=1), folder=tmp_path, listener=_Keeps(stop_at=10))
    assert len(checkpoints(tmp_path)) == 2
    assert {p.suffix for p in Path(tmp_path).rglob("*") if p.is_file()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": None}, "either steps or epochs"), ({"batch": 0}, "batch must be positive"), ({"accumulate": 3}, "multiple of accumulate")],
)
def test_impossible_training_is_refused(change, message):
    with pytest.raises(BadInput, match=message):
        dataclasses.replace(SPEC, **change)


def test_epochs_count_rows():
    assert TrainSpec("causal-lm", epochs=2.5, batch=8).total_steps(100) == 31
