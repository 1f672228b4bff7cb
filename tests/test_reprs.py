"""What notebooks print of models, prompts, traces, interventions and IDs: one short line, whatever their size."""

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
from families import EVERY

import jaxid
from jaxid.ids.spatial import SpatialIDs
from jaxid.reprs import shown


def test_reprs_are_short_and_say_what_matters() -> None:
    case = EVERY[0]
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    names, values = ("star", "fish"), np.zeros((2, 2, 1, 4, 4, 8), np.float32)
    counts = np.ones((2, 1, 4, 4), np.int32)
    ids = SpatialIDs(values=values, counts=counts, objects=names, sizes=(224.0,), layer_names=("0", "1"))
    edit = jaxid.add(layer=jnp.arange(2), positions=prompts.last(), vector=jnp.ones((2, model.width)))
    written = jaxid.generate(model, recorded, max_new_tokens=2)
    found = [repr(one) for one in (model, prompts, recorded, edit, jaxid.chain(edit, edit), written, ids)]
    assert [text for text in found if len(text) > 500 or "\n" in text] == []
    assert f"{model.name!r}" in found[0] and "parameters in float32" in found[0]
    assert found[1].startswith("Prompts(2 of up to ") and "Is the star to the left" in found[1]
    assert found[2].startswith(f"Trace(hidden=float32[2, {model.width}], keys=float32[{model.num_layers}, 2, ")
    assert found[3].startswith("Add(site='resid_post', layer=[0, 1], ")
    assert found[4].count("Add(") == 2 and found[5].startswith("Generation(tokens=int32[2, ")
    assert found[6].startswith("SpatialIDs(values=float32[2, 2, 1, 4, 4, 8], counts=int32[2, 1, 4, 4], objects=('star'")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((3, 4), np.float32), "float32[3, 4]"),
        (np.arange(3), "[0, 1, 2]"),
        (np.array(True), "True"),
        (np.arange(100), "int64[100]"),
        (np.array(["a", "b"]), "<U1[2]"),
        (("a", "b", "c", "d"), "('a', 'b', 'c', … 4 in all)"),
        ((1,), "(1,)"),
        ({"embed": jnp.zeros(9)}, "{'embed': float32[9]}"),
        (None, "None"),
    ],
)
def test_values_in_a_few_words(value: object, text: str) -> None:
    assert shown(value) == text
