"""Self-speculative decoding beside its authors' code: the same drafts hold in the same rounds."""

import pytest
import torch
from waves import decoder, golden, tokens

from layerwise.evaluate.batches import inference
from layerwise.infer.speculative import SelfSpeculation


@pytest.mark.parametrize("case", golden("self_speculation")["cases"], ids=lambda case: f"exit {case['exit_layer']}")
def test_layerskip_drafts_and_accepts_in_the_same_rounds(case):
    model, prompt = decoder(5).double(), tokens()[1:2, :7]
    text, rounds = SelfSpeculation(model, prompt, exit_layer=case["exit_layer"], draft=case["draft"]), []
    with inference(model):
        while (left := 7 + 24 - text.ids.shape[1]) > 0:
            accepted, drafted = text.accepted, text.drafted
            text.round(left)
            rounds.append([text.accepted - accepted, text.drafted - drafted])
    assert rounds == case["rounds"]
    assert text.ids[:, 7:].equal(torch.tensor([case["tokens"]]))
