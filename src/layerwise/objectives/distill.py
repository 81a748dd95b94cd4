"""Learning from a teacher: its hidden states, its distribution over classes or tokens, the matrices that factors were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from layerwise.errors import BadInput
from layerwise.models.model import Output
from layerwise.models.spec import ModelSpec
from layerwise.objectives.classification import Classification
from layerwise.objectives.distances import Distance, distances
from layerwise.objectives.divergence import divergence
from layerwise.objectives.language import CausalLM, MaskedLM
from layerwise.objectives.loss import Loss
from layerwise.objectives.nearness import Pair, factored, nearness
from layerwise.objectives.objective import Objective
from layerwise.objectives.overhear import Overheard
from layerwise.objectives.pairing import Pairs, layer_pairs
from layerwise.objectives.prediction_heads import PredictionHeads
from layerwise.objectives.teacher import Teacher

TASKS = {"causal-lm": CausalLM, "classification": Classification, "masked-lm": MaskedLM}
Task = Literal["causal-lm", "classification", "masked-lm"]
Couple = tuple[Tensor, Tensor]


class Distillation(Objective):
    """L = L_task + hidden * L_hidden + logits * L_logits + near * L_near; a term whose weight is 0 is not computed.

    Student and teacher each run once a batch, on the same (masked) inputs, the teacher without gradients and in evaluation mode.

    - L_hidden: the mean over pairs of layers, and over positions, of the distance between the student's vectors and the teacher's. A pair
      is a student layer and a teacher layer (`pairs`), compared through the filters that the models have (edit `add-filters`), or a teacher layer
      and what a head of the objective's own predicts of it from the student's last vectors (`predict`).
    - L_logits: see `layerwise.objectives.divergence`. L_near: see `layerwise.objectives.nearness`.

    Published methods are settings of these: TinyBERT's and PELA's feature distillation `pairs: all`; PELA `near` with it; DistilHuBERT
    `predict` with `distance: l1-cosine`; TED filters trained beforehand (objective `filters`) and `logits`; layer-wise distillation fresh
    filters on the student alone; knowledge distillation `logits` alone.

    Args:
        teacher: a checkpoint's folder; in a job also `stage:NAME`, the model as that stage left it.
        task: the student's own objective beside it (None: none). task_options: of that objective.
        hidden: weight of L_hidden. pairs: see `layerwise.objectives.pairing`.
        embedding: what enters the first layer is a pair too, beside those of `pairs`.
        predict: teacher layers, counted as everywhere from 0 for the lowest layer's output (a paper's layer l is l - 1 here).
        distance, cosine: see `layerwise.objectives.distances`. padding: positions that are padding count too, as in TED's code.
        logits: weight of L_logits. temperature: both distributions are softened by it.
        near: weight of L_near. radius, hinge: see `nearness`.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        teacher: str,
        task: Task | None = None,
        task_options: dict[str, Any] | None = None,
        hidden: float = 0.0,
        pairs: Pairs = None,
        embedding: bool = False,
        predict: Sequence[int] | None = None,
        distance: Distance = "mse",
        cosine: float = 1.0,
        padding: bool = False,
        logits: float = 0.0,
        temperature: float = 2.0,
        near: float = 0.0,
        radius: float = 1e-3,
        hinge: bool = False,
    ) -> None:
        super().__init__()
        if min(hidden, logits, near) < 0 or not (task or hidden or logits or near):
            raise BadInput(f"hidden, logits and near are weights >= 0, one of them or a task is needed; got {hidden}, {logits} and {near}")
        if temperature <= 0:
            raise BadInput(f"temperature is above 0; it is {temperature}")
        if predict is not None and (pairs is not None or embedding or not predict):
            raise BadInput(
                "predict names teacher layers that heads on the student's last layer predict: name some, and leave pairs and embedding out"
            )
        self.teacher = Teacher(teacher)
        self.task = TASKS[task](data, **(task_options or {})) if task is not None else None
        self.hidden, self.pairs, self.embedding, self.predict = hidden, pairs, embedding, predict
        self.distance, self.cosine = distance, cosine
        self.padding, self.logits, self.temperature = padding, logits, temperature
        self.near, self.radius, self.hinge = near, radius, hinge
        self.heads: PredictionHeads | None = None
        self._factored: list[Pair] | None = None

    @staticmethod
    def check_teacher(options: Mapping[str, Any], student: ModelSpec, teacher: ModelSpec) -> None:
        """Refuse before a run what the descriptions of student and teacher say cannot be compared."""
        if options.get("predict") is not None:
            depth = teacher.stack.depth
            if bad := [i for i in options["predict"] if not -depth <= i < depth]:
                raise BadInput(f"predict names layer {bad[0]} of the teacher, which has layers 0 to {depth - 1}")
        elif options.get("hidden"):
            layer_pairs(student, teacher, options.get("pairs"))

    def attach(self, model: Any, batch: Mapping[str, Any]) -> None:
        if self.predict is not None and self.hidden:
            outer = self.teacher.model(model.device).spec.stack.width
            self.heads = PredictionHeads(model.spec.stack.width, outer, len(self.predict)).to(model.device)

    def forward(self, model: Any, batch: Mapping[str, Any], generator: torch.Generator | None = None, **context: Any) -> Loss:
        inner = bool(self.hidden) and (self.predict is not None or self.pairs is not None or self.embedding or model.filters is not None)
        student = Overheard(model, hiddens=inner)
        loss = self.task(student, batch, generator, **context) if self.task is not None else None
        ours = student.output if loss is not None else student(batch, **context)
        device = ours.hidden.device
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.hidden or self.logits:
            theirs = self.teacher(student.batch, device, hiddens=inner)
            if self.hidden:
                terms["distance"] = self.hidden, self._distance(model, ours, theirs)
            if self.logits:
                terms["divergence"] = self.logits, divergence(ours, theirs, self.temperature)
        if self.near:
            if self._factored is None:
                self._factored = factored(model, self.teacher.model(device))
            terms["nearness"] = self.near, nearness(self._factored, self.radius, hinge=self.hinge)
        if loss is None:
            count = ours.mask.sum() if ours.mask is not None else torch.tensor(_vectors(ours.hidden)[..., 0].numel(), device=device)
            loss = Loss(torch.zeros((), device=device), count)
        # Each term is a mean already; a loss is a sum over the items that the task counts.
        metrics = {name: (term * loss.count).detach() for name, (_, term) in terms.items()}
        if self.task is not None:
            metrics |= {"task_loss": loss.total.detach(), **loss.metrics}
        total = loss.total
        for weight, term in terms.values():
            total = total + weight * term * loss.count
        return Loss(total, loss.count, metrics)

    def _distance(self, model: Any, ours: Output, theirs: Output) -> Tensor:
        """The mean over pairs and positions."""
        if self.predict is not None:
            if self.heads is None:
                self.attach(model, {})
            assert self.heads is not None
            couples = list(zip(self.heads(ours.hidden), [(theirs.hiddens or ())[i] for i in self.predict], strict=True))
        else:
            couples = paired(ours, theirs, self.pairs)
            if self.embedding and ours.entered is not None and theirs.entered is not None:
                couples.append((ours.entered, theirs.entered))
        mask = None if self.padding or ours.mask is None or ours.hidden.dim() != 3 else ours.mask
        means = []
        for a, b in couples:
            a, b = _vectors(a), _vectors(b)
            if mask is not None and a.shape[:2] == b.shape[:2]:
                a, b = a[mask], b[mask]
            means.append(distances(self.distance, a, b, cosine=self.cosine).mean())
        return torch.stack(means).mean()


