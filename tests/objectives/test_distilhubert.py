"""One vector a frame that predicts several layers of a speech model: all checks of card 010 (DistilHuBERT)."""

import math

import pytest
import torch
from torch import nn

import layerwise as lw
from layerwise.embed.audio_spec import WaveSpec
from layerwise.embed.wave import WaveEmbedding
from layerwise.errors import BadInput
from layerwise.models.model import build, make_model
from layerwise.models.spec import ModelSpec, model_spec
from layerwise.nn.gradient import scale_gradient
from layerwise.objectives.distances import distances
from layerwise.objectives.distill import Distillation
from layerwise.objectives.masked_units import MaskedUnits, frame_mask, mfcc, spans
from layerwise.objectives.prediction_heads import PredictionHeads
from layerwise.stack.spec import LayerSpec, StackSpec

SMALL = {"kind": "wave", "channels": [8, 8, 8], "kernels": [10, 4, 4], "strides": [5, 4, 2], "position_kernel": 8, "position_groups": 4}


def _speech(seed=0, depth=4, **embedding):
    layer = {"heads": 2, "norm": "layernorm", "norm_eps": 1e-5, "placement": "post", "qkv_bias": True, "out_bias": True, "ffn_bias": True}
    stack = {"depth": depth, "width": 16, "final_norm": False, "init_std": 0.2, "layer": layer}
    return build(model_spec({"embedding": {**SMALL, **embedding}, "stack": stack, "head": None}), seed).eval()


def _student(teacher, keep=2, **options):
    return lw.edit.wave_front(lw.edit.drop_layers(teacher, layers=list(range(keep, teacher.stack.depth))), **options)


def _waves(rows=2, samples=1200):
    return torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


def _objective(teacher, predict=(1, 3), **options):
    return Distillation(None, teacher=teacher, hidden=1.0, predict=list(predict), distance="l1-cosine", **options)


def _hubert(depth=12):
    """The description of HuBERT Base, as facebook/hubert-base-ls960's configuration has it."""
    layer = LayerSpec(
        heads=12, ffn="gelu", norm="layernorm", norm_eps=1e-5, placement="post", qkv_bias=True, out_bias=True, ffn_bias=True, dropout=0.1
    )
    return ModelSpec(embedding=WaveSpec(dropout=0.1), stack=StackSpec(depth=depth, width=768, layer=layer, final_norm=False), head=None)


def test_the_student_of_hubert_base_has_23_491_200_parameters():
    """Check 1: by part; 94.4 million in the teacher."""
    from layerwise.edit.drop import preview_drop
    from layerwise.edit.sound import preview_wave_front

    spec = preview_wave_front(preview_drop(_hubert(), layers=list(range(2, 12))))
    with torch.device("meta"):
        student, teacher = make_model(spec), make_model(_hubert())

    def count(*names):
        return sum(p.numel() for n, p in student.named_parameters() if n.startswith(names))

    assert count("embedding.convolutions") == 4_200_448
    assert count("embedding.project") == 393_984
    assert count("embedding.positions") == 4_719_488
    assert count("stack.layers") == 14_175_744
    assert count("embedding.norm") == 1_536
    assert count("") == 23_491_200
    assert count("") / sum(p.numel() for p in teacher.parameters()) == pytest.approx(0.25, abs=0.003)


@pytest.mark.parametrize("spec", [WaveSpec(), WaveSpec(channels=(8,) * 3, kernels=(10, 4, 4), strides=(5, 4, 2), position_kernel=8)])
def test_the_number_of_frames_follows_from_the_convolutions(spec):
    """Check 2: 16,000 samples give 49 frames; the padding mask counts alike, and so do the windows that units come from."""
    assert WaveSpec().frames(16_000) == 49
    for samples in (spec.least, spec.least + 1, 1000, 1234, 16_000):
        by_hand = samples
        for kernel, stride in zip(spec.kernels, spec.strides, strict=True):
            by_hand = math.floor((by_hand - kernel) / stride) + 1
        mask = (torch.arange(16_000) < samples).long()[None]
        assert spec.frames(samples) == by_hand == int(WaveEmbedding(spec, 16).frame_mask({"attention_mask": mask}).sum())
        assert mfcc(torch.zeros(1, samples), spec, 16_000).shape[1] == by_hand


