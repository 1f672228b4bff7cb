"""The command line: what it prints, what it writes, and one line of error for everything that can be wrong."""

import dataclasses
import errno
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
import fixtures
import numpy as np
import pytest
from families import CASES
from PIL import Image

import jaxid
from jaxid import cli
from jaxid.errors import JaxidWarning
from jaxid.experiments.base import Command


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands started here leave the environment and the user's caches alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))


def run(*arguments: str | Path) -> int:
    """Runs a command in this process; its exit status."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    code = stopped.value.code
    assert isinstance(code, int)
    return code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line that a command that must fail prints, but for warnings of words that tiny vocabularies lack."""
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("warning: the questions hold words")]
    assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
    return lines[0]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"jaxid {jaxid.__version__}\n"


def test_version_of_the_installed_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from jaxid.cli import main; main()", "--version"], capture_output=True
    )
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, f"jaxid {jaxid.__version__}\n", b"")


def test_error_of_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from jaxid.cli import main; main()", "zoo", "evaluate", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no model folder at {tmp_path / 'none'}") and done.stderr.count("\n") == 1


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("data", "demo", "zoo", "--version"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["zoo", "train"],
        ["zoo", "train", "tiny-llava", "--out", "a", "--typo"],
        ["data", "preview", "a.png", "--count", "many"],
    ],
)
def test_wrong_usage_is_told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "(see --help)" in refused(capsys, *arguments)


def test_preview_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "scenes.png"
    assert run("data", "preview", "--out", path, "--count", "4", "--size", "24") == 0
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        # Eight across: two rows of objects, one of scenes.
        assert picture.size == (8 * (24 + 8) + 8, 3 * (24 + 36) + 8)
        assert np.asarray(picture).std() > 10
    assert [entry.name for entry in path.parent.iterdir()] == ["scenes.png"]
    first = path.read_bytes()
    for seed, same in (("0", True), ("1", False)):
        assert run("data", "preview", "--out", path, "--count", "4", "--size", "24", "--seed", seed) == 0
        assert (path.read_bytes() == first) == same


# --- models that are none ------------------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def foreign(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 8}))


def truncated(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])


