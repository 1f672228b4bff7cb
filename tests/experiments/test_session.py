"""Tables and arrays: what one is unrolled to, the other is again."""

import numpy as np

from jaxid.data.coco_spatial import SpatialItem
from jaxid.experiments.session import as_array, item_columns, spread
from jaxid.io import tidy

AXES = {"layer": [5, 2], "item": ["b", "a", "c"], "word": ["left", "right"]}
VALUES = np.arange(12.0).reshape(2, 3, 2)


def test_a_table_becomes_the_array_again_in_any_order_of_rows() -> None:
    table = tidy(VALUES, AXES)
    shuffled = {name: column[np.random.default_rng(0).permutation(12)] for name, column in table.items()}
    np.testing.assert_array_equal(as_array(shuffled, "value", AXES), VALUES)
    some = AXES | {"item": ["c", "b"], "layer": [2]}
    np.testing.assert_array_equal(as_array(shuffled, "value", some), VALUES[1:, [2, 0]])


def test_columns_of_values_that_have_some_of_the_axes() -> None:
    shape, table = VALUES.shape, tidy(VALUES, AXES)
    np.testing.assert_array_equal(spread(AXES["word"], shape), table["word"])
    np.testing.assert_array_equal(spread(AXES["item"], shape, 1), table["item"])
    np.testing.assert_array_equal(spread(AXES["layer"], shape, 0), table["layer"])
    np.testing.assert_array_equal(spread(VALUES[..., 0], shape, 0, 1), np.repeat(VALUES[..., 0].ravel(), 2))
    assert set(spread("model", shape)) == {"model"}


def test_columns_of_items() -> None:
    items = [
        SpatialItem(image_id=row, picture="", subject=name, object="fish", relation=relation)
        for row, (name, relation) in enumerate((("star", "left"), ("cat", "above"), ("key", "below")))
    ]
    found = item_columns(items, VALUES.shape, axis=1)
    assert list(found) == ["image_id", "subject", "object", "relation", "axis"]
    assert found["subject"].tolist() == ["star", "star", "cat", "cat", "key", "key"] * 2
    assert found["axis"].tolist() == (["horizontal"] * 2 + ["vertical"] * 4) * 2
