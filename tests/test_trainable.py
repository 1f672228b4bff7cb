"""Which tensors train: their kinds, budgets and rows; those that a network does not have are refused."""

import re

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import EACH, Case, over

from jaxid.errors import InputError
from jaxid.train.trainable import GROUPS, Selection, Tensor, choose, tensors

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


# --- what is chosen --------------------------------------------------------------------------------------------------


@over(EACH)
def test_every_tensor_has_a_kind(case: Case) -> None:
    """The kinds are told apart by the names that the checkpoints use."""
    loaded = fixtures.model(case)
    every = tensors(loaded.parameters, tied=loaded.config.text_config.tie_word_embeddings)
    assert {tensor.group for tensor in every} <= set(GROUPS)
    assert sum(tensor.size for tensor in every) == sum(leaf.size for leaf in jax.tree.leaves(loaded.parameters))
    kinds = {group: [tensor for tensor in every if tensor.group == group] for group in GROUPS}
    for group in ("vision-mlp", "vision-attention", "vision-norms", "projector", "lm-mlp", "lm-attention", "lm-norms"):
        assert kinds[group], group
    assert all(".mlp." in tensor.path for tensor in kinds["lm-mlp"])
    assert all(tensor.path.startswith("tower.") for tensor in kinds["vision-mlp"])
    assert not any(
        "norm" in tensor.path
        for tensor in kinds["vision-mlp"] + kinds["lm-attention"] + kinds["projector"]
        if tensor.path != "projector_norm.scale" and not tensor.path.startswith(("projector_norm", "tower.merge"))
    )
    blocks = max(tensor.depth for tensor in every if tensor.group.startswith("vision")) + 1
    last = choose(every, ["vision-mlp"], budget=1.0, vision_blocks=1)
    assert {tensor.depth for tensor in last} == {blocks - 1}
    if case.name.startswith("mllama"):  # the gated global blocks are the last ones
        assert {tensor.path.split(".")[1] for tensor in last} == {"global_layers"}


def some(*sizes: int, group: str = "lm-mlp") -> list[Tensor]:
    return [
        Tensor(path="decoder.layers.mlp.up.kernel", row=row, size=size, group=group, depth=row)
        for row, size in enumerate(sizes)
    ]


def test_the_largest_come_first_within_the_budget() -> None:
    every = [*some(10, 40, 30, 5), *some(15, group="projector")]
    assert [tensor.size for tensor in choose(every, ["lm-mlp"], budget=0.5)] == [10, 40]  # 50 of 100: 40, not 30, 10
    assert [tensor.size for tensor in choose(every, ["lm-mlp", "projector"], budget=1.0)] == [10, 40, 30, 5, 15]
    assert [tensor.size for tensor in choose(every, ["projector"], budget=0.15)] == [15]
    with pytest.raises(InputError, match="the smallest has 15 elements; give a larger budget"):
        choose(every, ["projector"], budget=0.14)
    with pytest.raises(InputError, match="the network has none of that kind"):
        choose(every, ["vision-mlp"], budget=0.5)
    with pytest.raises(InputError, match=r"selectors \['mlp'\]"):
        choose(every, ["mlp"], budget=0.5)
    for budget in (0.0, 1.1):
        with pytest.raises(InputError, match="share of all parameters"):
            choose(every, ["lm-mlp"], budget=budget)


def test_random_tensors_follow_the_seed() -> None:
    every = some(*[10] * 20)
    first, again, other = (choose(every, ["random"], budget=0.5, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == len(other) == 10


def test_trained_rows_and_the_rest() -> None:
    parameters = {"decoder": {"layers": {"up": jnp.arange(24.0).reshape(4, 3, 2)}, "norm": jnp.arange(3.0)}}
    for rows in ((2, 3), (0, 2), (0, 1, 2, 3), (1,)):
        chosen = Selection((("decoder.layers.up", rows), ("decoder.norm", None)))
        trained = chosen.split(parameters)
        assert trained["decoder.layers.up"].shape == (len(rows), 3, 2)
        merged = chosen.merge(parameters, jax.tree.map(lambda leaf: leaf + 100, trained))
        expected = np.arange(24.0).reshape(4, 3, 2)
        expected[list(rows)] += 100
        np.testing.assert_array_equal(merged["decoder"]["layers"]["up"], expected)
        np.testing.assert_array_equal(merged["decoder"]["norm"], np.arange(3.0) + 100)
        frozen = jax.grad(lambda own, c=chosen: sum(leaf.sum() for leaf in jax.tree.leaves(c.merge(parameters, own))))(
            trained
        )
        assert all((leaf == 1).all() for leaf in frozen.values())
