"""Recordings as data: decoded exactly, padded, normalized as transformers does it, cut, with the labels of a named column."""

import io
import wave

import numpy as np
import pytest
import torch

from layerwise.data.load import load_data
from layerwise.data.sound import input_values, padded_waves, recordings
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput


def _wav(samples, size=2, channels=1, rate=8000):
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(size)
        file.setframerate(rate)
        values = np.asarray(samples, dtype=np.int64)
        raw = (
            (values + 128).astype(np.uint8).tobytes()
            if size == 1
            else b"".join(int(v).to_bytes(size, "little", signed=True) for v in values.ravel())
        )
        file.writeframes(raw)
    return {"bytes": out.getvalue(), "path": None}


def test_whole_numbers_of_any_size_become_sixteen_bits():
    given = np.array([0, 1, -1, 100, -128, 127])
    for size in (1, 2, 3, 4):
        (found,), rate = recordings([_wav(given << 8 * (size - 1), size)], "set")
        assert found.dtype == np.int16 and found.tolist() == (given << 8).tolist() and rate == 8000, size
    (mono,), _ = recordings([_wav([[100, 300], [-50, 50]], channels=2)], "set")
    assert mono.tolist() == [200, 0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"bytes": b"RIFFxxxx", "path": None}], "recording 0 cannot be read"),
        ([_wav([])], "no sample"),
        ([_wav([1]), _wav([1], rate=16000)], "2 sampling rates"),
        ([], "without any recording"),
    ],
)
def test_what_cannot_be_read_is_named(values, said):
    with pytest.raises(BadInput, match=said):
        recordings(values, "set")


def test_recordings_are_cut_and_padded_and_normalized_over_what_is_real():
    import transformers

    rng = np.random.default_rng(0)
    waves = [(3000 * rng.standard_normal(n) + 500).astype(np.int16) for n in (900, 400)]
    made, lengths = padded_waves(waves, 0.1, 8000, "set")
    assert made.shape == (2, 800) and lengths.tolist() == [800, 400] and not made[1, 400:].any()
    mask = (torch.arange(800) < torch.from_numpy(lengths)[:, None]).long()
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000, do_normalize=True, return_attention_mask=True)
    theirs = extractor(
        [w[:n].astype(np.float32) / 32768 for w, n in zip(waves, lengths, strict=True)],
        sampling_rate=8000,
        padding=True,
        return_tensors="pt",
    )
    torch.testing.assert_close(input_values(torch.from_numpy(made), mask), theirs["input_values"], atol=1e-4, rtol=1e-4)
    assert torch.equal(mask, theirs["attention_mask"].long())


def test_built_in_voices_are_sound_with_labels():
    data = load_data(DataSpec(source="builtin:tones", seconds=0.25))
    batch = data.train.batch(torch.arange(4))
    assert data.kind == "sound" and data.rate == 8000 and data.classes == 3
    assert batch["input_values"].shape == batch["attention_mask"].shape == (4, 2000)
    assert batch["input_values"].mean(1).abs().max() < 1e-4
    for options, said in (({"augment": {"flip": True}}, "augment"), ({"source": "builtin:digits", "seconds": 1.0}, "cuts recordings")):
        with pytest.raises(BadInput, match=said):
            load_data(DataSpec(**{"source": "builtin:tones", **options}))


def test_a_table_of_recordings_has_the_labels_of_the_column_that_is_named(tmp_path):
    import datasets

    rows = {
        "audio": [_wav(np.arange(50 + i)) for i in range(12)],
        "label": [i % 2 for i in range(12)],
        "speaker": ["ann", "bob", "cy"] * 4,
        "text": ["one"] * 12,
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    by = {name: load_data(DataSpec(source=f"path:{tmp_path}", columns={"label": name}, validation=0.3)) for name in ("label", "speaker")}
    assert by["label"].classes == 2 and by["speaker"].classes == 3
    assert np.array_equal(by["label"].train.arrays["waves"], by["speaker"].train.arrays["waves"])
    text = load_data(
        DataSpec(source=f"path:{tmp_path}", columns={"text": "text"}, validation=0.3, length=4, tokenizer=TokenizerSpec("bytes"))
    )
    assert text.kind == "text"