def test_the_loss_is_least_where_prediction_and_state_agree():
    """Check 3: |h - h|_1 = 0 and log(1 + 1/e) remains; any other prediction is worse."""
    h = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    same = distances("l1-cosine", h, h)
    torch.testing.assert_close(same, torch.full_like(same, math.log1p(math.exp(-1))))
    assert same[0].item() == pytest.approx(0.3132617, abs=1e-7)
    for other in (1.01 * h, h + 0.01, -h, torch.zeros_like(h), h.flip(0)):
        assert (distances("l1-cosine", other, h) >= same - 1e-12).all() and (distances("l1-cosine", other, h) > same).any()
    torch.testing.assert_close(distances("l1-cosine", -h, h, cosine=2.0), 2 * h.abs().mean(-1) + 2 * math.log1p(math.e))


def test_heads_are_linear_maps_of_their_own():
    """Check 4: equal to one nn.Linear a slice, and to one with a block-diagonal matrix."""
    heads, z = PredictionHeads(6, 4, 3, seed=1), torch.randn(2, 5, 6)
    slices = torch.nn.functional.gelu(heads.expand(z))
    block = nn.Linear(12, 12)
    for i, made in enumerate(heads(z)):
        alone = nn.Linear(4, 4)
        alone.weight, alone.bias = nn.Parameter(heads.weight[i]), nn.Parameter(heads.bias[i])
        torch.testing.assert_close(made, alone(slices[..., 4 * i : 4 * i + 4]))
    block.weight, block.bias = nn.Parameter(torch.block_diag(*heads.weight)), nn.Parameter(heads.bias.flatten())
    torch.testing.assert_close(heads(z).movedim(0, -2).flatten(-2), block(slices))
    assert PredictionHeads(6, 4, 1)(z).shape == (1, 2, 5, 4)
    assert heads.weight.abs().max() <= 0.5 and heads.expand.weight.abs().max() <= 6**-0.5


