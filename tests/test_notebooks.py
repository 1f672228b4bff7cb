"""The notebooks as they are committed: complete, without outputs, and in need of nothing that the extras do not give.

`notebooks/run.py` runs them.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import itertools
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

INSTALL = """\
# Installs jaxid on Colab or Kaggle for the runtime's accelerator; elsewhere it is installed already.
import importlib.util
import pathlib
import shutil

if importlib.util.find_spec("jaxid") is None:
    tpu = pathlib.Path("/dev/vfio").exists() or any(pathlib.Path("/dev").glob("accel*"))
    extra = "cuda12" if shutil.which("nvidia-smi") else "tpu" if tpu else ""
    %pip install -q "jaxid-vlm[{extra}]\""""

FURTHER = {"coming_from_hooks": ("bench",), "new_family": ("torch",)}
"""Extras that a notebook needs beside `notebooks`, and installs itself if they are missing."""

PLACES = re.compile(r"[\"'`( ]/(?:home|root|tmp|usr|var|opt|mnt|work|Users|private|content)\b")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def imported(source: str) -> Iterator[str]:
    """Names of the packages that a cell imports."""
    plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE)
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.partition(".")[0]


def normal(requirement: str) -> str:
    """The name of a requirement's distribution, without version and extras."""
    return re.split(r"[\s\[<>=!~;]", requirement)[0].lower().replace("_", "-")


def given(name: str) -> set[str]:
    """The distributions that are installed for a notebook."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][extra] for extra in ("notebooks", *FURTHER.get(name, ()))]
    requirements = itertools.chain(project["dependencies"], *extras)
    return {normal(requirement) for requirement in requirements} | {"jaxid-vlm", "ipython"}  # the kernel's own


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """The installed distributions by the names of their packages."""
    return importlib.metadata.packages_distributions()


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_is_valid_and_names_the_kernel_alone(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    identifiers = [cell.id for cell in notebook.cells]
    assert len(set(identifiers)) == len(identifiers)


def test_begins_with_a_title_and_the_install_cell(path: Path) -> None:
    title, install, *_ = read(path).cells
    assert title.cell_type == "markdown" and re.match(r"# \S.*\n\n\S", title.source)
    assert install.cell_type == "code" and install.source == INSTALL


def test_has_one_title(path: Path) -> None:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert sum(len(re.findall(r"^# ", text, re.MULTILINE)) for text in texts) == 1


def test_holds_no_outputs(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
        assert cell.metadata.keys() <= {"tags"}
        assert "attachments" not in cell


def test_names_no_place_of_a_machine(path: Path) -> None:
    notebook = read(path)
    for cell in [*notebook.cells[:1], *notebook.cells[2:]]:
        assert not PLACES.search(cell.source), cell.source


def test_holds_no_unfinished_text(path: Path) -> None:
    """Notebooks are written before their results are known; words that mark a gap must not be left in them."""
    for cell in read(path).cells:
        assert not re.search(r"\b(TODO|FIXME|XXX|FINDING|TBD)\b", cell.source), cell.source


def test_imports_only_what_its_extras_install(path: Path) -> None:
    cells, allowed = code(read(path)), given(path.stem)
    written = {name for cell in cells for name in re.findall(r"^%%writefile (?:-a )?(\w+)\.py$", cell, re.MULTILINE)}
    for name in {name for cell in cells for name in imported(cell)} - written:
        if name in sys.stdlib_module_names:
            continue
        own = {normal(one) for one in distributions().get(name, [name])}
        assert own & allowed, f"{path.stem} imports {name}, which none of its extras installs"


def test_is_listed_on_the_site(path: Path) -> None:
    assert f"(notebooks/{path.name})" in (ROOT / "docs" / "notebooks.md").read_text()


def test_the_site_lists_no_other_notebooks() -> None:
    listed = re.findall(r"\(notebooks/(\S+?\.ipynb)\)", (ROOT / "docs" / "notebooks.md").read_text())
    assert sorted(listed) == [path.name for path in NOTEBOOKS]


def test_links_between_notebooks_lead_somewhere(path: Path) -> None:
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+\.ipynb)\)", cell.source):
                assert (path.parent / target).exists(), target


# --- what the runner finds wrong in outputs ---


@pytest.fixture(scope="module")
def runner():
    # CI runs this file again once the extra is installed.
    pytest.importorskip("jupyter_cache", reason="the extra `notebooks` is not installed")
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "notebooks" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_output(**output: object) -> NotebookNode:
    cell = nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output(**output)])
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("left 0.98\n", None),
        ("3/4 of the words; /5", None),
        ("<b>cells</b></tmp>", None),
        ("FutureWarning: use another name", "warning"),
        ("written to /home/someone/run", "path"),
        (str(ROOT / "jaxid"), "path"),
    ],
)
def test_runner_finds_faults_of_outputs(runner, text: str, fault: str | None) -> None:
    for notebook in (
        with_output(output_type="stream", name="stdout", text=text),
        with_output(output_type="execute_result", data={"text/plain": text}),
    ):
        faults = list(runner.output_faults(notebook))
        assert (not faults) if fault is None else (faults and fault in faults[0])


def test_runner_allows_nothing_on_stderr(runner) -> None:
    assert list(runner.output_faults(with_output(output_type="stream", name="stderr", text="x")))


def test_runner_refuses_unknown_names(runner) -> None:
    assert [path.stem for path in runner.chosen(["geometry"])] == ["geometry"]
    with pytest.raises(SystemExit, match="no notebook is called nothing"):
        runner.chosen(["nothing"])
