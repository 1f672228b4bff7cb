"""What README and docs show runs as it stands there, and their links lead somewhere."""

import importlib
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxid.cli import COMMANDS, GROUPS
from jaxid.places import OPTIONS

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parents[1]
BUILT = {"_build", "notebooks"}
DOCS = [path for path in (ROOT / "docs").rglob("*.md") if not BUILT & set(path.relative_to(ROOT / "docs").parts)]
PAGES = [*ROOT.glob("*.md"), *DOCS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def command_lines(page: Path) -> list[str]:
    """All that a page's shell blocks and its code spans ask of `jaxid`, without options whose values are left open."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [part for line in blocks.splitlines() for part in line.split(" && ")]
    lines += re.findall(r"`(jaxid [^`\n]+)`", text)
    return [line.strip() for line in lines if line.strip().startswith("jaxid ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_exist_and_take_these_options(page: Path) -> None:
    wrong = []
    for line in command_lines(page):
        words = shlex.split(line)[1:]
        if words[0].startswith("-") or "COMMAND" in words:
            continue
        names = [name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS]
        if not names:
            wrong += [line] if " ".join(words) not in GROUPS and "..." not in words else []
            continue
        asked = names[:1]
        if names[0] == "plan":  # which takes the command's own
            asked += [" ".join(["run", *words[1:2]]), " ".join(words[1:3]), *words[1:2]]
        known = set[str]()
        for module, name in (COMMANDS[one].split(":") for one in asked if one in COMMANDS):
            known |= set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--config", *OPTIONS}
        given = {option[2:].replace("-", "_") for option in options}
        wrong += [line for name in given if not {name, name.removeprefix("no_")} & known]
    assert wrong == []


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
