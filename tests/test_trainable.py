"""Selections of tensors: those that a network does not have are refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.errors import InputError
from jaxid.train.trainable import Selection, choose, tensors

PARAMETERS = {"decoder": {"layers": {"mlp": {"kernel": jnp.arange(12.0).reshape(3, 4)}}, "norm": jnp.ones(2)}}
PATH = "decoder.layers.mlp.kernel"


def test_rows_come_back() -> None:
    for rows in ((0,), (1, 2), (0, 2), (0, 1, 2)):
        selection = Selection(((PATH, rows), ("decoder.norm", None)))
        part = selection.split(PARAMETERS)
        np.testing.assert_array_equal(part[PATH], np.arange(12.0).reshape(3, 4)[list(rows)])
        merged = selection.merge(PARAMETERS, {path: -value for path, value in part.items()})
        expected = np.arange(12.0).reshape(3, 4)
        expected[list(rows)] *= -1
        np.testing.assert_array_equal(merged["decoder"]["layers"]["mlp"]["kernel"], expected)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ((PATH, (-1,)), f"{PATH} has rows 0..2, not -1"),
        ((PATH, (0, 3)), f"{PATH} has rows 0..2, not 3"),
        (("decoder.other", None), "the network has no parameter decoder.other"),
    ],
)
def test_rows_that_do_not_exist(rows: tuple[str, tuple[int, ...] | None], named: str) -> None:
    selection = Selection((rows,))
    with pytest.raises(InputError, match=re.escape(named)):
        selection.split(PARAMETERS)
    with pytest.raises(InputError, match=re.escape(named)):
        selection.merge(PARAMETERS, {rows[0]: jnp.ones((2, 4))})


def test_numbers_that_make_no_sense() -> None:
    every = tensors(PARAMETERS, tied=False)
    assert len(choose(every, ["all"], budget=1.0)) == 4
    with pytest.raises(InputError, match="vision_blocks counts the tower's last blocks: 0 or more, not -1"):
        choose(every, ["all"], budget=1.0, vision_blocks=-1)
    with pytest.raises(InputError, match="the seed must be an integer from 0"):
        choose(every, ["random"], budget=1.0, seed=-5)
    with pytest.raises(InputError, match="the budget is a share"):
        choose(every, ["all"], budget=float("nan"))
