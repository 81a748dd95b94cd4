"""wav2vec 2.0, HuBERT and Whisper, exact in both directions."""

import json

import numpy as np
import pytest
import torch
import transformers as T
from hf_reference import change_config, config_of, in_double, random_model, tensors_of

import layerwise as lw
from layerwise.embed.mel import log_mel
from layerwise.errors import BadInput
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf
from layerwise.nn.cache import Cache
from layerwise.stack.surgery import keep

SOUND = {"vocab_size": 14, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SOUND |= {"conv_dim": [12, 16, 20], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8}
SOUND |= {"num_conv_pos_embedding_groups": 4}
LARGE = {**SOUND, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
CODES = {"num_codevectors_per_group": 6, "codevector_dim": 8, "proj_codevector_dim": 8}
WHISPER = {"vocab_size": 60, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_source_positions": 20}
WHISPER |= {"max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WHISPER |= {"begin_suppress_tokens": None}
CASES = {
    "wav2vec2": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**SOUND)),
    "wav2vec2-large": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**LARGE)),
    "wav2vec2-base": (T.Wav2Vec2Model, T.Wav2Vec2Config(**SOUND | {"num_conv_pos_embeddings": 7}, mask_time_prob=0.0)),
    "wav2vec2-classes": (T.Wav2Vec2ForSequenceClassification, T.Wav2Vec2Config(**LARGE, classifier_proj_size=24, num_labels=5)),
    "wav2vec2-pretraining": (T.Wav2Vec2ForPreTraining, T.Wav2Vec2Config(**SOUND, **CODES)),
    "hubert": (T.HubertForCTC, T.HubertConfig(**SOUND, feat_proj_layer_norm=False)),
    "hubert-large": (T.HubertModel, T.HubertConfig(**LARGE)),
    "hubert-classes": (T.HubertForSequenceClassification, T.HubertConfig(**SOUND, classifier_proj_size=24, num_labels=5)),
    "whisper": (T.WhisperForConditionalGeneration, T.WhisperConfig(**WHISPER)),
    "whisper-relu": (T.WhisperForConditionalGeneration, T.WhisperConfig(**WHISPER, activation_function="relu")),
    "whisper-base": (T.WhisperModel, T.WhisperConfig(**WHISPER)),
}
WAVES = [name for name in CASES if not name.startswith("whisper")]
WORDS = [name for name in CASES if name.startswith("whisper")]
WAVE = torch.randn(3, 420, generator=torch.Generator().manual_seed(0))
WAVE_MASK = torch.arange(420) < torch.tensor([420, 261, 150])[:, None]
MELS = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(4, 60, (3, 15), generator=torch.Generator().manual_seed(1))
TARGET_MASK = torch.arange(15) < torch.tensor([15, 15, 6])[:, None]
PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def _saved(name, folder):
    model = random_model(*CASES[name])
    model.save_pretrained(folder)
    return model


def _inputs(name):
    return {"input_values": WAVE} if name in WAVES else {"input_features": MELS, "decoder_input_ids": TARGET}


def _same(ours, theirs, tolerance, real=None):
    if real is not None:
        ours, theirs = ours[real], theirs[real]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_frames_layers_and_logits_of_waveforms_are_equal(name, tmp_path, dtype, tolerance, padded):
    theirs = _saved(name, tmp_path).to(dtype)
    ours = import_hf(tmp_path, dtype=dtype)
    waves = WAVE.to(dtype).masked_fill(~WAVE_MASK, 0.0) if padded else WAVE.to(dtype)
    batch = {"input_values": waves} | ({"attention_mask": WAVE_MASK.long()} if padded else {})
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
    real = made.mask
    stable = theirs.config.do_stable_layer_norm
    inner = getattr(theirs, theirs.base_model_prefix, theirs)
    with torch.no_grad():
        final = inner(**batch).last_hidden_state
    for a, b in zip(
        made.hiddens[:-1] if stable else made.hiddens, reference.hidden_states[1:-1] if stable else reference.hidden_states[1:], strict=True
    ):
        _same(a, b, tolerance, real)
    _same(made.hidden, final, tolerance, real)
    if ours.head is not None:
        _same(made.logits, reference.logits, tolerance, real if ours.spec.head.pool == "none" else None)


