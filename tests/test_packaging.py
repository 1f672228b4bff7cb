"""The wheel, the editable install and the command, as users and type checkers meet them."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import jaxid
from jaxid import cli

ROOT = Path(__file__).parents[1]

FOLDERS = (".ci", "benchmarks", "docs", "jaxid", "kernels", "notebooks", "tests")
"""Those of a source distribution."""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def shipped_files() -> set[str]:
    """Every module, model file and marker of the source tree, by its place in the wheel."""
    files = {path for folder in ("jaxid", "kernels") for path in (ROOT / folder).rglob("*") if path.is_file()}
    places = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    return {
        place.replace("kernels/", "jaxid/kernels/", 1) if place.startswith("kernels/") else place for place in places
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel built from it, in the folder `dist` of a copy of the source tree.

    A build folder in the source tree itself would keep files that are long gone.
    """
    source = tmp_path_factory.mktemp("source")

    def left_out(folder: str, names: list[str]) -> set[str]:
        made = {"__pycache__", "_build"} & set(names)
        return made | {name for name in names if (Path(folder) / name).is_symlink()}

    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, source / path.name, ignore=left_out)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    # The link for type checkers must not be needed.
    assert not (source / "jaxid" / "kernels").exists()
    built = run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "is absent from the `packages` configuration" not in built.stdout + built.stderr
    return source


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = (distributions / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_source_distribution_holds_everything(distributions: Path) -> None:
    (path,) = (distributions / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    files = {str(file.relative_to(distributions)) for file in distributions.rglob("*") if file.is_file()}
    made = {name for name in held | files if name.startswith(("dist/", "build/", "jaxid_vlm.egg-info/"))}
    assert held - made == (files - made) | {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == shipped_files()


@pytest.mark.slow
def test_wheel_says_what_a_package_index_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        licences = [f"{Path(metadata).parent}/licenses/{name}" for name in fields.get_all("License-File", [])]
        assert fields["License-Expression"] == "Apache-2.0 AND MIT"
        assert len(licences) == 2 and set(licences) <= set(names)
        assert b"Plotly" in archive.read(licences[1])
    description = str(fields.get_payload())
    assert description.startswith("# jaxid\n") and "`docs/interventions.md`" in description
    assert re.findall(r"\]\((?!https?:)[^)]*\)", description) == []


@pytest.mark.slow
def test_kernels_import_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import jaxid.kernels, jaxid.errors; print(jaxid.kernels.__file__)"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.stdout.strip() == str(tmp_path / "installed" / "jaxid" / "kernels" / "__init__.py"), done.stderr


def test_kernels_import_from_another_folder(tmp_path: Path) -> None:
    code = "import jaxid.kernels.rope; print(jaxid.kernels.rope.__file__)"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert Path(done.stdout.strip()).resolve() == ROOT / "kernels" / "rope.py", done.stderr


@pytest.mark.slow
def test_pyright_sees_kernels_and_public_names(tmp_path: Path) -> None:
    lines = [
        "import jaxid",
        "from jaxid import io",
        "from jaxid.kernels import attention",
        "from jaxid.kernels.attention import attend",
        "jaxid.InputError('right')",
        "attend('wrong')",
        "attention.no_such_kernel",
        "jaxid.NoSuchName",
        "io.write_text('wrong')",
        "import jaxid.kernels.no_such_module",
    ]
    (tmp_path / "probe.py").write_text("\n".join(lines))
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable, cwd=tmp_path)
    found = {
        (item["range"]["start"]["line"] + 1, item["rule"])
        for item in json.loads(done.stdout)["generalDiagnostics"]
        if item["severity"] == "error"
    }
    assert {line for line, _ in found} == {6, 7, 8, 9, 10}, done.stdout
    assert {rule for line, rule in found if line == 6} == {"reportCallIssue"}


def test_version_is_printed(capsys: pytest.CaptureFixture[str], no_cache: None) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxid {jaxid.__version__}\n"


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


def test_jaxid_error_is_one_line_and_code_2(tmp_path: Path, no_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["data", "preview", "--out", str(tmp_path / "file" / "scenes.png"), "--count", "1"])
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "scenes.png" in output.err and "cannot write" in output.err


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, no_cache: None, tmp_path: Path) -> None:
    from jaxid.data import scenes

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "preview", interrupted)
    with pytest.raises(SystemExit, match=r"^130$"):
        cli.main(["data", "preview", "--out", str(tmp_path / "scenes.png")])


def test_preview_writes_a_picture(tmp_path: Path, no_cache: None) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["data", "preview", "--out", str(tmp_path / "scenes.png"), "--count", "2", "--size", "64"])
    assert (tmp_path / "scenes.png").read_bytes().startswith(b"\x89PNG")


def test_commands_keep_compiled_programs_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "chosen")
    cli.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "chosen"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "jaxid" / "compilation")


def test_unwritable_cache_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    cli.use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_citation_and_workflow_agree_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (stated["version"], stated["authors"]) == (jaxid.__version__, project["authors"])
    if not (ROOT / ".github").exists():
        return  # in a source distribution
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    versions = [
        f"Programming Language :: Python :: {version}"
        for version in workflow["jobs"]["all"]["strategy"]["matrix"]["python"]
    ]
    assert versions == [name for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
