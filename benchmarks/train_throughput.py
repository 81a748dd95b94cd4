"""Tokens a second of our training step beside transformers' Trainer and beside a bare loop, alternating in one run.

    python benchmarks/train_throughput.py [--rounds 5] [--steps 6] [--json FILE]
    python benchmarks/train_throughput.py --device cuda --sizes 100m,1b     # bf16, torch.compile, tokens/s and MFU

Contestants take turns, so that a busy machine slows all of them alike; the ratios are of medians over the rounds. Peak memory
is measured in a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from layerwise.analyze.cost import ATTENTION
from layerwise.data.masking import mask_tokens
from layerwise.data.order import Order
from layerwise.errors import BadInput
from layerwise.jobs.check import check_device
from layerwise.jobs.meter import metered
from layerwise.models.model import Model, build
from layerwise.models.presets import preset
from layerwise.models.spec import model_spec
from layerwise.objectives import OBJECTIVES
from layerwise.optim.spec import OptimizerSpec, ScheduleSpec
from layerwise.table import lookup
from layerwise.train.loop import Listener, train
from layerwise.train.spec import TrainSpec

LENGTH, ROWS = 128, 2048
TINY = {"preset": "decoder", "batch": 1, "vocab": 64, "depth": 2, "width": 16, "heads": 2}
"""A step that is hardly anything but the loop."""
TASKS = {
    # BERT-mini with BERT's Chinese vocabulary: most of the work is the vocabulary.
    "masked-lm": {"preset": "bert", "batch": 32, "vocab": 21128, "depth": 4, "width": 256, "heads": 4},
    "causal-lm": {"preset": "decoder", "batch": 16, "vocab": 8192, "depth": 6, "width": 256, "heads": 4},
}
SIZES = {"100m": {"depth": 12, "width": 768, "heads": 12}, "1b": {"depth": 24, "width": 1792, "heads": 14}}
EXPECTED = {"masked-lm": 3.0, "causal-lm": 1.1}


class Rows:
    """Random token ids as a training split."""

    tokens_per_row = LENGTH

    def __init__(self, vocab: int) -> None:
        self.ids = torch.randint(10, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def batch(self, index: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index]}


def data_of(task: dict) -> SimpleNamespace:
    rows = Rows(task["vocab"])
    return SimpleNamespace(train=rows, validation=rows, vocab=task["vocab"], pad_id=0, eos_id=1, mask_id=3, cls_id=4, sep_id=5)


def our_model(task: dict, device: str = "cpu") -> Model:
    described = preset(task["preset"])
    described["stack"] |= {"depth": task["depth"], "width": task["width"]}
    described["stack"]["layer"] |= {"heads": task["heads"], "dropout": 0.0}
    described["embedding"] = {**described.get("embedding", {}), "vocab": task["vocab"]}
    return build(model_spec(described), device=device)


def spec_of(name: str, task: dict, steps: int, **more: object) -> TrainSpec:
    constant = ScheduleSpec("constant", warmup=0)
    optimizer = OptimizerSpec("adamw", lr=1e-4, weight_decay=0.01)
    return TrainSpec(name, steps=steps, batch=task["batch"], optimizer=optimizer, schedule=constant, divergence=None, **more)


class _Steps(Listener):
    """When steps ended: our loop's own clock leaves out logging, this one does not."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def progress(self, step: int, total: int, values: dict[str, float]) -> None:
        self.at.append(time.perf_counter())


def ours_whole(name: str, task: dict) -> Callable[[int], float]:
    """Our loop between the end of its first and the end of its last step, everything in between included."""
    model, data = our_model(task), data_of(task)

    def run(steps: int) -> float:
        listener = _Steps()
        train(model, data, spec_of(name, task, steps + 1), listener=listener)
        return (listener.at[-1] - listener.at[0]) / steps

    return run