@pytest.mark.parametrize("name", ["wav2vec2-pretraining", "hubert-large"])
def test_hidden_frames_get_the_vector_that_theirs_get(name, tmp_path):
    theirs = _saved(name, tmp_path)
    ours = import_hf(tmp_path)
    inner = getattr(theirs, theirs.base_model_prefix, theirs)
    hidden = torch.rand(3, ours.embedding.spec.frames(420), generator=torch.Generator().manual_seed(2)) < 0.4
    with torch.no_grad():
        expected = inner(WAVE, mask_time_indices=hidden).last_hidden_state
        _same(ours({"input_values": WAVE, "mask_time_indices": hidden}).hidden, expected, 1e-5)
        assert not torch.allclose(ours({"input_values": WAVE}).hidden, expected, atol=1e-2)


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_both_stacks_and_the_logits_of_whisper_are_equal(name, tmp_path, dtype, tolerance, padded):
    theirs = _saved(name, tmp_path)
    theirs = in_double(theirs) if dtype == torch.float64 else theirs
    ours = import_hf(tmp_path, dtype=dtype)
    batch = {"input_features": MELS.to(dtype), "decoder_input_ids": TARGET}
    real = torch.ones_like(TARGET_MASK)
    if padded:
        batch["decoder_attention_mask"], real = TARGET_MASK.long(), TARGET_MASK
    below = []
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
        ours._run(
            ours.embedding, ours.stack, batch, None, {"around": (lambda i, layer, x, ctx, call: below.append(call(x, ctx)) or below[-1],)}
        )
    for a, b in zip([*below[:-1], made.memory], reference.encoder_hidden_states[1:], strict=True):
        _same(a, b, tolerance)
    for a, b in zip([*made.hiddens[:-1], made.hidden], reference.decoder_hidden_states[1:], strict=True):
        _same(a, b, tolerance, real)
    if ours.head is not None:
        _same(made.logits, reference.logits, tolerance, real)


@pytest.mark.parametrize("name", ["whisper", "whisper-relu"])
def test_greedy_generation_is_equal_token_for_token(name, tmp_path):
    theirs = in_double(_saved(name, tmp_path))
    ours = import_hf(tmp_path, dtype=torch.float64)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(MELS.double(), max_new_tokens=14, do_sample=False, num_beams=1)
    ids = fed = torch.full((3, 1), theirs.config.decoder_start_token_id)
    cache, memory = Cache(), None
    with torch.no_grad():
        for _ in range(14):
            out = ours({"input_features": MELS, "decoder_input_ids": fed}, cache=cache, memory=memory)
            memory, fed = out.memory, out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, fed], dim=1)
    assert torch.equal(ids[:, -expected.shape[1] :], expected) and expected.shape[1] >= 14