def no_weights(folder: Path) -> None:
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def other_shape(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_config, "config.json"),
        (broken_config, "config.json"),
        (foreign, "bert"),
        (truncated, "model.safetensors"),
        (no_weights, "safetensors"),
        (no_tokenizer, "tokenizer"),
        (other_shape, "mlp"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_damaged_model_folders(
    command: str, damage: Callable[[Path], None], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(CASES[0]), folder)
    damage(folder)
    capsys.readouterr()  # making the folder may have printed something
    arguments = ["zoo", "evaluate", folder]
    if command == "demo":
        arguments = ["demo", "--model", folder, "--out", tmp_path / "out"]
    line = refused(capsys, *arguments)
    assert named in line


@pytest.mark.parametrize("model", ["missing", "./missing", "/missing/model", "a/b/c", ""])
def test_missing_models(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "":  # the folder one stands in
        assert "config.json" in refused(capsys, "zoo", "evaluate", model)
    else:
        assert model.removeprefix("./") in refused(capsys, "zoo", "evaluate", model)


def test_unknown_model_of_the_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "zoo", "train", "huge-llava", "--out", tmp_path / "run")
    assert "'huge-llava'" in line and "tiny-llava" in line
    assert not (tmp_path / "run").exists()


def test_training_folder_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert "other settings" in refused(capsys, "zoo", "train", "tiny-llava", "--out", tmp_path)


# --- places that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["data", "preview", "--count", "1", "--size", "8"], ["demo"], ["zoo", "train", "tiny-llava"]],
    ids=lambda arguments: arguments[-1],
)
def test_a_file_in_the_way(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file/out.png", "file") if arguments[0] != "data" else ("file/out.png",):
        assert str(tmp_path / "file") in refused(capsys, *arguments, "--out", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_picture_of_unknown_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "data", "preview", "--count", "1", "--size", "8", "--out", tmp_path / "scenes.gif")
    assert "scenes.gif" in line and ".png" in line


@pytest.mark.parametrize("what", ["picture", "record", "folder"])
def test_a_full_disk(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "picture":
        monkeypatch.setattr(Image.Image, "save", full)
        line = refused(capsys, "data", "preview", "--count", "1", "--size", "8", "--out", tmp_path / "scenes.png")
    elif what == "record":
        monkeypatch.setattr(Path, "write_text", full)
        line = refused(capsys, "zoo", "train", "tiny-llava", "--out", tmp_path)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
        line = refused(capsys, "demo", "--out", tmp_path / "demo")
    assert "No space left on device" in line and str(tmp_path) in line
    assert {path.name for path in tmp_path.rglob("*")} <= {".lock"}


def test_control_c_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxid.data import scenes

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "preview", interrupted)
    assert run("data", "preview", "--out", tmp_path / "scenes.png") == 130


# --- numbers that are none, warnings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["data", "preview", "--out", "a.png", "--seed", "-5"], "seed"),
        (["data", "grid", "--out", "a", "--pair", "star,fish", "--seed", "99999999999999999999"], "seed"),
        (["data", "mvbench", "--out", "a", "--seed", str(2**32)], "seed"),
        (["data", "coco-spatial", "--out", "a", "--noise", "inf"], "noise"),
        (["zoo", "evaluate", "--seed", "-1"], "seed"),
        (["demo", "--out", "a", "--seed", "-1"], "seed"),
        (["run", "steer", "--data", "a", "--ids", "a", "--out", "a", "--strength", "nan"], "strength"),
        (["run", "steer", "--data", "a", "--ids", "a", "--out", "a", "--seed", "-1"], "seed"),
        (["run", "occlusion", "--data", "a", "--out", "a", "--radius", "nan"], "radius"),
        (["finetune", "--data", "a", "--ids", "a", "--out", "a", "--learning-rate", "-inf"], "learning_rate"),
    ],
    ids=lambda entry: "-".join(entry[:2]) if isinstance(entry, list) else None,
)
def test_numbers_that_no_command_can_use(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def resolved(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def described(command: Any) -> set[str]:
    """The parameters that the docstrings of a function, or of a class and its bases, explain."""
    sources = command.__mro__ if isinstance(command, type) else [command]
    return {entry.arg_name for one in sources if one.__doc__ for entry in docstring_parser.parse(one.__doc__).params}


@pytest.mark.parametrize("path", cli.COMMANDS)
def test_every_command_checks_its_options_and_explains_them(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = resolved(cli.COMMANDS[path])
    if isinstance(command, type):  # the options of functions are checked by the command line itself
        assert dataclasses.is_dataclass(command) and issubclass(command, Command)
    assert run(*path.split(" "), "--help") == 0
    first = (command.__doc__ or "").splitlines()[0]
    assert " ".join(first.split()) in " ".join(capsys.readouterr().out.split())
    assert set(inspect.signature(command).parameters) <= described(command)


def test_help_of_a_group_describes_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "--help") == 0
    assert "Draw a sheet of procedural scenes" in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.SHORT)
def test_help_says_of_a_command_what_the_command_says(name: str) -> None:
    first = resolved(cli.COMMANDS[name]).__doc__.splitlines()[0]
    assert first.startswith(cli.SHORT[name].rstrip("."))


# --- options in a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "text"),
    [("yaml", "count: 4\nsize: 24\n"), ("toml", "count = 4\nsize = 24\n"), ("json", '{"count": 4, "size": 24}')],
)
def test_a_file_holds_options_which_the_line_overrides(ending: str, text: str, tmp_path: Path) -> None:
    config = tmp_path / f"options.{ending}"
    config.write_text(text)
    assert run("data", "preview", "--config", config, "--out", tmp_path / "a.png") == 0
    assert run("data", "preview", f"--config={config}", "--out", tmp_path / "b.png", "--size", "32") == 0
    sizes = []
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.size)
    assert sizes[0] == (8 * (24 + 8) + 8, 3 * (24 + 36) + 8) and sizes[1] != sizes[0]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("options.yaml", "colour: 4\n", "colour"),
        ("options.yaml", "count: [\n", "options.yaml"),
        ("options.ini", "count = 4\n", ".yaml"),
        ("options.toml", None, "does not exist"),
        ("options.yaml", "count: 0\n", "count"),
    ],
)
def test_files_that_hold_no_options(name: str, text: str | None, named: str, tmp_path: Path, capsys: Any) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert named in refused(capsys, "data", "preview", "--config", tmp_path / name, "--out", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_warnings_are_one_line_each_and_python_keeps_its_own_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxid.data import scenes

    def warned(*_: Any, **__: Any) -> None:
        for text in ("first\n  of two lines", "second", "first\n  of two lines"):
            warnings.warn(text, JaxidWarning, stacklevel=1)

    monkeypatch.setattr(scenes, "preview", warned)
    before = warnings.showwarning, list(warnings.filters)
    assert run("data", "preview", "--out", tmp_path / "scenes.png") == 0
    assert capsys.readouterr().err == "warning: first of two lines\nwarning: second\n"
    assert (warnings.showwarning, warnings.filters) == before


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from jaxid.cli import main; main(['--help'])"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 1)


def test_nothing_is_said_of_a_missing_pytorch() -> None:
    code = f"""{fixtures.WITHOUT_TORCH}
import jaxid
from jaxid.checkpoints.encoders import load_encoder
jaxid.load("tiny-llava").prepare(None, "left")
load_encoder("tiny-clip")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