def test_the_gradient_of_the_convolutions_is_a_tenth_and_nothing_else_changes():
    """Check 5."""
    whole, tenth = _speech(feature_gradient=1.0), _speech(feature_gradient=0.1)
    found = []
    for model in (whole, tenth):
        out = model({"input_values": _waves()}).hidden
        out.square().sum().backward()
        found.append((out, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        factor = 0.1 if name.startswith("embedding.convolutions") else 1.0
        torch.testing.assert_close(found[1][1][name], factor * gradient if gradient is not None else None)
    x = torch.ones(3, requires_grad=True)
    assert scale_gradient(x, 1.0) is x


def test_the_student_begins_as_copies_of_the_teachers_lower_half():
    """Check 6: bitwise equal tensors in storage of their own."""
    teacher = _speech()
    student, theirs = _student(teacher), teacher.state_dict()
    ours = student.state_dict()
    assert set(theirs) - set(ours) == {
        n for n in theirs if "project_norm" in n or "mask_vector" in n or n.startswith(("stack.layers.2", "stack.layers.3"))
    }
    assert all(torch.equal(t, theirs[n]) and t.data_ptr() != theirs[n].data_ptr() for n, t in ours.items())
    assert student.spec.embedding.feature_gradient == 0.1
    kept = _student(teacher, project_norm=True)
    torch.testing.assert_close(kept({"input_values": _waves()}).hidden, teacher({"input_values": _waves()}, hiddens=True).hiddens[1])
    with pytest.raises(BadInput, match="read waveforms"):
        lw.edit.wave_front(lw.load("decoder", embedding={"vocab": 9}))


@pytest.mark.parametrize("predict", [(3,), (0, 1, 3)])
def test_heads_do_not_change_the_vector_and_the_teacher_learns_nothing(predict):
    """Check 7."""
    teacher, batch = _speech().train(), {"input_values": _waves()}
    student, objective = _student(teacher), _objective(teacher, predict)
    before = student(batch).hidden
    objective.attach(student, batch)
    assert torch.equal(student(batch).hidden, before) and not any("heads" in n for n in student.state_dict())
    one, two = objective(student, batch), objective(student, batch)
    assert torch.equal(one.total, two.total) and not teacher.training
    one.total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in objective.parameters())
    theirs = teacher(batch, hiddens=True).hiddens
    made = objective.heads(before)
    by_hand = torch.stack([distances("l1-cosine", m, theirs[i]).mean() for m, i in zip(made, predict, strict=True)]).mean()
    torch.testing.assert_close(one.mean, by_hand)
    assert one.count == before.shape[0] * before.shape[1]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_does_not_change_real_frames(norm):
    """Check 8. A GroupNorm over time sees the padding (as in HuBERT Base itself), so there it holds only where convolutions have none."""
    model, wave = _speech(extractor_norm=norm), _waves(1)
    padded = torch.cat([wave, torch.zeros(1, 700)], dim=1)
    mask = (torch.arange(1900) < 1200).long()[None]
    alone, out = model({"input_values": wave}).hidden, model({"input_values": padded, "attention_mask": mask})
    same = torch.allclose(out.hidden[out.mask], alone[0], atol=1e-5)
    assert out.mask.sum() == alone.shape[1] and same == (norm == "layer")


def test_the_distilled_student_loads_as_transformers_hubert(tmp_path):
    """Two layers without the norm before the projection are a HubertModel (feat_proj_layer_norm: false)."""
    import transformers

    student = _student(_speech())
    with pytest.raises(BadInput, match="predict names layer 4"):
        Distillation.check_teacher({"predict": [4], "hidden": 1.0}, student.spec, _speech().spec)
    lw.export(student, tmp_path, format="hf")
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "HubertModel" and theirs.config.num_hidden_layers == 2 and not theirs.config.feat_proj_layer_norm
    with torch.no_grad():
        torch.testing.assert_close(theirs(_waves()).last_hidden_state, student({"input_values": _waves()}).hidden, atol=1e-5, rtol=1e-4)


def test_hidden_spans_are_real_and_long_enough():
    real = torch.arange(40) < torch.tensor([40, 25, 3])[:, None]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.stack([spans(real, 0.06, 5, generator) for _ in range(200)])
    assert not (hidden & ~real).any() and hidden.any(dim=2).all()
    runs = [len(run) for row in hidden[:, :2].flatten(0, 1).int() for run in "".join(map(str, row.tolist())).split("0") if run]
    assert min(runs) >= 5
    assert hidden[:, 0].float().mean() == pytest.approx(1 - (1 - 0.06) ** 5, abs=0.06)


class _Sounds:
    kind, rate = "sound", 8000

    class train:
        @staticmethod
        def batch(rows):
            generator = torch.Generator().manual_seed(0)
            tone = torch.sin(torch.arange(1200) * (0.05 + 0.1 * (rows % 3))[:, None]) + 0.05 * torch.randn(
                len(rows), 1200, generator=generator
            )
            return {"input_values": tone, "attention_mask": (torch.arange(1200) < 1000).long().expand(len(rows), -1)}

        def __len__(self):
            return 12

    train = train()


def test_units_tell_sounds_apart_and_masked_prediction_learns_them():
    model, objective = _speech().train(), MaskedUnits(_Sounds(), units=3, start=0.1, span=3)
    batch = _Sounds.train.batch(torch.arange(6))
    objective.attach(model, batch)
    frames = mfcc(batch["input_values"], model.spec.embedding, 8000)
    units = torch.cdist(frames, objective.centres).argmin(-1)[frame_mask(batch, model.spec.embedding, frames.shape[1])].view(6, -1)
    assert (units == units[:, :1]).all() and len(set(units[:3, 0].tolist())) == 3 and torch.equal(units[:3], units[3:])
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=3e-3)
    losses = []
    for step in range(30):
        loss = objective(model, batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.mean.backward()
        optimizer.step()
        losses.append(loss.mean.item())
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(BadInput, match="mask vector"):
        MaskedUnits(_Sounds()).attach(_speech(mask_vector=False), batch)
