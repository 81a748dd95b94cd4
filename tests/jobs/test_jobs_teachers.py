"""Students and teachers that cannot be compared are refused before anything is trained."""

import pytest

from layerwise.errors import BadInput
from layerwise.jobs.check import check_job
from layerwise.jobs.schema import read_job

DISTILL = {"train": "distillation", "steps": 1, "options": {"teacher": "stage:teacher", "task": "classification", "hidden": 1.0}}


def _job(options=(), **stages):
    distill = {**DISTILL, "options": {**DISTILL["options"], **dict(options)}}
    return {
        "name": "pair",
        "data": {"source": "builtin:digits"},
        "model": {"preset": "vit", "stack": {"depth": 4, "width": 16, "layer": {"heads": 2}}},
        "stages": {"teacher": {"train": "classification", "steps": 1}, **stages, "distill": distill},
    }


NARROW = {"edit": "initialize", "stack": {"width": 8}}


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        ({"small": NARROW}, {}, r"stages.distill: the student's hidden vectors have width 8, the teacher's 16.*add-filters"),
        ({"small": NARROW, "more": {"edit": "add-filters", "layers": [0, 1, 3], "size": 16}}, {}, "3 layers at even distances"),
        ({"small": NARROW, "more": {"edit": "add-filters", "size": 12}}, {}, "width 12, the teacher's 16"),
        ({}, {"pairs": {0: 9}}, "pairs names layer 9"),
        ({}, {"predict": [4]}, "predict names layer 4 of the teacher, which has layers 0 to 3"),
        ({"learn": {"train": "filters", "steps": 1}}, {}, "put edit: add-filters before it"),
        ({"thin": {"edit": "factorize", "ratio": 1e5}}, {}, "leave every matrix as it is"),
        ({"more": {"edit": "add-filters"}, "cut": {"edit": "drop-layers", "layers": [3]}}, {}, "drop the filters first"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_to_do(stages, options, said):
    with pytest.raises(BadInput, match=said):
        check_job(read_job(_job(options, **stages)))


def test_a_head_that_the_task_needs_is_asked_for():
    with pytest.raises(BadInput, match="causal-lm needs a model with a head of kind lm"):
        check_job(read_job(_job({"task": "causal-lm"})))


def test_a_narrow_student_with_filters_of_the_teachers_width_is_fine():
    check_job(read_job(_job(small=NARROW, more={"edit": "add-filters", "size": 16, "interval": 2})))
