"""Rotating the residual stream of an RMSNorm model: other weights, the same function, and no channel that sticks out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.edit.linears import preview_merge
from layerwise.embed.spec import TokenSpec
from layerwise.errors import BadInput
from layerwise.models.model import Model, rebuilt
from layerwise.models.spec import ModelSpec
from layerwise.nn.norms import ZeroRMSNorm, fill_norm
from layerwise.stack.spec import StackSpec

Rotation = Literal["hadamard", "random", "identity"]


def rotate(model: Model, *, kind: Rotation = "hadamard", heads: bool = True, seed: int | None = None) -> Model:
    """The model with its residual stream turned by an orthogonal matrix Q: same outputs up to rounding, nothing shared but what is outside.

    Every norm's gain moves into the matrices that read the norm, then readers become W Q, writers Q^T W and the embedding E Q; a tied
    head becomes one of its own, as it has the last norm's gain in it.

    Args:
        kind: `hadamard`, one with random signs; `random`, any orthogonal matrix; `identity`, which moves gains into matrices and turns nothing.
        heads: also turn what each head passes from values to the output matrix, by a Hadamard matrix of the head's size.
        seed: of signs and matrices.

    Source: Ashkboos et al. 2024, "QuaRot" (arXiv 2404.00456), section 4, without the rotations that need work at run time (of keys and
    queries, and of what the feed-forward's second matrix reads), and without centering the embedding, which RMSNorm does not allow.
    """
    width = model.spec.stack.width  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(seed or 0)
    q = _turn(kind, width, generator)
    if kind == "hadamard":
        q = q * _signs(width, generator)[:, None]
    sizes = dict.fromkeys(layer.spec.head_dim for layer in model.stack.layers) if heads else ()
    return rotated(model, q, {size: _turn(kind, size, generator) for size in sizes})


@torch.no_grad()
def rotated(model: Model, q: Float[Tensor, "width width"], per_head: Mapping[int, Float[Tensor, "head head"]] | None = None) -> Model:
    """The model with its stream multiplied by `q` from the right, and values of heads by what `per_head` has for their size."""
    new = rebuilt(model, preview_rotate(model.spec))
    gains = {name: _gain(model.get_submodule(name)) for name in _norm_names(model)}
    q = q.double().to(model.device)
    made: dict[str, Tensor] = {}
    for i, layer in enumerate(model.stack.layers):
        for side in ("mixer", "ffn"):
            prefix = f"stack.layers.{i}.{side}"
            branch, gain = getattr(layer, side).branch, gains[f"{prefix}.norm"]
            for role in branch.reads:
                if getattr(branch, role, None) is not None:
                    made[f"{prefix}.branch.{role}.weight"] = getattr(branch, role).weight.double() * gain @ q
            for role in branch.writes:
                linear = getattr(branch, role)
                made[f"{prefix}.branch.{role}.weight"] = q.t() @ linear.weight.double()
                if linear.bias is not None:
                    made[f"{prefix}.branch.{role}.bias"] = linear.bias.double() @ q
        if layer.router is not None:
            made[f"stack.layers.{i}.router.weight"] = layer.router.weight.double() @ q
        if per_head:
            turn = per_head[layer.mixer.branch.size].double().to(model.device)
            _turn_heads(made, f"stack.layers.{i}.mixer.branch", layer.mixer.branch, turn)
    for table in ("tokens", "positions", "types"):
        module = getattr(model.embedding, table, None)
        if module is not None:
            made[f"embedding.{table}.weight"] = module.weight.double() @ q
    head: Any = model.head
    made["head.weight"] = head.matrix(model.token_matrix).double() * gains.get("stack.norm", 1.0) @ q
    dtype = model.token_matrix.dtype
    for name, tensor in made.items():
        owner, _, leaf = name.rpartition(".")
        setattr(new.get_submodule(owner), leaf, nn.Parameter(tensor.to(dtype)))
    for name in gains:
        norm: Any = new.get_submodule(name)
        norm.weight = nn.Parameter(norm.weight.detach().clone())
        fill_norm(norm, 1.0)
    return new


def preview_rotate(spec: ModelSpec, **_: Any) -> ModelSpec:
    """What `rotate` makes of a model's description: a tied head is untied.

    Raises:
        BadInput: the stream cannot be turned without changing the function.
    """
    stack, embedding, head = spec.stack, spec.embedding, spec.head
    if not isinstance(stack, StackSpec) or spec.decoder is not None or not isinstance(embedding, TokenSpec) or stack.shared:
        raise BadInput("rotate needs one stack of transformer layers with weights of their own, that reads tokens")
    if embedding.norm or embedding.size is not None or embedding.position == "sinusoidal" or embedding.table != "learned":
        raise BadInput("rotate turns learned embeddings: without a norm, a projection, sinusoids or a frozen table")
    if head is None or head.kind != "lm" or head.transform is not None:
        raise BadInput("rotate folds the last norm into an lm head without a transform; this model has another head, or none")
    for i, layer in enumerate(stack.layers):
        other = [s.kind for s in layer.linears.values() if s.kind != "dense"]
        if other:
            raise BadInput(f"rotate turns dense matrices; layer {i} has {other[0]} linears: merge them first (edit: merge)")
        if not layer.norm.startswith("rmsnorm") or layer.placement not in ("pre", "lns"):
            raise BadInput(f"rotate needs RMSNorm before each branch; layer {i} has norm {layer.norm}, placement {layer.placement}")
        if layer.cross or layer.mixer != "attention" or layer.layer_scale is not None or layer.mixer_norm or layer.residual_gain:
            raise BadInput(f"rotate: layer {i} has gains, norms or attention on the stream that do not turn with it")
        if layer.head_scale == "after":
            raise BadInput(f"rotate: layer {i} scales channels after its output matrix (head_scale after)")
    return dataclasses.replace(preview_merge(spec), head=dataclasses.replace(head, tie=False))


def _turn(kind: Rotation, n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    if kind == "identity":
        return torch.eye(n, dtype=torch.float64)
    return orthogonal(n, generator) if kind == "random" else hadamard(n)


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """An orthogonal matrix whose entries are all +-1/sqrt(n), float64: Sylvester's doubling of one of Paley's.

    Raises:
        BadInput: no such matrix of that size is known here.
    """
    small, doublings = n, 0
    while small > 1:
        base = _paley(small)
        if base is not None:
            break
        if small % 2:
            raise BadInput(f"no Hadamard matrix of size {n} is known here: use rotate: random")
        small, doublings = small // 2, doublings + 1
    made = torch.ones(1, 1, dtype=torch.float64) if small == 1 else base
    assert made is not None
    for _ in range(doublings):
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    return made / n**0.5


def orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """A random orthogonal matrix, float64, every rotation and reflection equally likely (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return q * torch.diagonal(r).sign()


def _paley(n: int) -> Float[Tensor, "n n"] | None:
    """Paley's first matrix of size q + 1, q a prime = 3 mod 4, or second of size 2 (q + 1), q a prime = 1 mod 4; entries +-1."""
    if n % 4 == 0 and _prime(n - 1):
        p = n - 1
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1.0, -1.0
        skew[1:, 1:] = _residues(p)
        return skew + torch.eye(n, dtype=torch.float64)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _prime(n // 2 - 1):
        p = n // 2 - 1
        conference = torch.ones(p + 1, p + 1, dtype=torch.float64)
        conference[0, 0], conference[1:, 1:] = 0.0, _residues(p)
        a = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        b = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, a) + torch.kron(torch.eye(p + 1, dtype=torch.float64), b)
    return None


def _residues(p: int) -> Float[Tensor, "p p"]:
    """(i, j): 1 where i - j is a square modulo p, -1 where it is not, 0 on the diagonal."""
    sign = torch.full((p,), -1.0, dtype=torch.float64)
    sign[(torch.arange(1, p) ** 2) % p] = 1.0
    sign[0] = 0.0
    at = torch.arange(p)
    return sign[(at[:, None] - at[None, :]) % p]


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _signs(n: int, generator: torch.Generator) -> Float[Tensor, " n"]:
    return torch.randint(2, (n,), generator=generator, dtype=torch.float64) * 2 - 1


def _norm_names(model: Model) -> list[str]:
    names = [f"stack.layers.{i}.{side}.norm" for i in range(model.stack.depth) for side in ("mixer", "ffn")]
    return [*names, *(["stack.norm"] if model.stack.norm is not None else [])]


def _gain(norm: Any) -> Float[Tensor, " width"]:
    return norm.weight.double() + (1.0 if isinstance(norm, ZeroRMSNorm) else 0.0)


def _turn_heads(made: dict[str, Tensor], prefix: str, attention: Any, turn: Float[Tensor, "head head"]) -> None:
    """v: every head's rows by the transpose; o: every head's columns by the matrix itself."""
    size = attention.size
    v, o = made[f"{prefix}.v.weight"], made[f"{prefix}.o.weight"]
    made[f"{prefix}.v.weight"] = torch.einsum("hdw,de->hew", v.unflatten(0, (-1, size)), turn).flatten(0, 1)
    made[f"{prefix}.o.weight"] = (o.unflatten(1, (-1, size)) @ turn).flatten(1)
    if attention.v.bias is not None:
        made[f"{prefix}.v.bias"] = (attention.v.bias.double().unflatten(0, (-1, size)) @ turn).flatten()
