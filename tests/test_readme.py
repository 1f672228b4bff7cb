"""What README and docs show runs as it stands there, and their links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxid.cli import COMMANDS, GROUPS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(?:^|`|&& )jaxid ((?:[a-z]+(?:-[a-z]+)*)(?: [a-z]+(?:-[a-z]+)*)?)", text, re.MULTILINE)
    known = {*COMMANDS, *GROUPS}
    assert [line for line in found if line not in known and line.split(" ")[0] not in known] == []
    of_groups = [line for line in found if line.split(" ")[0] in GROUPS and " " in line]
    assert [line for line in of_groups if line not in COMMANDS] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.slow
def test_the_gradient_example_flips_the_answer_by_a_short_vector() -> None:
    found = re.search(
        r"<!-- gradient-example -->\n```python\n(.*?)```",
        (ROOT / "docs" / "interventions.md").read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert found is not None
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        exec(found[1], names)
    shortest, lead = names["shortest"], names["lead"]
    assert lead(jnp.zeros_like(shortest)) > 1 and lead(shortest) < 0
    assert jnp.linalg.norm(shortest) < 0.5 * names["length"].item()
    # It is about the shortest along its own direction: most of it is needed.
    assert lead(0.8 * shortest) > 0
