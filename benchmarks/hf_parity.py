"""How exactly every Hugging Face family is read and written: measured on small random models, against transformers.

    python benchmarks/hf_parity.py [--families bert,t5]     # writes receipts/parity.json; 'make docs' makes docs/models.md of it

A new family is one line of `CASES`: its `model_type`, a transformers class, a small config, what the model reads
(`text`, `pair`: a text and a target, `image`, `both`: CLIP, `sound`: a waveform, `speech`: log-mel frames and a target), and what the config covers, in words. A family may have several lines.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as T
from torch import Tensor, nn

from layerwise.files import write_json
from layerwise.infer.generate import generate
from layerwise.models.checkpoint import load, save
from layerwise.models.hf import export_hf, import_hf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

from hf_reference import SMALL, config_of, in_double, random_model, tensors_of  # noqa: E402


class Case(NamedTuple):
    """One small model: family, class and config, what it reads, what it covers."""

    family: str
    make: Any
    config: Any
    reads: str
    covers: str


LONG = {**SMALL, "max_position_embeddings": 40}
GROUPED = {**LONG, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "bos_token_id": 1, "eos_token_id": 2}
DISTIL = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 40}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0}
BART = {"vocab_size": 60, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "pad_token_id": 1}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 40}
BART |= {"forced_eos_token_id": None, "decoder_start_token_id": 2, "eos_token_id": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
DEIT = {**VIT, "intermediate_size": 48}
CONV = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 4}
CLIP_TEXT = {**SMALL, "max_position_embeddings": 12, "eos_token_id": 59, "bos_token_id": 57, "pad_token_id": 58}
CLIP_IMAGE = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
CLIP_IMAGE |= {"patch_size": 4}
SOUND = {"vocab_size": 14, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SOUND |= {"conv_dim": [12, 16, 20], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8}
SOUND |= {"num_conv_pos_embedding_groups": 4}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
WHISPER = {"vocab_size": 60, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4}
WHISPER |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_source_positions": 20}
WHISPER |= {"max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 48}
QWEN = {"use_sliding_window": True, "sliding_window": 4, "layer_types": WINDOWS}

CASES = (
    Case("llama", T.LlamaForCausalLM, T.LlamaConfig(**GROUPED, attention_bias=True), "text", "grouped queries, biases"),
    Case("llama", T.LlamaForCausalLM, T.LlamaConfig(**LONG, rope_parameters=ROPE), "text", "llama3 rotary scaling"),
    Case("mistral", T.MistralForCausalLM, T.MistralConfig(**GROUPED, sliding_window=4), "text", "grouped queries, sliding window"),
    Case("ministral", T.MinistralForCausalLM, T.MinistralConfig(**GROUPED, head_dim=8, layer_types=WINDOWS, sliding_window=4), "text", "windows on some layers"),
    Case("qwen2", T.Qwen2ForCausalLM, T.Qwen2Config(**GROUPED, **QWEN), "text", "grouped queries, query-key-value bias, windows on some layers"),
    Case("qwen3", T.Qwen3ForCausalLM, T.Qwen3Config(**GROUPED, head_dim=16), "text", "grouped queries, query-key norm, own head size"),
    Case("gemma", T.GemmaForCausalLM, T.GemmaConfig(**GROUPED, head_dim=16), "text", "1 + weight norms, scaled embedding, tied head"),
    Case("gpt2", T.GPT2LMHeadModel, T.GPT2Config(**GPT2), "text", "fused turned matrices, learned positions"),
    Case("gpt_neox", T.GPTNeoXForCausalLM, T.GPTNeoXConfig(**{**LONG, "hidden_size": 64}), "text", "parallel residual, partial rotary (Pythia)"),
    Case("opt", T.OPTForCausalLM, T.OPTConfig(**{**LONG, "ffn_dim": 48}), "text", "positions from two, pre-norm"),
    Case("opt", T.OPTForCausalLM, T.OPTConfig(**{**LONG, "ffn_dim": 48}, do_layer_norm_before=False), "text", "post-norm"),
    Case("bert", T.BertForMaskedLM, T.BertConfig(**LONG), "text", "post-norm, tied head with transform; MiniLM checkpoints are of this family"),
    Case("roberta", T.RobertaForMaskedLM, T.RobertaConfig(**LONG, type_vocab_size=1), "text", "positions from two"),
    Case("xlm-roberta", T.XLMRobertaForMaskedLM, T.XLMRobertaConfig(**LONG, type_vocab_size=1), "text", "positions from two"),
    Case("distilbert", T.DistilBertForMaskedLM, T.DistilBertConfig(**DISTIL), "text", "no token types"),
    Case("electra", T.ElectraForMaskedLM, T.ElectraConfig(**LONG, embedding_size=16), "text", "projected embedding"),
    Case("albert", T.AlbertForMaskedLM, T.AlbertConfig(**LONG, embedding_size=16), "text", "one set of weights for all layers, factorized embedding"),
    Case("albert", T.AlbertForMaskedLM, T.AlbertConfig(**LONG, embedding_size=16, num_hidden_groups=2), "text", "two groups of layers"),
    Case("t5", T.T5ForConditionalGeneration, T.T5Config(**T5), "pair", "relative positions, not gated, tied and scaled head"),
    Case("t5", T.T5ForConditionalGeneration, T.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False), "pair", "Flan-T5 and T5 1.1: gated, head not scaled"),
    Case("mt5", T.MT5ForConditionalGeneration, T.MT5Config(**T5), "pair", "gated"),
    Case("bart", T.BartForConditionalGeneration, T.BartConfig(**BART), "pair", "learned positions, bias of the logits"),
    Case("marian", T.MarianMTModel, T.MarianConfig(**BART, activation_function="swish", scale_embedding=True), "pair", "sinusoidal positions, scaled embedding, bias of the logits"),
    Case("vit", T.ViTForImageClassification, T.ViTConfig(**DEIT, num_labels=5), "image", "class token, classifier"),
    Case("deit", T.DeiTForImageClassificationWithTeacher, T.DeiTConfig(**DEIT, num_labels=3), "image", "distillation token"),
    Case("dinov2", T.Dinov2ForImageClassification, T.Dinov2Config(**VIT, use_swiglu_ffn=True), "image", "layer scale, swiglu"),
    Case("dinov2_with_registers", T.Dinov2WithRegistersForImageClassification, T.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3), "image", "registers, layer scale"),
    Case("beit", T.BeitForImageClassification, T.BeitConfig(**DEIT, use_relative_position_bias=True), "image", "position bias on the grid, layer scale"),
    Case("resnet", T.ResNetForImageClassification, T.ResNetConfig(**CONV), "image", "bottlenecks, batch norm"),
    Case("bit", T.BitForImageClassification, T.BitConfig(**CONV | {"hidden_sizes": [32, 64]}, num_groups=4), "image", "standardized filters, group norm"),
    Case("clip_text_model", T.CLIPTextModel, T.CLIPTextConfig(**CLIP_TEXT), "text", "causal text tower"),
    Case("clip_vision_model", T.CLIPVisionModel, T.CLIPVisionConfig(**CLIP_IMAGE), "image", "image tower"),
    Case("clip", T.CLIPModel, T.CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_IMAGE, projection_dim=20), "both", "both towers and their similarity"),
    Case("wav2vec2", T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**SOUND), "sound", "convolutional frames, post-norm"),
    Case("wav2vec2", T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**SOUND, **STABLE), "sound", "pre-norm (large)"),
    Case("hubert", T.HubertForCTC, T.HubertConfig(**SOUND), "sound", "convolutional frames, post-norm"),
    Case("whisper", T.WhisperForConditionalGeneration, T.WhisperConfig(**WHISPER), "speech", "log-mel frames, encoder and decoder"),
)  # fmt: skip
"""Every family of `layerwise.models.hf.FAMILIES`."""


def batch_for(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model of the case reads: random, the same every time."""
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    if case.reads in ("text", "pair", "both"):
        found["input_ids"] = torch.randint(3, 57, (3, 12), generator=draw)
        if case.family.startswith("clip"):
            found["input_ids"][:, -1] = 59  # the token whose vector stands for the text
    if case.reads in ("pair", "speech"):
        found["decoder_input_ids"] = torch.randint(3, 57, (3, 9), generator=draw)
    if case.reads in ("image", "both"):
        size = getattr(case.config, "image_size", 16)
        found["pixel_values"] = torch.randn(3, 3, size, size, generator=draw).to(dtype)
    if case.reads == "sound":
        found["input_values"] = torch.randn(3, 420, generator=draw).to(dtype)
    if case.reads == "speech":
        found["input_features"] = torch.randn(3, 8, 40, generator=draw).to(dtype)
    return found


