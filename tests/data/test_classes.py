"""Rows of some classes only."""

import numpy as np
import pytest

from layerwise.data.load import load_data
from layerwise.data.spec import DataSpec
from layerwise.errors import BadInput


def test_rows_of_some_classes_are_numbered_by_their_places():
    whole, some = (load_data(DataSpec(source="builtin:digits", classes=classes)) for classes in (None, (7, 2)))
    old, new = (data.train.arrays for data in (whole, some))
    assert some.classes == 2 and set(new["labels"]) == {0, 1}
    for place, label in enumerate((7, 2)):
        assert np.array_equal(new["images"][new["labels"] == place], old["images"][old["labels"] == label])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"classes": (3,)}, "at least two different"),
        ({"classes": (1, 1)}, "at least two different"),
        ({"classes": (1, 11)}, "no row of class 11; it has classes 0 to 9"),
        ({"source": "builtin:code", "classes": (0, 1)}, "by their labels"),
    ],
)
def test_classes_that_are_not_there_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        load_data(DataSpec(**{"source": "builtin:digits", **options}))
