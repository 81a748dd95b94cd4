"""Prompts with targets: where the loss is, what is padding, which rows are there."""

import json

import numpy as np
import pytest
import torch

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.errors import BadInput
from layerwise.objectives.language import next_tokens

ROWS = [{"en": f"word {i}", "de": f"Wort {i} und mehr"} for i in range(40)]


def _data(folder, rows=ROWS, **options):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pairs = {"pairs": {"say": ("en", "de")}, "tokenizer": TokenizerSpec("bytes"), "length": 40} | options
    return load_data(DataSpec(source=f"path:{folder / 'rows.jsonl'}", **pairs))


def test_the_loss_is_on_the_target_and_its_end_alone(tmp_path):
    data = _data(tmp_path)
    batch = data.train.batch(torch.arange(4))
    for row in range(4):
        ids, wanted = batch["input_ids"][row], next_tokens({k: v[row : row + 1] for k, v in batch.items()})[0]
        kept = wanted != -100
        assert data.tokenizer.decode(wanted[kept][:-1].tolist()).startswith("Wort") and wanted[kept][-1] == data.eos_id
        prompt = ids[batch["prompt_mask"][row].bool()]
        assert data.tokenizer.decode(prompt[:-1].tolist()).startswith("word") and prompt[-1] == data.sep_id
        # The separator is the last of the prompt and predicts the target's first token.
        assert kept.nonzero()[0] == len(prompt) - 1
        assert batch["attention_mask"][row].sum() == len(prompt) + kept.sum()


def test_several_tasks_mark_their_prompts_and_a_prompt_is_on_one_side_of_the_split(tmp_path):
    data = _data(tmp_path, pairs={"translate": ("en", "de"), "copy": ("en", "en")}, validation=0.3, length=48)
    seen = []
    for split in (data.train, data.validation):
        batch = split.batch(torch.arange(len(split)))
        texts = [
            data.tokenizer.decode(ids[mask.bool()].tolist()) for ids, mask in zip(batch["input_ids"], batch["prompt_mask"], strict=True)
        ]
        assert all(t.startswith(("translate: ", "copy: ")[task]) for t, task in zip(texts, batch["tasks"].tolist(), strict=True))
        assert batch["tasks"].bincount().tolist() == [len(split) // 2] * 2
        seen.append({t.split(": ")[1] for t in texts})
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 40


def test_long_and_empty_pairs_are_left_out_and_what_cannot_be_is_refused(tmp_path):
    rows = [*ROWS, {"en": "x" * 50, "de": "y"}, {"en": "", "de": "y"}, {"en": "x", "de": None}]
    data = _data(tmp_path, rows)
    assert len(data.train) + len(data.validation) == 40
    with pytest.raises(BadInput, match="no prompt with its target fits into 4 tokens"):
        _data(tmp_path, length=4)
    with pytest.raises(BadInput, match=r"data\.pairs: .* has no column 'fr'; it has en, de"):
        _data(tmp_path, pairs={"say": ("en", "fr")})
    with pytest.raises(BadInput, match=r"leave data\.columns out"):
        DataSpec(pairs={"say": ("en", "de")}, columns={"text": "en"})
    with pytest.raises(BadInput, match=r"data\.pairs: builtin:code has no columns to name"):
        load_data(DataSpec(source="builtin:code", pairs={"say": ("en", "de")}))
    with pytest.raises(BadInput, match="data.boundaries keeps packed documents apart"):
        _data(tmp_path, boundaries=True)


def test_the_cache_gives_the_same_pairs_and_a_changed_target_is_other_data(tmp_path):
    spec = DataSpec(source=f"path:{tmp_path / 'rows.jsonl'}", pairs={"say": ("en", "de")}, tokenizer=TokenizerSpec("bytes"), length=40)
    made = [_data(tmp_path), *(load_data(spec, cache_dir=tmp_path / "cache") for _ in range(2))]
    for other in made[1:]:
        assert other.fingerprint == made[0].fingerprint
        for name, array in made[0].train.arrays.items():
            assert np.array_equal(array, other.train.arrays[name])
    changed = _data(tmp_path, [*ROWS[:-1], {**ROWS[-1], "de": "Anderes"}])
    assert changed.fingerprint != made[0].fingerprint


def test_functions_of_the_library_come_with_their_summaries():
    spec = DataSpec(source="builtin:summaries", pairs={"summarize": ("signature", "summary")}, tokenizer=TokenizerSpec("bytes"), length=120)
    data = load_data(spec)
    assert len(data.train) > 2000
    batch = data.train.batch(torch.arange(50))
    for ids, prompt in zip(batch["input_ids"], batch["prompt_mask"].bool(), strict=True):
        text = data.tokenizer.decode(ids[prompt].tolist())
        assert text.endswith(")") and "(" in text
    with pytest.raises(BadInput, match="in its columns signature and summary"):
        load_data(DataSpec(source="builtin:summaries"))
