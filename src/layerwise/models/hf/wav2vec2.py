"""wav2vec 2.0: waveforms through convolutions, then post-norm layers, or pre-norm ones in the large models.

HuBERT starts from what is here.
"""

from __future__ import annotations

from typing import Any

from layerwise.embed.audio_spec import WaveSpec
from layerwise.errors import BadInput
from layerwise.models.hf.family import Family, Rule, classes_of, names, only, read_activation, stack_of, write_activation
from layerwise.models.spec import HeadSpec, ModelSpec
from layerwise.stack.spec import LayerSpec, StackSpec

LAYERS = {
    **{f"mixer.branch.{role}": f"attention.{role}_proj" for role in "qkv"},
    "mixer.branch.o": "attention.out_proj",
    "mixer.norm": "layer_norm",
    "ffn.branch.up": "feed_forward.intermediate_dense",
    "ffn.branch.down": "feed_forward.output_dense",
    "ffn.norm": "final_layer_norm",
}
OLD_NAMES = (
    ("pos_conv_embed.conv.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
    ("pos_conv_embed.conv.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
)
MOST_CONVOLUTIONS = 64
"""So many names of convolutions the table has."""


def sound_rules(prefix: str) -> tuple[Rule, ...]:
    """The names of everything; a rule without a tensor of ours is not used."""
    position = f"{prefix}encoder.pos_conv_embed.conv."
    convolutions = {
        ours.format(i): theirs.format(i)
        for i in range(MOST_CONVOLUTIONS)
        for ours, theirs in (("{}.convolution", "{}.conv"), ("{}.norm", "{}.layer_norm"))
    }
    return (
        *names(convolutions, "embedding.convolutions.", f"{prefix}feature_extractor.conv_layers."),
        Rule(("embedding.project_norm",), f"{prefix}feature_projection.layer_norm"),
        Rule(("embedding.project",), f"{prefix}feature_projection.projection"),
        Rule(("embedding.mask_vector",), f"{prefix}masked_spec_embed"),
        Rule(("embedding.positions.gain",), f"{position}parametrizations.weight.original0"),
        Rule(("embedding.positions.direction",), f"{position}parametrizations.weight.original1"),
        Rule(("embedding.positions.bias",), f"{position}bias"),
        Rule(("embedding.norm",), f"{prefix}encoder.layer_norm"),
        Rule(("stack.norm",), f"{prefix}encoder.layer_norm"),
        *names(LAYERS, "stack.layers.*.", f"{prefix}encoder.layers.*."),
        Rule(("head.out",), "lm_head", when=scores_frames),
        Rule(("head.out",), "classifier", when=lambda spec: not scores_frames(spec)),
        Rule(("head.project",), "projector"),
    )


def scores_frames(spec: ModelSpec) -> bool:
    """Whether the head scores letters for every frame (CTC) and not the whole."""
    return spec.head is not None and spec.head.pool == "none"


def read_sound(config: dict[str, Any], head: bool, family: str, **embedding: Any) -> ModelSpec:
    """Their config to our description; `embedding` holds what the member of the family has otherwise."""
    only(config, "add_adapter", (False, None), False)
    only(config, "adapter_attn_dim", (None,), None)
    only(config, "conv_pos_batch_norm", (False, None), False)
    stable, eps = bool(config.get("do_stable_layer_norm", False)), config.get("layer_norm_eps", 1e-5)
    fields: dict[str, Any] = {
        "channels": tuple(config.get("conv_dim", WaveSpec.channels)),
        "kernels": tuple(config.get("conv_kernel", WaveSpec.kernels)),
        "strides": tuple(config.get("conv_stride", WaveSpec.strides)),
        "bias": bool(config.get("conv_bias", False)),
        "extractor_norm": only(config, "feat_extract_norm", ("group", "layer"), "group"),
        "activation": read_activation(config, "feat_extract_activation", "gelu"),
        "position_kernel": config.get("num_conv_pos_embeddings", 128),
        "position_groups": config.get("num_conv_pos_embedding_groups", 16),
        "mask_vector": config.get("mask_time_prob", 0.05) > 0 or config.get("mask_feature_prob", 0.0) > 0,
        "norm": None if stable else "layernorm",
        "norm_eps": eps,
        "feature_dropout": config.get("feat_proj_dropout", 0.0),
        "dropout": config.get("hidden_dropout", 0.1),
    }
    if len(fields["channels"]) > MOST_CONVOLUTIONS:
        raise BadInput(f"config.json: conv_dim has {len(fields['channels'])} convolutions; at most {MOST_CONVOLUTIONS} are read")
    layer = LayerSpec(
        heads=config.get("num_attention_heads", 12),
        qkv_bias=True,
        out_bias=True,
        ffn=read_activation(config, "hidden_act", "gelu"),
        ffn_width=config.get("intermediate_size", 3072),
        ffn_bias=True,
        norm="layernorm",
        norm_eps=eps,
        placement="pre" if stable else "post",
        dropout=config.get("hidden_dropout", 0.1),
        attention_dropout=config.get("attention_dropout", 0.1),
    )
    return ModelSpec(
        embedding=WaveSpec(**fields | embedding),
        stack=StackSpec(
            depth=config.get("num_hidden_layers", 12),
            width=config.get("hidden_size", 768),
            layer=layer,
            final_norm=stable,
            init_std=config.get("initializer_range", 0.02),
        ),
        head=_read_head(config, family) if head else None,
    )


def _read_head(config: dict[str, Any], family: str) -> HeadSpec:
    """Letters for every frame, or classes for the mean of the frames."""
    if (config.get("architectures") or [None])[0] != f"{family}ForSequenceClassification":
        return HeadSpec(
            "classifier", classes=config.get("vocab_size", 32), pool="none", bias=True, dropout=config.get("final_dropout", 0.1)
        )
    only(config, "use_weighted_layer_sum", (False, None), False)
    return HeadSpec("classifier", classes=classes_of(config), size=config.get("classifier_proj_size", 256), bias=True)


def write_sound(spec: ModelSpec, family: str) -> dict[str, Any]:
    """Our description to their config."""
    stack, sound, head = stack_of(spec), wave_of(spec), spec.head
    layer = stack.layers[0]
    written: dict[str, Any] = {
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": layer.heads,
        "intermediate_size": layer.ffn_width,
        "hidden_act": write_activation(layer.ffn),
        "hidden_dropout": layer.dropout,
        "attention_dropout": layer.attention_dropout,
        "layer_norm_eps": layer.norm_eps,
        "initializer_range": stack.init_std,
        "do_stable_layer_norm": layer.placement == "pre",
        "conv_dim": list(sound.channels),
        "conv_kernel": list(sound.kernels),
        "conv_stride": list(sound.strides),
        "conv_bias": sound.bias,
        "feat_extract_norm": sound.extractor_norm,
        "feat_extract_activation": write_activation(sound.activation),
        "feat_proj_dropout": sound.feature_dropout,
        "num_conv_pos_embeddings": sound.position_kernel,
        "num_conv_pos_embedding_groups": sound.position_groups,
        "mask_time_prob": 0.05 if sound.mask_vector else 0.0,
        "mask_feature_prob": 0.0,
        "add_adapter": False,
        "adapter_attn_dim": None,
        "use_weighted_layer_sum": False,
    }
    if head is None:
        return written
    if scores_frames(spec):
        return {**written, "vocab_size": head.classes, "architectures": [f"{family}ForCTC"], "final_dropout": head.dropout}
    return {
        **written,
        "num_labels": head.classes,
        "classifier_proj_size": head.size,
        "architectures": [f"{family}ForSequenceClassification"],
    }


def wave_of(spec: ModelSpec) -> WaveSpec:
    """The description's embedding, which is known to be of waveforms."""
    assert isinstance(spec.embedding, WaveSpec)
    return spec.embedding


FAMILY = Family(
    "wav2vec2",
    lambda config, head: read_sound(config, head, "Wav2Vec2"),
    lambda spec: write_sound(spec, "Wav2Vec2"),
    sound_rules("wav2vec2."),
    classifier=("Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification"),
    base=("Wav2Vec2Model", "Wav2Vec2ForPreTraining"),
    prefix="wav2vec2.",
    reads=WaveSpec,
    renamed=OLD_NAMES,
    carried=("quantizer.", "project_hid.", "project_q."),
)
