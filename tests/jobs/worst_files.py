"""Files made to take much memory, read in a process that may not: each is refused with a message. `worst_files.py FOLDER`."""

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec, TokenizerSpec
from layerwise.data.tokenizer import read_tokenizer
from layerwise.errors import BadInput
from layerwise.files import check_folder, sha256
from layerwise.jobs.check import check_fits, check_job
from layerwise.jobs.schema import read_job
from layerwise.models.checkpoint import load
from layerwise.models.hf import import_hf
from layerwise.models.load import described
from layerwise.models.room import check_model
from layerwise.safetensor import load_tensors, tensor_names

GROWTH = 1_500_000_000
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip


def limit() -> None:
    """Let this process take no more than it has and GROWTH."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GROWTH, now + GROWTH))


def refused(what: str, read: Callable[[], object]) -> None:
    try:
        read()
    except BadInput as error:
        print(f"refused: {what}: {str(error)[:160]}")
        return
    raise SystemExit(f"{what} was read")


def sparse(path: Path, start: bytes, size: int) -> Path:
    """A file that says it is large and takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def header(entries: dict, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def folder(place: Path, config: dict, tensors: bytes | None = None) -> Path:
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(save({"a": torch.ones(2)}) if tensors is None else tensors)
    return place


def main(place: Path) -> None:
    read_tokenizer_folder = place / "tokenizer"
    limit()
    # Headers of tensors that lie, and files of a terabyte that are almost nothing on the disk.
    large = {"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    for name, start, size in (
        ("a header of 2^60 bytes", header({}, 2**60), 100),
        ("a header of 90 MB that is not there", header({}, 90_000_000), 100),
        ("a header of 90 MB of nothing", header({}, 90_000_000), 90_000_100),
        ("tensors of a terabyte that are not there", header(large), 1000),
        ("tensors of a terabyte of nothing", header(large), len(header(large)) + 2**40),
    ):
        path = sparse(place / "tensors" / f"{name}.safetensors", start, size)
        refused(name, lambda path=path: load_tensors(path))
        if "of nothing" not in name or "header" in name:
            refused(f"names: {name}", lambda path=path: tensor_names(path))
    # Configs of models that nobody could hold.
    for key, value in (
        ("hidden_size", 2**40),
        ("vocab_size", 10**15),
        ("intermediate_size", 10**15),
        ("num_hidden_layers", 10**9),
        ("head_dim", 10**12),
    ):
        made = folder(place / f"config {key}", LLAMA | {key: value})
        refused(f"{key} {value:,}", lambda made=made: import_hf(made))
        refused(f"room: {key} {value:,}", lambda made=made: check_model(described(made)))
    # JSON and tokenizers of a terabyte, and JSON that is small on the disk and large in Python.
    for name, read in (
        ("config.json", import_hf),
        ("model.json", load),
        ("checksums.json", check_folder),
        ("model.safetensors.index.json", import_hf),
    ):
        made = folder(place / f"large {name}", LLAMA)
        if name == "model.json":
            (made / "config.json").unlink()
            (made / "checksums.json").write_text(json.dumps({"model.safetensors": sha256(made / "model.safetensors")}))
        sparse(made / name, b"{", 2**40)
        refused(f"{name} of a terabyte", lambda made=made, read=read: read(made))
    nested = folder(place / "lists", LLAMA)
    (nested / "config.json").write_text("[" + "[]," * 10_000_000 + "0]")
    refused("config.json of ten million lists", lambda: import_hf(nested))
    refused("a tokenizer of a terabyte", lambda: read_tokenizer(str(sparse(read_tokenizer_folder / "tokenizer.json", b"{", 2**40))))
    refused("a job of a terabyte", lambda: read_job(sparse(place / "jobs" / "job.yaml", b"name: x\n", 2**40)))
    for key, value in (("width", 10**9), ("width", 10**6), ("depth", 10**4)):
        job = {"name": "x", "data": {"source": "builtin:docs"}, "stages": {"fit": {"train": "causal-lm", "steps": 1}}}
        job["model"] = {"preset": "decoder", "stack": {"width": 16384, "depth": 4, key: value}}
        refused(f"a job of {key} {value:,}", lambda job=job: check_fits(check_job(read_job(job))))
    rows = place / "rows"
    rows.mkdir()
    (rows / "train.csv").write_text("text,label\n" + "".join(f"fox {i},{i % 2}\n" for i in range(1000)))
    spec = DataSpec(source=f"path:{rows}", length=10**9, tokenizer=TokenizerSpec("bytes"))
    refused("rows of a billion tokens", lambda: load_data(spec))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
