"""The wheel, the editable install and the command, as users and type checkers meet them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jaxid
from jaxid import cli

ROOT = Path(__file__).parents[1]


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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build folder in the source tree would keep files that are long gone."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxid", "kernels"):
        copied = shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
        assert not (copied / "kernels").exists()  # the link for type checkers must not be needed
    built = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == shipped_files()


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