@pytest.mark.parametrize("through_ours", [False, True])
@pytest.mark.parametrize("name", sorted(CASES))
def test_there_and_back_is_the_identity(name, tmp_path, through_ours):
    theirs = _saved(name, tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16000}))
    model = import_hf(tmp_path / "theirs")
    if through_ours:
        model = load(save(model, tmp_path / "ours"))
    back = export_hf(model, tmp_path / "back", shard_bytes=20_000 if through_ours else 10**9)
    assert json.loads((back / "preprocessor_config.json").read_text()) == {"sampling_rate": 16000}
    assert config_of(back) == config_of(tmp_path / "theirs")
    if not through_ours:
        before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
        assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    loaded, info = type(theirs).from_pretrained(back, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        a, b = (m.eval()(**_inputs(name))[0] for m in (loaded, theirs))
    assert torch.equal(a, b)


def test_old_names_of_normalized_filters_are_read_and_half_precision_is_kept(tmp_path):
    from safetensors.torch import save_file

    _saved("wav2vec2", tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    old = {
        n.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): t.half()
        for n, t in tensors.items()
    }
    assert sum(n.endswith(("weight_g", "weight_v")) for n in old) == 2
    save_file(old, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    back = export_hf(import_hf(tmp_path / "theirs"), tmp_path / "back")
    after = tensors_of(back)
    assert after.keys() == tensors.keys() and all(torch.equal(after[n], t.half()) for n, t in tensors.items())


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-large", "hubert-classes", "whisper"])
def test_a_shorter_stack_goes_out_as_what_it_is(name, tmp_path):
    theirs = _saved(name, tmp_path / "theirs")
    model = import_hf(tmp_path / "theirs")
    shorter = model.with_stack(keep(model.stack, [0, 2]))
    loaded, info = type(theirs).from_pretrained(export_hf(shorter, tmp_path / "back"), output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        _same(shorter(_inputs(name)).logits, loaded.eval()(**_inputs(name)).logits, 1e-5)
        if name != "whisper":  # a path that leaves the layer out computes the same
            _same(model(_inputs(name), path=[0, 2]).logits, shorter(_inputs(name)).logits, 1e-6)


def test_recording_sees_every_layer(tmp_path):
    _saved("wav2vec2", tmp_path)
    model = import_hf(tmp_path)
    record = lw.record(model, {"input_values": WAVE}, hidden="all")
    with torch.no_grad():
        for i, x in enumerate(model({"input_values": WAVE}, hiddens=True).hiddens):
            assert torch.equal(record.hidden[i], x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_adapter": True}, "add_adapter is True"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm is 'batch'"),
        ({"num_hidden_layers": 2}, r"unexpected wav2vec2\.encoder\.layers\.2"),
        ({"conv_stride": [5, 2]}, "channels, kernels and strides"),
        ({"num_conv_pos_embedding_groups": 5}, "position_groups"),
        ({"architectures": ["Wav2Vec2ForXVector"]}, "Wav2Vec2ForXVector has a head"),
    ],
)
def test_configs_that_cannot_be_read_are_named(change, message, tmp_path):
    _saved("wav2vec2", tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(BadInput, match=message):
        import_hf(tmp_path)


def test_inputs_that_give_no_frame_are_refused(tmp_path):
    _saved("wav2vec2", tmp_path)
    model = import_hf(tmp_path)
    least = model.embedding.spec.least
    assert model.embedding.spec.frames(least) == 1 and model.embedding.spec.frames(least - 1) == 0
    with pytest.raises(BadInput, match=f"at least {least} samples"):
        model({"input_values": WAVE[:, : least - 1]})


def test_log_mel_is_that_of_whispers_feature_extractor():
    made = T.WhisperFeatureExtractor(feature_size=80, chunk_length=1)
    wave = torch.randn(2, 16000, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.3], [0.01]])
    wave[1, 4000:] = 0.0
    expected = made([np.asarray(w) for w in wave], sampling_rate=16000, return_tensors="pt").input_features
    torch.testing.assert_close(log_mel(wave), expected, rtol=0, atol=1e-4)


def test_fresh_models_start_with_whispers_positions_and_filters_of_their_own_length():
    from layerwise.embed.audio_spec import MelSpec, WaveSpec
    from layerwise.embed.mel import MelEmbedding
    from layerwise.embed.wave import WaveEmbedding

    mel = MelEmbedding(MelSpec(mels=8, max_length=20), 32)
    mel.initialize(0.02, torch.Generator().manual_seed(0))
    from transformers.models.whisper.modeling_whisper import sinusoids

    torch.testing.assert_close(mel.positions, sinusoids(20, 32), rtol=0, atol=1e-6)
    wave = WaveEmbedding(WaveSpec(channels=(8, 8), kernels=(4, 2), strides=(2, 2), position_kernel=4, position_groups=4), 16)
    wave.initialize(0.02, torch.Generator().manual_seed(0))
    assert torch.allclose(wave.positions.gain, wave.positions.direction.norm(dim=(0, 1), keepdim=True))
    assert wave({"input_values": WAVE}).isfinite().all()