def measure(case: Case) -> dict[str, Any]:
    """Largest differences of hidden states and logits in both precisions, and whether the round trip and generation are exact."""
    made: dict[str, Any] = {"class": case.make.__name__, "covers": case.covers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(case.make, case.config)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.running_mean, std=0.3)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
        model.save_pretrained(folder / "theirs")
        for dtype in (torch.float32, torch.float64):
            theirs = case.make.from_pretrained(folder / "theirs", dtype=dtype).eval()
            if dtype == torch.float64:
                _double(theirs)
            ours = import_hf(folder / "theirs", dtype=dtype)
            hidden, logits = _differences(ours, theirs, batch_for(case, dtype))
            made[str(dtype).removeprefix("torch.")] = {"hidden": hidden, "logits": logits}
        made["round_trip"] = _round_trip(folder)
        made["generation"] = _generates(ours, theirs, case)
    return made


def _double(model: nn.Module) -> None:
    try:
        in_double(model)
    except (ValueError, AttributeError):  # a network without attention
        model.double()


def _differences(ours: Any, theirs: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float | None]:
    """The largest of all layers and of the logits, each as a share of the largest value where that is above 1."""
    below: list[Tensor] = []
    with torch.no_grad():
        reference = theirs(**batch, output_hidden_states=True)
        made = ours(batch, hiddens=True)
        if "decoder_input_ids" in batch:
            keep = lambda i, layer, x, ctx, call: below.append(call(x, ctx)) or below[-1]  # noqa: E731
            ours._run(ours.embedding, ours.stack, batch, None, {"around": (keep,)})
        logits = made.logits if getattr(ours, "head", None) is not None or hasattr(reference, "logits_per_image") else None
    hidden = max(_gap(a, b) for a, b in _hidden_pairs(made, reference, below))
    theirs_logits = getattr(reference, "logits", getattr(reference, "logits_per_image", None))
    return hidden, None if logits is None or theirs_logits is None else _gap(logits, theirs_logits)


