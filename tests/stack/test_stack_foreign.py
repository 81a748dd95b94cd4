"""Networks of other libraries seen as stacks: single blocks, weight norm, layers called by keyword, nested stages."""

import pytest
import torch
from torch import nn

from layerwise.stack.depth import depth_of, view
from layerwise.stack.record import record

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
IDS = torch.arange(12).view(2, 6)


def _t5(layers, kind="T5Model"):
    import transformers as t

    config = t.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=layers, num_heads=2, vocab_size=40)
    return getattr(t, kind)(config)


def test_one_layer_is_a_layer():
    import transformers as t

    bert = t.BertModel(t.BertConfig(**SMALL, num_hidden_layers=1))
    assert view(bert).names == ("encoder.layer.0",)
    depths = depth_of(bert)
    assert {d for n, d in depths.items() if n.startswith("embeddings")} == {-1}
    assert {d for n, d in depths.items() if n.startswith("pooler")} == {1}
    assert view(_t5(1, "T5EncoderModel")).names == ("encoder.block.0",)
    albert = t.AlbertModel(t.AlbertConfig(**SMALL, embedding_size=8, num_hidden_layers=3))
    assert view(albert).names == ("encoder.albert_layer_groups.0",), "layers that are one are one"
    operations = nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert view(operations).names == ("0.0", "0.2"), "a wrapper around a chain is no block"


def test_weight_norm_is_no_layer():
    import transformers as t

    config = t.Wav2Vec2Config(
        hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2, conv_dim=[8, 8], conv_kernel=[3, 3],
        conv_stride=[2, 2], num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    network = t.Wav2Vec2Model(config).eval()
    assert view(network).names == ("encoder.layers.0", "encoder.layers.1")
    batch = {"input_values": torch.randn(1, 64)}
    seen = record(network, batch, hidden="all", inputs="all")
    theirs = network(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(seen.inputs[0], theirs[0]) and torch.equal(seen.hidden[0], theirs[1])


def test_stages_of_convnext_and_segformer_and_two_towers_are_opened():
    import transformers as t

    convnext = t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 2, 1, 1]))
    assert view(convnext).names == tuple(f"encoder.stages.{s}.layers.{i}" for s, n in enumerate((1, 2, 1, 1)) for i in range(n))
    vision = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    text = SMALL | {"num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
    clip = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision))
    towers = [f"text_model.encoder.layers.{i}" for i in range(2)] + ["vision_model.encoder.layers.0"]
    assert list(view(clip).names) == towers
    assert {d for n, d in depth_of(clip).items() if "vision_model.encoder.layers.0" in n} == {2}


@pytest.mark.parametrize("name", ["t5", "resnet", "swin", "distilbert", "opt"])
def test_records_hold_every_layers_tensors(name):
    """What goes into a layer is what the one below made, where nothing stands between them."""
    import transformers as t

    torch.manual_seed(0)
    network, batch = {
        "t5": lambda: (_t5(2), {"input_ids": IDS, "decoder_input_ids": IDS}),
        "resnet": lambda: (t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")), {"pixel_values": torch.rand(2, 3, 16, 16)}),
        "swin": lambda: (t.SwinModel(t.SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[2, 2], image_size=16, patch_size=2, window_size=2)), {"pixel_values": torch.rand(2, 3, 16, 16)}),
        "distilbert": lambda: (t.DistilBertModel(t.DistilBertConfig(dim=16, n_heads=2, hidden_dim=16, n_layers=3, vocab_size=40)), {"input_ids": IDS}),
        "opt": lambda: (t.OPTModel(t.OPTConfig(hidden_size=16, num_attention_heads=2, ffn_dim=24, vocab_size=40, num_hidden_layers=3, word_embed_proj_dim=16)), {"input_ids": IDS}),
    }[name]()  # fmt: skip
    network.eval()
    seen = record(network, batch, hidden="all", inputs="all")
    depth = view(network).depth
    assert list(seen.hidden) == list(seen.inputs) == list(range(depth))
    breaks = {"t5": {2}, "swin": {2}}.get(name, set())
    for i in range(1, depth):
        assert (i in breaks) != torch.equal(seen.inputs[i], seen.hidden[i - 1])
    stream = seen.stream()
    assert len(stream) == depth + 1 and stream[0] is seen.inputs[0]


class _Keyword(nn.Module):
    """Calls its layers by keyword, and hands a mask to them first."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Block() for _ in range(3)])

    def forward(self, x, mask=None):
        for block in self.blocks:
            x, _ = block(mask=mask, x=x)
        return x


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, mask):
        return x + self.inner(x), mask


def test_layers_called_by_keyword_are_recorded_too():
    network, x = _Keyword(), torch.randn(2, 4)
    seen = record(network, {"x": x}, hidden="all", inputs=[0, -1])
    assert torch.equal(seen.inputs[0], x) and torch.equal(seen.inputs[2], seen.hidden[1]) and torch.equal(seen.hidden[2], network(x))
    kept = record(network, {"x": x}, inputs=[1], gradients=True)
    kept.output.sum().backward()
    assert kept.inputs[1].requires_grad and network.blocks[0].inner.weight.grad is not None
