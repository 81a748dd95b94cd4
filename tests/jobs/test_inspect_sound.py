"""Looking at models of sound and converting them, without any file of sound; and real recordings through one."""

import io
import wave

import numpy as np
import pytest
import torch
import transformers as T

from layerwise.data.tones import tones
from layerwise.errors import BadInput
from layerwise.jobs.inspection import convert_checkpoint, inspect_model
from layerwise.models.hf import export_hf, import_hf

SOUND = {"vocab_size": 14, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SOUND |= {"conv_dim": [12] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
WHISPER = {"vocab_size": 60, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_source_positions": 20}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "begin_suppress_tokens": None}


def _models():
    torch.manual_seed(0)
    return {
        "wav2vec2": T.Wav2Vec2ForCTC(T.Wav2Vec2Config(**SOUND)),
        "hubert": T.HubertForSequenceClassification(T.HubertConfig(**SOUND, classifier_proj_size=8, do_stable_layer_norm=True)),
        "whisper": T.WhisperForConditionalGeneration(T.WhisperConfig(**WHISPER)),
    }


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "whisper"])
def test_inspect_and_convert(name, tmp_path):
    _models()[name].save_pretrained(tmp_path / "m")
    found, page = inspect_model(str(tmp_path / "m"), page=tmp_path / "page.html", samples=3)
    table = found.tables[0]
    assert page.is_file() and table.columns[2] == "FLOPs per frame" and len(table.rows) == 5
    # A frame costs four square matrices and a feed-forward of 48, and its attention over 49 (or 20) frames.
    frames = 20 if name == "whisper" else 49
    assert all(row[2] == 2 * (4 * 32 * 32 + 2 * 32 * 48) + 4 * frames * 32 for row in table.rows[1:4])
    assert table.rows[0][2] > 0  # the convolutions are the embedding's, not the head's
    assert all(0 < row[3] < 1 and row[4] > 0 for row in table.rows[1:4])
    with pytest.raises(BadInput, match="reads sound"):
        inspect_model(str(tmp_path / "m"), page=tmp_path / "page.html", text="builtin:docs")
    own = convert_checkpoint(tmp_path / "m", tmp_path / "own", to="layerwise")
    back = convert_checkpoint(own, tmp_path / "back", to="hf")
    assert (back / "model.safetensors").read_bytes()
    before, after = (import_hf(tmp_path / f).state_dict() for f in ("m", "back"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_tones_are_of_unit_variance_and_of_their_seed():
    made = tones(3, 4000)
    assert torch.allclose(made.std(dim=1), torch.ones(3), atol=1e-4) and torch.equal(made, tones(3, 4000))
    assert not torch.allclose(made, tones(3, 4000, seed=1))


def test_spoken_digits_run_alike_both_ways(data_dir, tmp_path):
    file = data_dir / "spoken-digits" / "test.parquet"
    if not file.is_file():
        pytest.skip("no spoken digits among the public data sets")
    import pyarrow.parquet as pq

    spoken = []
    for row in pq.read_table(file).slice(0, 6).to_pylist():
        with wave.open(io.BytesIO(row["audio"]["bytes"])) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32)
        spoken.append((samples - samples.mean()) / samples.std())
    batch = T.Wav2Vec2FeatureExtractor(return_attention_mask=True)(spoken, sampling_rate=16000, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).unique().numel() > 1
    theirs = _models()["wav2vec2"].eval()
    theirs.save_pretrained(tmp_path / "m")
    ours = import_hf(tmp_path / "m")
    again = T.Wav2Vec2ForCTC.from_pretrained(export_hf(ours, tmp_path / "back")).eval()
    with torch.no_grad():
        expected, made, back = theirs(**batch).logits, ours(batch), again(**batch).logits
    real = made.mask
    assert torch.equal(back, expected)
    torch.testing.assert_close(made.logits[real], expected[real], rtol=0, atol=1e-5)
    assert torch.equal(made.logits[real].argmax(-1), expected[real].argmax(-1))
