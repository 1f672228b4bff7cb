"""What the README shows runs as it stands there."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_gradient_example_flips_the_answer_by_a_short_vector() -> None:
    found = re.search(r"<!-- gradient-example -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        exec(found[1], names)
    shortest, lead = names["shortest"], names["lead"]
    assert lead(jnp.zeros_like(shortest)) > 1 and lead(shortest) < 0
    assert jnp.linalg.norm(shortest) < 0.5 * names["length"].item()
    # It is about the shortest along its own direction: most of it is needed.
    assert lead(0.8 * shortest) > 0
