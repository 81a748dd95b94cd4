"""What is estimated without weights is what real steps are measured to cost."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from layerwise.analyze.cost import FORMULAS
from layerwise.analyze.ledger import SavedTensors, gradient_bytes, parameter_bytes, state_bytes
from layerwise.cli import app
from layerwise.errors import BadInput
from layerwise.jobs.catalogue import find
from layerwise.jobs.estimate import estimate_job
from layerwise.jobs.schema import read_job
from layerwise.models.model import build
from layerwise.objectives.language import CausalLM
from layerwise.optim.groups import make_optimizer
from layerwise.train.recompute import Recompute


def _job(**train):
    return read_job(
        {
            "name": "tiny",
            "data": {"length": 48, "tokenizer": {"kind": "bytes"}},
            "model": {"preset": "decoder", "stack": {"depth": 4, "width": 48, "layer": {"heads": 4, "kv_heads": 2}}},
            "stages": {"pretrain": {"train": "causal-lm", "steps": 10, "batch": 12, **train}},
        }
    )


@pytest.mark.parametrize("train", [{}, {"recompute": True}, {"recompute": ["::2"], "optimizer": {"name": "sgd"}}, {"precision": "bf16"}])
def test_memory_and_operations_are_those_of_a_real_step(train):
    job = _job(**train)
    (found,) = estimate_job(job)
    spec = job.plans()["default"].stages[0].spec
    model = build(job.plans()["default"].model.with_vocab(262)).train()
    optimizer = make_optimizer(model, spec.optimizer)
    around = {"around": (Recompute(spec.recompute, 4),)} if spec.recompute else {}
    batch = {"input_ids": torch.randint(0, 262, (12, 48), generator=torch.Generator().manual_seed(0))}
    with SavedTensors(model.parameters()) as saved:
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = CausalLM()(model, batch, **around)
        loss.mean.backward()
    assert found.parameters == parameter_bytes(model) and found.gradients == gradient_bytes(model)
    assert found.activations == pytest.approx(saved.peak, rel=0.02)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = CausalLM()(model, batch, **around)
        forward = counter.get_total_flops()
        loss.mean.backward()
    assert found.forward_flops * batch["input_ids"].numel() == forward
    assert found.step_flops * batch["input_ids"].numel() == counter.get_total_flops()
    optimizer.step()
    assert found.optimizer == state_bytes(optimizer)


def test_a_masked_objective_scores_its_share():
    shape = {"stack": {"depth": 2, "width": 48, "layer": {"heads": 4}}, "head": {"kind": "lm"}}
    few, most = (
        estimate_job(read_job(_job(train="masked-lm", options={"rate": rate}).model_dump() | {"model": {"preset": "encoder", **shape}}))[0]
        for rate in (0.25, 0.75)
    )
    head = 3 * 2 * 48 * 262 + 2 * 48 * 48  # of a scored position: the vocabulary's gradients are made in the forward pass; a dense layer
    assert most.forward_flops - few.forward_flops == 0.5 * head


def test_shards_and_replicas():
    one, ddp = estimate_job(_job())[0], estimate_job(_job(), gpus=4)[0]
    fsdp = estimate_job(_job(parallel="fsdp"), gpus=4)[0]
    assert ddp.parameters == one.parameters and ddp.rows == 3 and ddp.activations < one.activations
    assert fsdp.parameters == -(-one.parameters // 4) and fsdp.optimizer == -(-one.optimizer // 4)
    assert estimate_job(_job(), mfu=0.175)[0].step_seconds > one.step_seconds
    assert estimate_job(_job(recompute=True))[0].activations < one.activations


def test_said_at_the_command_line_and_refused_in_words():
    said = CliRunner().invoke(app, ["estimate", "mix-ln", "--scale", "full", "--gpus", "8", "--json"])
    assert said.exit_code == 0 and {e["fits"] for e in json.loads(said.stdout)} == {True}
    with pytest.raises(BadInput, match="h100"):
        estimate_job(_job(), gpu="h10")
    with pytest.raises(BadInput, match="multiple of accumulate x GPUs"):
        estimate_job(_job(), gpus=5)


def test_an_objective_that_depends_on_values_is_refused() -> None:
    with pytest.raises(BadInput, match="ghn cannot be estimated"):
        estimate_job(read_job(find("ghn3"), scale="smoke"))