def bare(name: str, task: dict) -> Callable[[int], float]:
    """The loop anyone would write by hand over our model and objective."""
    model, data = our_model(task), data_of(task)
    objective = lookup(OBJECTIVES, name, "objective")(data)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == m] for m in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    order, generator = Order(ROWS, task["batch"], 0), torch.Generator().manual_seed(0)
    model.train()

    def run(steps: int) -> float:
        for step in range(steps + 1):
            if step == 1:
                began = time.perf_counter()
            loss = objective(model, data.train.batch(order.indices(step)), generator)
            loss.mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return (time.perf_counter() - began) / steps

    return run


def trainer(name: str, task: dict) -> Callable[[int], float]:
    """transformers' Trainer on the same shape, rows, masking function and optimizer."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    shape = {
        "vocab_size": task["vocab"],
        "hidden_size": task["width"],
        "num_hidden_layers": task["depth"],
        "num_attention_heads": task["heads"],
    }
    layer = our_model({**task, "depth": 1}).spec.stack.layers[0]
    if name == "masked-lm":
        config = BertConfig(**shape, intermediate_size=layer.ffn_width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = BertForMaskedLM(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=layer.ffn_width, max_position_embeddings=LENGTH))
    rows = data_of(task).train.ids

    class Dataset(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, i: int) -> dict:
            return {"input_ids": rows[i]}

    def collate(items: list[dict]) -> dict:
        ids = torch.stack([item["input_ids"] for item in items])
        if name == "causal-lm":
            return {"input_ids": ids, "labels": ids}
        hidden, labels = mask_tokens(ids, mask_id=3, vocab=task["vocab"], special_ids=torch.arange(6))
        return {"input_ids": hidden, "labels": labels}

    class Clock(TrainerCallback):
        at: list[float]

        def on_train_begin(self, *args: object, **kwargs: object) -> None:
            self.at = []

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            self.at.append(time.perf_counter())

    clock = Clock()

    def run(steps: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=steps + 1, per_device_train_batch_size=task["batch"], learning_rate=1e-4, weight_decay=0.01,
                lr_scheduler_type="constant", logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
                optim="adamw_torch_fused", max_grad_norm=1.0, log_level="error",
            )  # fmt: skip
            Trainer(model=model, args=arguments, train_dataset=Dataset(), data_collator=collate, callbacks=[clock]).train()
        return (clock.at[-1] - clock.at[0]) / steps

    return run


CONTESTANTS = {"layerwise": ours_whole, "bare loop": bare, "Trainer": trainer}


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a large square matrix product: what this machine can do."""
    a, b = torch.randn(size, size, device=device, dtype=dtype), torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_flops(name: str, task: dict) -> int:
    """Operations that one of our steps really does, forward and backward, counted by PyTorch."""
    model, data = our_model(task), data_of(task)
    objective = lookup(OBJECTIVES, name, "objective")(data)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        objective(model, data.train.batch(torch.arange(task["batch"])), torch.Generator().manual_seed(0)).mean.backward()
    return counter.get_total_flops()


def loop_overhead(rounds: int = 7, steps: int = 100) -> float:
    """Seconds that our loop adds to a step of the bare loop, whatever the model: the least over rounds of each, on a tiny one.

    The difference of two long steps would drown in their noise.
    """
    with_loop, without = ours_whole("causal-lm", TINY), bare("causal-lm", TINY)
    pairs = [(with_loop(steps), without(steps)) for _ in range(rounds)]
    return min(a for a, _ in pairs) - min(b for _, b in pairs)