class HiddenDistillation(Distillation):
    """Each position's hidden vectors are drawn to the teacher's, averaged over pairs of layers, and nothing else.

    Args:
        teacher, pairs, distance: see `Distillation`.
    """

    def __init__(self, data: Any = None, *, teacher: str, pairs: Pairs = None, distance: Distance = "mse") -> None:
        super().__init__(data, teacher=teacher, hidden=1.0, pairs=pairs, distance=distance)

    @staticmethod
    def check_teacher(options: Mapping[str, Any], student: ModelSpec, teacher: ModelSpec) -> None:
        Distillation.check_teacher({"hidden": 1.0, **options}, student, teacher)


class LogitDistillation(Distillation):
    """The student's softened distribution is drawn to the teacher's, and nothing else.

    Args:
        teacher, temperature: see `Distillation`.
    """

    def __init__(self, data: Any = None, *, teacher: str, temperature: float = 1.0) -> None:
        super().__init__(data, teacher=teacher, logits=1.0, temperature=temperature)


class DistilledMaskedLM(Distillation):
    """Masked tokens are predicted, and every hidden state, the embedding's among them, is drawn to the teacher's.

    Student and teacher have the same depth and width. Source: Xing et al. 2024, "BiPFT" (arXiv 2312.08937), without its
    next-sentence terms (this data has no sentence pairs) and with the teacher's dropout off.

    Args:
        teacher: see `Distillation`. weight: of the distances. rate: share of tokens to predict.
    """

    def __init__(self, data: Any, *, teacher: str, weight: float = 1.0, rate: float = 0.15) -> None:
        super().__init__(data, teacher=teacher, task="masked-lm", task_options={"rate": rate}, hidden=weight, pairs="all", embedding=True)

    @staticmethod
    def check_teacher(options: Mapping[str, Any], student: ModelSpec, teacher: ModelSpec) -> None:
        Distillation.check_teacher({"hidden": 1.0, "pairs": "all"}, student, teacher)


def paired(ours: Output, theirs: Output, pairs: Pairs) -> list[Couple]:
    """What is compared: the vectors of each pair of layers, the student's first, each through its model's filter where it has one."""
    found = layer_pairs(ours.model.spec, theirs.model.spec, pairs)
    if found is None:
        return [(ours.hidden, theirs.hidden)]

    def read(output: Output, layer: int) -> Tensor:
        filters, hidden = output.model.filters, (output.hiddens or ())[layer]
        return hidden if filters is None else filters(layer, hidden)

    with torch.no_grad():  # its filters are the teacher's too
        wanted = [read(theirs, j) for _, j in found]
    return [(read(ours, i), target) for (i, _), target in zip(found, wanted, strict=True)]


def _vectors(hidden: Tensor) -> Tensor:
    """Hidden states with their vectors along the last axis: of maps (b, c, h, w), the channels at each place."""
    return hidden.movedim(1, -1) if hidden.dim() == 4 else hidden
