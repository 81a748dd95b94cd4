"""T5 and BART: both stacks, generation with a cache, and the way there and back."""

import pytest
import torch
import transformers as T
from hf_reference import change_config, goes_and_comes_back, in_double, random_model

from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, family_for, import_hf
from layerwise.models.model import build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.stack.surgery import keep

T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0, "eos_token_id": None}
BART = {"vocab_size": 60, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 40, "eos_token_id": None}
BART |= {"forced_eos_token_id": None, "decoder_start_token_id": 2}
CASES = {
    "t5": (T.T5ForConditionalGeneration, T.T5Config(**T5)),
    "t5-gated": (T.T5ForConditionalGeneration, T.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-silu-equal-depth": (T.T5ForConditionalGeneration, T.T5Config(**{**T5, "num_decoder_layers": None}, feed_forward_proj="gated-silu")),
    "t5-base": (T.T5Model, T.T5Config(**T5)),
    "bart": (T.BartForConditionalGeneration, T.BartConfig(**BART)),
    "bart-scaled-relu": (T.BartForConditionalGeneration, T.BartConfig(**BART, scale_embedding=True, activation_function="relu")),
    "bart-base": (T.BartModel, T.BartConfig(**BART)),
}
MARIAN = {**BART, "pad_token_id": 59, "decoder_start_token_id": 59}
CASES |= {
    "flan": (T.T5ForConditionalGeneration, T.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": (T.MT5ForConditionalGeneration, T.MT5Config(**T5)),
    "mt5-base": (T.MT5Model, T.MT5Config(**T5, feed_forward_proj="relu")),
    "marian": (T.MarianMTModel, T.MarianConfig(**MARIAN, activation_function="swish", scale_embedding=True)),
    "marian-gelu": (T.MarianMTModel, T.MarianConfig(**MARIAN)),
    "marian-base": (T.MarianModel, T.MarianConfig(**MARIAN, activation_function="swish")),
}
CAUSAL = [name for name in CASES if not name.endswith("base")]
IDS = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(3, 60, (3, 15), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(12) < torch.tensor([12, 7, 9])[:, None]
TARGET_MASK = torch.arange(15) < torch.tensor([15, 15, 6])[:, None]


def _saved(name, folder):
    model = random_model(*CASES[name])
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=sorted(CASES))
def theirs(request, tmp_path):
    return _saved(request.param, tmp_path / "theirs")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_both_stacks_and_the_logits_are_equal(theirs, tmp_path, dtype, tolerance, padded):
    ours = import_hf(tmp_path / "theirs", dtype=dtype)
    if dtype == torch.float64:
        in_double(theirs)
    batch = {"input_ids": IDS, "decoder_input_ids": TARGET}
    if padded:
        batch |= {"attention_mask": MASK.long(), "decoder_attention_mask": TARGET_MASK.long()}
    real, target_real = (MASK, TARGET_MASK) if padded else (torch.ones_like(MASK), torch.ones_like(TARGET_MASK))
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
        below: list = []
        ours._run(
            ours.embedding, ours.stack, batch, None, {"around": (lambda i, layer, x, ctx, call: below.append(call(x, ctx)) or below[-1],)}
        )
    pairs = [
        *((a, b, real) for a, b in zip(below[:-1], reference.encoder_hidden_states[1:-1], strict=True)),
        (made.memory, reference.encoder_last_hidden_state, real),
        *((a, b, target_real) for a, b in zip(made.hiddens[:-1], reference.decoder_hidden_states[1:-1], strict=True)),
        (made.hidden, reference.decoder_hidden_states[-1], target_real),
    ]
    if ours.head is not None:
        pairs.append((made.logits, reference.logits, target_real))
    for a, b, kept in pairs:
        torch.testing.assert_close(a[kept], b[kept], rtol=0, atol=tolerance * max(1, float(b[kept].abs().max())))


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_generation_is_equal_token_for_token(name, tmp_path):
    theirs = in_double(_saved(name, tmp_path))
    ours = import_hf(tmp_path, dtype=torch.float64)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(IDS, attention_mask=MASK.long(), max_new_tokens=14, do_sample=False, num_beams=1)
    assert torch.equal(generate(ours, IDS, attention_mask=MASK.long(), new=14), expected)
    with pytest.raises(BadInput, match="give start"):
        generate(build(ours.spec), IDS)


@pytest.mark.parametrize("through_ours", [False, True])
def test_there_and_back_is_the_identity(theirs, tmp_path, through_ours):
    loaded = goes_and_comes_back(tmp_path / "theirs", type(theirs), through_ours)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=IDS, decoder_input_ids=TARGET)[0] for m in (loaded, theirs))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_shorter_encoder_goes_out_as_what_it_is(name, tmp_path):
    _saved(name, tmp_path / "theirs")
    model = import_hf(tmp_path / "theirs")
    shorter = model.with_stack(keep(model.stack, [0, 2]))
    loaded, info = T.AutoModelForSeq2SeqLM.from_pretrained(export_hf(shorter, tmp_path / "back"), output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        made = shorter({"input_ids": IDS, "decoder_input_ids": TARGET}).logits
        torch.testing.assert_close(loaded(input_ids=IDS, decoder_input_ids=TARGET).logits, made, rtol=1e-4, atol=1e-4)


def test_an_untied_t5_reads_and_writes_its_own_head(tmp_path):
    theirs = _saved("t5-gated", tmp_path / "theirs")
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(60, 32))
    theirs.config.tie_word_embeddings = False
    theirs.save_pretrained(tmp_path / "untied")
    ours = import_hf(tmp_path / "untied")
    assert not ours.spec.head.tie and ours.spec.head.scale == 1.0
    batch = {"input_ids": IDS, "decoder_input_ids": TARGET}
    with torch.no_grad():
        torch.testing.assert_close(ours(batch).logits, theirs(**batch).logits, rtol=0, atol=1e-4)
        loaded = T.AutoModelForSeq2SeqLM.from_pretrained(export_hf(ours, tmp_path / "back")).eval()
        torch.testing.assert_close(loaded(**batch).logits, theirs(**batch).logits, rtol=0, atol=1e-4)


