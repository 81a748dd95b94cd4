"""What holds for every family alike: it is measured, converted and inspected; and what still works on families we do not have."""

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from hf_reference import SMALL, random_model, tensors_of
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import layerwise as lw
from layerwise.errors import BadInput
from layerwise.jobs.inspection import convert_checkpoint, inspect_model
from layerwise.models.hf import FAMILIES, import_hf

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from hf_parity import CASES  # noqa: E402

MEASURED = json.loads((ROOT / "receipts" / "parity.json").read_text())["families"]
TEXT = {case.family: case for case in reversed(CASES) if case.reads in ("text", "pair") and not case.family.startswith("clip")}
FOREIGN = {
    "falcon": (T.FalconForCausalLM, T.FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)),
    "phi": (T.PhiForCausalLM, T.PhiConfig(**SMALL)),
    "mpnet": (T.MPNetForMaskedLM, T.MPNetConfig(**SMALL)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_measured_and_within_bounds(family):
    assert MEASURED[family], "add a line to CASES in benchmarks/hf_parity.py and run it with --families"
    for case in MEASURED[family]:
        assert case["round_trip"] is True and case["generation"] in (True, None)
        assert all(gap is None or gap <= bound for dtype, bound in (("float32", 1e-5), ("float64", 1e-10)) for gap in case[dtype].values())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Text files and a tokenizer of 60 words."""
    folder = tmp_path_factory.mktemp("words")
    names = ["<unk>", *(f"w{i}" for i in range(59))]
    (folder / "texts").mkdir()
    for n in range(12):
        (folder / "texts" / f"{n}.txt").write_text(" ".join(names[1 + i * (n + 2) % 59] for i in range(200)))
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("family", TEXT)
def test_convert_and_inspect_work_on_every_family_of_text(family, tmp_path, words):
    theirs = random_model(TEXT[family].make, TEXT[family].config)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text((words / "tokenizer.json").read_text())
    own = convert_checkpoint(tmp_path / "theirs", tmp_path / "own", to="layerwise")
    back = convert_checkpoint(own, tmp_path / "back")
    before, after = tensors_of(tmp_path / "theirs"), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    found, page = inspect_model(str(own), page=tmp_path / "page.html", text=f"path:{words / 'texts'}", samples=4, length=16)
    layers = [row for row in found.tables[0].rows if isinstance(row[0], int)]
    model = import_hf(tmp_path / "theirs")
    assert page.is_file() and len(layers) == model.stack.depth
    firsts = model.spec.stack.shared or range(model.stack.depth)  # weights that layers share count once
    assert all((row[1] > 0) == (firsts[row[0]] == row[0]) and row[2] > 0 and 0 <= row[3] <= 1 for row in layers)


@pytest.mark.parametrize("family", TEXT)
def test_a_strange_tensor_is_named_and_the_type_of_weights_is_kept(family, tmp_path):
    case = TEXT[family]
    case.make(case.config).to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert list((tmp_path / "theirs").glob("model-0*.safetensors"))
    model = import_hf(tmp_path / "theirs")
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    save_file({"strange.weight": torch.ones(2)}, tmp_path / "theirs" / "more.safetensors")
    index["weight_map"]["strange.weight"] = "more.safetensors"
    (tmp_path / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"unexpected (\w+\.)*strange\.weight"):
        import_hf(tmp_path / "theirs")


@pytest.fixture(params=FOREIGN)
def foreign(request):
    return request.param, random_model(*FOREIGN[request.param])


def test_a_family_that_we_do_not_have_is_told_which_we_do(foreign, tmp_path):
    name, model = foreign
    model.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=rf"'{name}' checkpoints are not known here.*Families: albert.*marian.*xlm-roberta"):
        import_hf(tmp_path)


def test_what_builds_on_depth_works_on_a_family_that_we_do_not_have(foreign):
    _, model = foreign
    view = lw.view(model)
    assert view.depth == 3
    depth = lw.depth_of(model)
    assert set(depth) == {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert {depth[n] for n in depth if n.startswith(view.names[1] + ".")} == {1}
    assert min(depth.values()) == -1 and depth[next(iter(depth))] == -1
    ids = torch.arange(3, 15)[None]
    record = lw.record(model, {"input_ids": ids}, hidden="all")
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        assert torch.equal(record.hidden[0], states[1])
        whole, path = view.run({"input_ids": ids}), view.run({"input_ids": ids}, path=[0, 1, 2])
    assert torch.equal(whole.logits, path.logits)
    for parameter, d in ((p, depth[n]) for n, p in model.named_parameters()):
        parameter.requires_grad_(d >= 2)
    model(ids).logits.sum().backward()
    assert all((p.grad is not None) == (depth[n] >= 2) for n, p in model.named_parameters() if n.startswith(view.names))
