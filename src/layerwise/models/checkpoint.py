"""Our own checkpoint: the model's description, its tensors in safetensors, its tokenizer, and checksums of all of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.files import check_folder, read_json, whole_folder, write_file, write_json
from layerwise.models.model import Model, make_model
from layerwise.models.origin import Origin, origin_of, with_origin
from layerwise.models.spec import ModelSpec, model_spec, spec_data
from layerwise.safetensor import load_tensors, save_tensors

FORMAT = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DESCRIPTION, TENSORS, CARRIED = "model.json", "model.safetensors", "carried.safetensors"


def save(model: Model, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write `model` to `folder`: the folder holds the whole checkpoint or, after a crash, what it held before.

    Tensors that are one (a layer that stands twice in the stack) are written once. What a model from elsewhere brought along
    (`Origin`) is kept.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, kept as tokenizer.json.

    Raises:
        BadInput: the folder holds something else than a layerwise checkpoint.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and ((folder / DESCRIPTION).is_file() or not any(folder.iterdir()))):
        raise BadInput(f"{folder} holds something that is not a layerwise checkpoint: choose another folder")
    tensors, shared = _distinct(model.state_dict())
    data: dict[str, Any] = {"format": FORMAT, "spec": spec_data(model.spec), "shared": shared}
    origin = origin_of(model)
    if origin is not None:
        data["origin"] = {"config": origin.config, "generation": origin.generation, "sidecars": origin.sidecars}
    with whole_folder(folder) as temporary:
        write_json(temporary / DESCRIPTION, data)
        save_tensors(temporary / TENSORS, tensors)
        if origin is not None and origin.carried:
            save_tensors(temporary / CARRIED, origin.carried)
        if tokenizer is not None:
            write_file(temporary / "tokenizer.json", tokenizer.to_str(pretty=True))
    return folder


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Model:
    """Read what `save` wrote, after checking its checksums.

    Args:
        dtype: of the floating-point weights (None: as stored).

    Raises:
        BadInput: there is no checkpoint, a file is damaged, or tensors do not fit the description.
    """
    folder = Path(folder)
    refuse_pickle(folder)
    if not (folder / DESCRIPTION).is_file():
        raise BadInput(f"{folder} holds no layerwise checkpoint (no model.json) and no Hugging Face one (no config.json)")
    check_folder(folder)
    spec, shared = description(folder / DESCRIPTION)
    model = assemble(spec, load_tensors(folder / TENSORS, str(device)), shared, dtype, folder)
    kept = read_json(folder / DESCRIPTION).get("origin")
    if kept is None:
        return model
    carried = load_tensors(folder / CARRIED) if (folder / CARRIED).is_file() else {}
    return with_origin(model, Origin(kept["config"], kept["generation"], carried, kept.get("sidecars", {})))


def assemble(spec: ModelSpec, tensors: dict[str, Tensor], shared: dict[str, str], dtype: torch.dtype | None, source: Path) -> Model:
    """A model of that description with those tensors themselves; `shared` says which names are another tensor's second name.

    `tensors` is used up, so that weights which fill the memory are there once.

    Raises:
        BadInput: a tensor is missing, is not expected, or has another shape; or the description lacks something.
    """
    tensors |= {name: tensors[first] for name, first in shared.items() if first in tensors}
    try:
        with torch.device("meta"):
            model = make_model(spec)
    except (AssertionError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadInput(f"{source}: no model of this description can be built: {str(error).splitlines()[0]}") from error
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        raise BadInput(f"{source} does not fit its description: missing {some(missing)}, unexpected {some(extra)}")
    wrong = [f"{n} is {tuple(tensors[n].shape)}, expected {tuple(t.shape)}" for n, t in expected.items() if tensors[n].shape != t.shape]
    if wrong:
        raise BadInput(f"{source} does not fit its description: {wrong[0]}")
    for name in list(tensors) if dtype is not None else ():
        # One after the other: the tensors never exist twice.
        tensors[name] = tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name]
    model.load_state_dict(tensors, assign=True)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, first in shared.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, held[first])
    return model.eval()


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous, and the further names of those that have several."""
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, shared


def description(path: Path) -> tuple[ModelSpec, dict[str, str]]:
    """The spec in a model.json, and which tensor names are another's second name.

    Raises:
        BadInput: it is not one, or of a format this version does not read.
    """
    try:
        data = read_json(path)
        if data["format"] != FORMAT:
            raise BadInput(f"{path} has format {data['format']}; this version of layerwise reads format {FORMAT}")
        shared = dict(data.get("shared", {}))
        if not all(isinstance(first, str) for first in shared.values()):
            raise ValueError("shared: names of tensors are expected")
        return model_spec(data["spec"]), shared
    except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise BadInput(f"{path} is not a model's description: {reason}") from error


def refuse_pickle(folder: Path) -> None:
    """Raise BadInput for a folder (or file) whose weights are in pickle files only; none is ever opened."""
    pickles = [p.name for p in (folder.iterdir() if folder.is_dir() else [folder]) if p.suffix in PICKLES]
    if pickles and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder} holds only pickle files ({pickles[0]}), which can run code when they are read. "
            f"Convert them once, where you trust them:\n  {conversion(folder)}"
        )
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}")


def conversion(source: Path) -> str:
    """The shell command that turns a pickle checkpoint into safetensors: transformers' where the folder is one of its, else PyTorch's.

    Both read the pickle as weights only.
    """
    folder = source if source.is_dir() else source.parent
    if (folder / "config.json").is_file() and any(folder.glob("pytorch_model*.bin")):
        try:
            named = read_json(folder / "config.json")["architectures"][0]
        except (BadInput, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            named = None
        kind = named if isinstance(named, str) and re.fullmatch(r"[A-Z][A-Za-z0-9]{0,80}", named) else "AutoModel"
        code = f"import sys, transformers as t; t.{kind}.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
        files = [folder, folder.with_name(f"{folder.absolute().name}-safetensors")]
    else:
        first = min(p for p in folder.iterdir() if p.suffix in PICKLES) if source.is_dir() else source
        code = (
            "import sys, torch; from safetensors.torch import save_file; "
            'found = torch.load(sys.argv[1], "cpu", weights_only=True); '
            "save_file({n: t.contiguous().clone() for n, t in found.items() if isinstance(t, torch.Tensor)}, sys.argv[2])"
        )
        files = [first, first.with_suffix(".safetensors")]
    return shlex.join(["python", "-c", code, *map(str, files)])


def some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