def test_the_two_token_tables_of_a_bart_stay_one(tmp_path):
    _saved("bart", tmp_path / "theirs")
    model = load(save(import_hf(tmp_path / "theirs"), tmp_path / "ours"))
    assert model.target.tokens.weight is model.embedding.tokens.weight
    with torch.no_grad():
        model.target.tokens = torch.nn.Embedding(60, 32)
    with pytest.raises(BadInput, match=r"embedding\.tokens\.weight and target\.tokens\.weight"):
        export_hf(model, tmp_path / "back")


def test_our_encoder_decoder_preset_is_a_t5_but_for_the_scale_of_its_attention(tmp_path):
    data = preset("encoder-decoder")
    for side in ("stack", "decoder"):
        data[side] |= {"depth": 2, "width": 32}
        data[side]["layer"] |= {"heads": 4}
    data["embedding"] = {"vocab": 60}
    with pytest.raises(BadInput, match=r"layer 0 has attention_scale 0\.35.*; t5 layers have 1\.0"):
        family_for(model_spec(data))
    for side in ("stack", "decoder"):
        data[side]["layer"]["attention_scale"] = 1.0
    model = build(model_spec(data)).eval()
    assert family_for(model.spec).name == "t5"
    loaded, info = T.AutoModelForSeq2SeqLM.from_pretrained(export_hf(model, tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        made = model({"input_ids": IDS, "decoder_input_ids": TARGET}).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS, decoder_input_ids=TARGET).logits, made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj is 'gated-relu'"),
        ({"architectures": ["T5EncoderModel"]}, "T5EncoderModel has a head"),
        ({"num_layers": 2}, r"unexpected encoder\.block\.2"),
    ],
)
def test_configs_that_cannot_be_read_are_named(change, message, tmp_path):
    _saved("t5", tmp_path)
    change_config(tmp_path, **change)
    with pytest.raises(BadInput, match=message):
        import_hf(tmp_path)