def on_cpu(rounds: int, steps: int) -> dict:
    peak = matmul_rate(torch.device("cpu"), torch.float32, 1536)
    results: dict = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "matmul_gflops": peak / 1e9}
    overhead = loop_overhead()
    for name, task in TASKS.items():
        contestants = {label: make(name, task) for label, make in CONTESTANTS.items()}
        times: dict[str, list[float]] = {label: [] for label in contestants}
        for contestant in contestants.values():
            contestant(1)
        for i in range(rounds):
            for label, contestant in list(contestants.items())[:: 1 if i % 2 else -1]:
                times[label].append(contestant(steps))
            print(f"{name}: round {i + 1} of {rounds}", file=sys.stderr)
        tokens, flops = task["batch"] * LENGTH, step_flops(name, task)
        medians = {label: statistics.median(t) for label, t in times.items()}
        results[name] = {
            "tokens_per_second": {label: tokens / t for label, t in medians.items()},
            "over_trainer": medians["Trainer"] / medians["layerwise"],
            "loop_overhead_ms": 1e3 * overhead,
            "loop_overhead": overhead / medians["bare loop"],
            "share_of_matmul": flops / medians["layerwise"] / peak,
            "peak_bytes": {label: _peak(name, label) for label in contestants},
        }
    return results


def _peak(name: str, label: str) -> int:
    """Peak memory of a few steps of one contestant, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--peak", name, label], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def on_gpu(device: str, sizes: list[str], steps: int, peak_tflops: float | None) -> dict:
    """bf16 with every layer compiled: tokens/s, and model FLOP/s (6 N a token) as a share of the peak."""
    where = check_device(device)
    peak = peak_tflops * 1e12 if peak_tflops else matmul_rate(where, torch.bfloat16, 8192)
    results: dict = {"device": torch.cuda.get_device_name(where), "torch": torch.__version__, "peak_tflops": peak / 1e12}
    for size in sizes:
        task = {"preset": "decoder", "batch": 64 if size == "100m" else 16, "vocab": 32000, **SIZES[size]}
        model, data = our_model(task, device), data_of(task)
        with metered(where) as meter:
            train(model, data, spec_of("causal-lm", task, 5, precision="bf16", compile=True), device=device)
            _wait(where)
            listener = _Steps()
            train(model, data, spec_of("causal-lm", task, steps + 1, precision="bf16", log_every=steps), device=device, listener=listener)
            _wait(where)
        rate = task["batch"] * LENGTH * steps / (listener.at[-1] - listener.at[0])
        weights = sum(p.numel() for p in model.parameters()) - model.token_matrix.numel()
        results[size] = {"params": weights, "tokens_per_second": rate, "mfu": 6 * weights * rate / peak, "peak_bytes": meter.peak_bytes}
    return results


def show(results: dict) -> None:
    """The results as a table."""
    print({k: v for k, v in results.items() if not isinstance(v, dict)})
    for name, found in results.items():
        if not isinstance(found, dict):
            continue
        print(f"\n{name}")
        for key, value in found.items():
            if isinstance(value, dict):
                print(f"  {key:18}", "  ".join(f"{label} {v:,.0f}" for label, v in value.items()))
            else:
                print(f"  {key:18} {value:.3f}" if isinstance(value, float) else f"  {key:18} {value:,}")
        if name in EXPECTED:
            print(f"  expected           over_trainer >= {EXPECTED[name]}, loop_overhead <= 0.03")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="100m", help="of 100m, 1b; on a GPU")
    parser.add_argument("--peak-tflops", type=float, default=None, help="of the GPU in bf16; measured when not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("TASK", "CONTESTANT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        name, label = given.peak
        run = CONTESTANTS[label](name, TASKS[name])
        with metered(torch.device("cpu")) as meter:
            run(2)
        print(meter.peak_bytes)
        return
    try:
        unknown = [s for s in given.sizes.split(",") if s not in SIZES]
        if unknown:
            raise BadInput(f"--sizes takes {', '.join(SIZES)}; got {unknown[0]}")
        results = on_cpu(given.rounds, given.steps) if check_device(given.device).type == "cpu" else on_gpu(
            given.device, given.sizes.split(","), given.steps, given.peak_tflops
        )  # fmt: skip
    except BadInput as error:
        sys.exit(f"error: {error}")
    show(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
