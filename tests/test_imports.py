"""The shape of the library: who may import whom, what `import jaxid` loads, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.dtypes import TypePromotionError
from jaxtyping import TypeCheckError

import jaxid

ROOT = Path(__file__).parents[1]
PACKAGES = {"jaxid": ROOT / "jaxid", "jaxid.kernels": ROOT / "kernels"}

# Room -> rooms it may import besides itself. A room is a module or folder of `jaxid`; `zoo` is only the place
# where the shipped models lie, `zoo recipes` are the modules in it that make and evaluate them.
DOORS = {"errors", "io", "checks", "stats", "devices", "meshes", "halving", "pipeline", "places", "processes", "reprs"}
NETWORKS = {*DOORS, "kernels", "nn"}
LOADERS = {*NETWORKS, "prompts", "families", "zoo"}
METHODS = {*LOADERS, "checkpoints", "interp"}
STUDIES = {
    *METHODS,
    "viewer",
    "commands",
    "options",
    "data",
    "ids",
    "dcsm",
    "train",
    "parts",
    "jobs",
    "plots",
    "plan",
    "dry_run",
    "costs",
}
TOP = {*STUDIES, "experiments", "zoo recipes"}
MAY_IMPORT = {
    "errors": set(),
    "io": {"errors"},
    "checks": {"errors"},
    "devices": {"errors"},
    "meshes": {"errors"},
    "halving": {"errors"},
    "costs": {"devices"},
    "pipeline": set(),
    "stats": {"errors"},
    "commands": set(),
    "reprs": set(),
    "options": {"errors", "io"},
    "viewer": {*DOORS, "prompts"},
    "zoo": set(),
    "kernels": set(),
    "nn": {*DOORS, "kernels"},
    "prompts": {*DOORS, "nn"},
    "families": {*NETWORKS, "prompts"},
    "checkpoints": LOADERS,
    "interp": {*LOADERS, "checkpoints"},
    "data": {*DOORS, "prompts"},
    "places": {"errors", "io"},
    "processes": {"errors", "io", "meshes", "places"},
    "parts": {"errors", "io"},
    "jobs": {*DOORS, "parts"},
    "dry_run": {*METHODS, "costs"},
    "plan": {*METHODS, "costs", "dry_run"},
    "plots": DOORS,
    "ids": {*METHODS, "data"},
    "train": METHODS,
    "dcsm": {*METHODS, "data", "train"},
    "experiments": {*STUDIES, "zoo recipes"},
    "zoo recipes": {*METHODS, "data", "ids", "dcsm", "train", "plots"},
    "cli": TOP,
}

HEAVY = ("transformers", "flax", "matplotlib", "pyarrow", "torch")
TORCH_FILE = ROOT / "jaxid" / "checkpoints" / "torch_files.py"


def sources() -> dict[str, Path]:
    """Every module of the library by its import name, but the lazy table of `jaxid` itself."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    del found["jaxid"]
    return found


MODULES = sources()


def room(module: str) -> str:
    parts = module.split(".")
    return "zoo recipes" if parts[1] == "zoo" and len(parts) > 2 else parts[1]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, with the names of `from x import a` as x.a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{name.name}") for name in node.names)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def complaints(module: str, tree: ast.AST) -> list[str]:
    """What is wrong with a module's imports of other modules of the library."""
    here, found = room(module), []
    for line, name in imports(tree):
        if name.startswith("."):
            found.append(f"{module}:{line} imports {name} relatively")
        if name.split(".")[0] != "jaxid" or name == "jaxid.__version__":
            continue
        # `from jaxid.zoo import x` may name a module or a thing in the package.
        target = name if name in MODULES else name.rpartition(".")[0]
        if target not in MODULES:
            found.append(f"{module}:{line} imports {name}, which is no module: import it from its own")
        elif room(target) != here and room(target) not in MAY_IMPORT[here]:
            found.append(f"{module}:{line} ({here}) must not import {target} ({room(target)})")
    return found


def test_every_room_is_in_the_table() -> None:
    assert {room(module) for module in MODULES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_one_way(module: str) -> None:
    assert complaints(module, parsed(MODULES[module])) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("jaxid.kernels.rope", "from jaxid.errors import InputError"),
        ("jaxid.families.base", "from jaxid import engine"),
        ("jaxid.families.base", "def f():\n    import jaxid.interp.forward"),
        ("jaxid.interp.forward", "from jaxid.experiments import relations"),
        ("jaxid.interp.forward", "from .models import base"),
        ("jaxid.interp.forward", "from jaxid import InputError"),
        ("jaxid.checkpoints.loading", "from jaxid.zoo import export"),
        ("jaxid.data.objects", "from jaxid.families.base import Model"),
    ],
)
def test_a_wrong_import_is_found(module: str, line: str) -> None:
    assert len(complaints(module, ast.parse(line))) == 1


def third_party(folder: str) -> set[str]:
    paths = [path for module, path in MODULES.items() if room(module) == folder]
    names = {name.split(".")[0] for path in paths for _, name in imports(parsed(path))}
    return names - set(sys.stdlib_module_names) - {"jaxid"}


def test_kernels_import_only_jax() -> None:
    assert third_party("kernels") <= {"jax", "jaxtyping", "numpy"}


def test_data_needs_no_network_library() -> None:
    assert not third_party("data") & {"jax", "flax", "optax", "transformers", "torch"}


def test_torch_is_imported_only_where_torch_files_are_read() -> None:
    importers = {
        path: [line for line, name in imports(parsed(path)) if name.split(".")[0] == "torch"]
        for path in MODULES.values()
    }
    assert {path for path, lines in importers.items() if lines} == {TORCH_FILE}
    functions = [node for node in ast.walk(parsed(TORCH_FILE)) if isinstance(node, ast.FunctionDef)]
    for line in importers[TORCH_FILE]:
        assert any(node.lineno < line <= (node.end_lineno or 0) for node in functions)


def test_no_file_is_longer_than_500_lines() -> None:
    folders = ("jaxid", "kernels", "tests", "benchmarks")
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_importing_jaxid_loads_nothing_heavy() -> None:
    code = f"import jaxid, sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.split() == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, jaxid.cli\n"
        "try: jaxid.cli.main(['--help'])\n"
        f"finally: print('loaded', *[name for name in ('jax', *{HEAVY}) if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "loaded"


@pytest.mark.parametrize("name", sorted(jaxid._HOME))
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(jaxid, name) is not None
    assert name in dir(jaxid)


def test_the_api_page_names_everything_public() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in sorted(jaxid._HOME) if f"`{name}`" not in page] == []


def test_static_checkers_see_the_same_public_names() -> None:
    tree = parsed(ROOT / "jaxid" / "__init__.py")
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {tuple(reversed(name.rsplit(".", 1))) for _, name in imports(block)} == set(jaxid._HOME.items())


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Spatial'"):
        getattr(jaxid, "Spatial")  # noqa: B009 - pyright refuses the misspelt name itself


def test_tests_run_on_eight_devices_with_strict_dtypes_and_shapes() -> None:
    from jaxid.stats import confidence_interval

    assert jax.device_count() == 8
    with pytest.raises(TypePromotionError):
        jnp.add(jnp.ones(2, jnp.int32), jnp.ones(2, jnp.float32))
    with pytest.raises(TypeCheckError):
        confidence_interval("many", 3)  # pyright: ignore[reportArgumentType]
