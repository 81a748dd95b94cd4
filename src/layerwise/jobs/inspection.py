"""What the command line does besides running jobs: look at a model, continue a text, convert a checkpoint, describe the machine."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from layerwise.analyze.findings import Findings, Table
from layerwise.analyze.overview import inspect
from layerwise.data.load import Data, load_data
from layerwise.data.resize import resized
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.data.tokenizer import read_tokenizer
from layerwise.data.tones import sounds_for
from layerwise.embed.audio_spec import MelSpec, WaveSpec
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.infer.generate import generate
from layerwise.jobs.cache import cache_folder
from layerwise.jobs.check import check_device
from layerwise.jobs.fill import filled
from layerwise.jobs.receipt import Receipt
from layerwise.models.load import export, load_any
from layerwise.models.model import Model, build, rebuilt
from layerwise.models.presets import PRESETS, preset
from layerwise.models.spec import model_spec
from layerwise.models.two_towers import TwoTowers
from layerwise.report.page import write_inspect_page

SOME_SIZE = (64, 64)
"""Of the images that a network which reads any size is looked at with."""


def inspect_model(
    source: str,
    *,
    page: Path,
    text: str | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    samples: int = 64,
    length: int = 128,
) -> tuple[Findings, Path]:
    """The table of a model's layers on some data, and the page about it. Of two towers each is looked at, the text's first.

    Args:
        source: a folder or a preset's name. text: what runs through it, `samples` rows of `length` tokens, or images, which are
            made to fit the model (None: built-in text or digits, which an image tower always gets; synthesized tones
            for sound, of whose encoder-decoders the encoder is looked at).
        page: the HTML file to write.
    """
    check_device(device)
    fresh = source in PRESETS and not Path(source).is_dir()
    # A model that is not there is told before any text is read.
    model = None if fresh else load_any(source, device)
    if model is None:
        kind = preset(source).get("embedding", {}).get("kind", "tokens")
        data = texts_for(source, None, text, data_dir, length) if kind == "tokens" else _images(None, text, data_dir, samples)
        model = build(filled(model_spec(preset(source)), data), device=device)
        found = inspect(model, data, samples=samples)
    elif isinstance(model, TwoTowers):
        found = _joined(
            inspect(model.text, texts_for(source, model.text, text, data_dir, length), samples=samples),
            inspect(model.image, _images(model.image, None, data_dir, samples), samples=samples),
        )
    elif isinstance(model.spec.embedding, WaveSpec | MelSpec):
        if text is not None:
            raise BadInput("the model reads sound, which is synthesized to look at it: leave --data out")
        found = inspect(_encoder(model), sounds_for(model.spec.embedding, samples), samples=samples)
    elif isinstance(model.spec.embedding, TokenSpec):
        found = inspect(model, texts_for(source, model, text, data_dir, length), samples=samples)
    else:
        found = inspect(model, _images(model, text, data_dir, samples), samples=samples)
    return found, write_inspect_page(found.data(), page, title=Path(source).name, subtitle=f"{samples} rows")


def texts_for(source: str, model: Model | None, text: str | None, data_dir: Path | None, length: int) -> Data:
    """Rows of tokens that the model can read."""
    embedding: Any = model.spec.embedding if model is not None else None
    if embedding is not None and embedding.position == "learned":
        length = min(length, embedding.max_length)
    file = tokenizer_of(source)
    tokenizer = TokenizerSpec(kind="file", path=str(file)) if file else TokenizerSpec()
    data = load_data(DataSpec(source=text or "builtin:docs", length=length, tokenizer=tokenizer), data_dir, cache_folder())
    if data.kind != "text":
        raise BadInput(f"the model reads text but {text} is {data.kind}")
    if embedding is not None and data.vocab is not None and embedding.vocab is not None and data.vocab > embedding.vocab:
        raise BadInput(
            f"the tokenizer has {data.vocab} tokens but the model {embedding.vocab}: put the model's tokenizer.json into its folder"
        )
    return data


def _images(model: Model | None, text: str | None, data_dir: Path | None, samples: int) -> Data:
    """Images that the model can read."""
    data = load_data(DataSpec(source=text or "builtin:digits"), data_dir, cache_folder())
    if data.kind != "images":
        raise BadInput(f"the model reads images but {text} is {data.kind}")
    if model is None:
        return data
    embedding: Any = model.spec.embedding
    assert data.size is not None
    head = model.spec.head
    classes = head.classes if head is not None else None
    return resized(data, channels=embedding.channels, size=embedding.size or SOME_SIZE, classes=classes, rows=max(samples, 64))


def _encoder(model: Model) -> Model:
    """The encoder of an encoder-decoder as a model of its own, every tensor shared; any other model itself."""
    if model.decoder is None:
        return model
    return rebuilt(model, dataclasses.replace(model.spec, decoder=None, target=None, head=None))


def _joined(text: Findings, image: Findings) -> Findings:
    """What was found in the text and the image tower, in one table and under names that tell them apart."""
    parts = {"text": text, "image": image}
    layers = [[f"{name} {row[0]}", *row[1:]] for name, found in parts.items() for row in found.tables[0].rows]
    whole = Findings(tables=[Table("Layers", text.tables[0].columns, layers)])
    for name, found in parts.items():
        whole.metrics |= {f"{name}.{metric}": value for metric, value in found.metrics.items()}
        whole.tables += [dataclasses.replace(table, title=f"{table.title} ({name})") for table in found.tables[1:]]
        whole.matrices += [dataclasses.replace(matrix, title=f"{matrix.title} ({name})") for matrix in found.matrices]
    return whole


def continue_text(source: str, prompt: str, *, device: str = "cpu", **options: Any) -> str:
    """The continuation of a prompt by the model in a folder that holds its tokenizer too."""
    check_device(device)
    file = tokenizer_of(source)
    if file is None:
        raise BadInput(f"{source} holds no tokenizer.json, so text cannot become tokens")
    tokenizer = read_tokenizer(str(file))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        raise BadInput("the prompt is empty")
    made = generate(load_any(source, device), torch.tensor([ids], device=device), **options)
    return tokenizer.decode(made[0].tolist())


def convert_checkpoint(source: Path, target: Path, *, to: str = "hf", dtype: str | None = None) -> Path:
    """A checkpoint in another format; the tokenizer goes along."""
    if to not in ("hf", "gptq", "layerwise"):
        raise BadInput(f"--to is hf, gptq or layerwise; got '{to}'")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise BadInput(f"--dtype is float32, bfloat16 or float16; got '{dtype}'")
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise BadInput(f"{target} exists already: choose a new folder")
    model = load_any(source, dtype=getattr(torch, dtype) if dtype else None)
    file = tokenizer_of(str(source))
    tokenizer = read_tokenizer(str(file)) if file else None
    return export(model, target, format=to, tokenizer=tokenizer)


def diagnosis() -> dict[str, str]:
    """What this machine has."""
    from layerwise import __version__

    cache = cache_folder()
    used = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file()) if cache and cache.is_dir() else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    extras = {"tensorboard": "trackers", "plotly": "report", "kornia": "augmentation", "peft": "tests"}
    return {
        "layerwise": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(["cpu", *gpus]),
        "bf16 on cpu": "native" if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AMX") else "emulated",
        "cache": f"{cache} ({used / 1e6:,.0f} MB)" if cache else "off",
        **{name: "present" if importlib.util.find_spec(name) else f"missing (used for {use})" for name, use in extras.items()},
    }


def receipt_rows(receipt: Receipt) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows that show a receipt in a terminal."""
    shown = ("val_loss", "accuracy")
    names = list(dict.fromkeys(m for arm in receipt.metrics.values() for m in arm if m.rsplit(".", 1)[-1] in shown))
    rows: list[list[Any]] = []
    for name, arm in receipt.variants.items():
        measured = receipt.metrics.get(name, {})
        means = [sum(v.values()) / len(v) if (v := measured.get(m)) else None for m in names]
        seeds = max((len(v) for v in measured.values()), default=0)
        rows.append([name, *means, seeds, round(arm.seconds, 1), arm.params])
    return ["variant", *names, "seeds", "seconds", "parameters"], rows


def tokenizer_of(source: str) -> Path | None:
    folder = Path(source)
    if not folder.is_dir():
        return None
    found = sorted([folder / "tokenizer.json", *folder.glob("models/*/seed-*/tokenizer.json")])
    return next((p for p in found if p.is_file()), None)
