"""Weights in another type."""

import torch

import layerwise as lw


def test_weights_change_their_type_and_packed_ones_keep_theirs(text):
    model = lw.load("decoder", embedding={"vocab": 262}, stack={"depth": 2, "width": 32}, head={"tie": True})
    half = lw.edit.cast(model, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(half.parameters(), model.parameters(), strict=True))
    packed = lw.edit.quantize(half, text, bits=[4, 16], samples=4)
    back = lw.edit.cast(packed, dtype="float32")
    scales = [b for name, b in back.named_buffers() if name.endswith("scales")]
    assert scales and all(b.dtype == torch.float16 for b in scales)
    ids = text.train.batch(torch.arange(2))
    torch.testing.assert_close(back(ids).logits, packed(ids).logits.float(), atol=0.05, rtol=0.05)


def test_what_is_frozen_stays_frozen():
    model = lw.edit.lora(lw.load("decoder", embedding={"vocab": 64}, stack={"depth": 1, "width": 32}), rank=2)
    made = lw.edit.cast(model, dtype="bfloat16")
    frozen = {n: p.requires_grad for n, p in made.named_parameters()}
    assert frozen == {n: p.requires_grad for n, p in model.named_parameters()} and not all(frozen.values())