def _hidden_pairs(made: Any, reference: Any, below: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    if hasattr(reference, "text_model_output"):
        for ours, theirs in ((made.text, reference.text_model_output), (made.image, reference.vision_model_output)):
            yield from zip(ours.hiddens, theirs.hidden_states[1:], strict=True)
            yield ours.hidden, theirs.last_hidden_state
        return
    if below:
        yield from zip(below[:-1], reference.encoder_hidden_states[1:-1], strict=True)
        yield made.memory, reference.encoder_last_hidden_state
    states = reference.decoder_hidden_states if below else reference.hidden_states
    if len(states) - 1 == len(made.hiddens):
        yield from zip(made.hiddens[:-1], states[1:-1], strict=True)
    last = [x for x in (made.hidden, made.hiddens[-1]) if x.shape == states[-1].shape]
    # The last of theirs is before or after the final norm, as the family has it.
    yield min(((x, states[-1]) for x in last), key=lambda pair: _gap(*pair))


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() / max(1.0, b.abs().max().item())


def _round_trip(folder: Path) -> bool:
    """Whether every tensor and the config come back as they were, through our own format and out."""
    back = export_hf(load(save(import_hf(folder / "theirs"), folder / "ours")), folder / "back")
    before, after = tensors_of(folder / "theirs"), tensors_of(back)
    same = before.keys() == after.keys() and all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    return same and config_of(back) == config_of(folder / "theirs")


def _generates(ours: Any, theirs: Any, case: Case) -> bool | None:
    """Whether ten greedy tokens after left-padded prompts (masked sources) are equal; None where nothing is generated, or not from text."""
    if case.reads not in ("text", "pair") or not ours.causal or getattr(ours, "head", None) is None or not theirs.can_generate():
        return None
    ids = batch_for(case, torch.float64)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if case.reads == "pair":
        mask = mask.flip(1)
    theirs.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "num_beams": 1, "pad_token_id": 1}
    return torch.equal(generate(ours, ids, new=10, attention_mask=mask), theirs.generate(ids, attention_mask=mask, **settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="", help="only these, comma-separated; the others stay as they were measured")
    chosen = [name for name in parser.parse_args().families.split(",") if name]
    torch.set_num_threads(1)
    path = ROOT / "receipts" / "parity.json"
    families = json.loads(path.read_text())["families"] if chosen and path.is_file() else {}
    for name in dict.fromkeys(case.family for case in CASES if not chosen or case.family in chosen):
        families[name] = [measure(case) for case in CASES if case.family == name]
        print(name, *families[name], sep="\n  ")
    order = list(dict.fromkeys(case.family for case in CASES))
    found = {
        "transformers": T.__version__,
        "torch": torch.__version__.split("+")[0],
        "families": {n: families[n] for n in order if n in families},
    }
    write_json(path, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
