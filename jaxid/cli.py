"""The command line, `jaxid --help`, made by cyclopts from dataclasses of options and a few plain functions.

Each command imports only what it needs, so that help is printed immediately.
"""

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Dict

from jaxid import __version__
from jaxid.checks import Count, Range, check_values
from jaxid.commands import COMMANDS, GROUPS
from jaxid.errors import InputError, JaxidError, JaxidWarning, OutputError
from jaxid.io import ensure_output_folder, to_json, write_json
from jaxid.options import check_options_file, read_options
from jaxid.places import Elsewhere, quieten, relayed, taken

SHARED = {"finetune", *(path for path in COMMANDS if path.startswith("run "))} - {"run compare"}
"""The commands that several processes can share."""

SHORT = {
    "demo": "Find the spatial IDs of the model that ships with jaxid, draw them, and show that they are causal.",
    "ask": "Ask a model about a picture.",
    "finetune": "Fine-tune on grid scenes with a loss on spatial IDs.",
    "compare-finetune": "Compare fine-tuning runs with and without the ID loss.",
    "merge": "Join the folders of a run's shards into one, as if it had been run at once.",
    "view": "Show runs, IDs or dense maps as one HTML page that needs no network.",
    "plan": "Say what a job needs on a device, which batch it would choose, and the least time it takes.",
}
"""What `jaxid --help` says of commands that are imported only when they run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: with 2 and one line on stderr after an error, with 130 after Ctrl-C.

    Each distinct Python warning is printed once, as one line.

    Args:
        arguments: used instead of `sys.argv[1:]`.
    """
    use_compilation_cache()
    try:
        with _one_line_warnings():
            run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except (JaxidError, CycloptsError) as error:
        message = " ".join(str(error).split())
        hint = " (see --help)" if isinstance(error, CycloptsError) else ""
        print(f"error: {message}{hint}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # whoever reads the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    raise SystemExit(0)


def run(tokens: list[str]) -> None:
    """Runs one command and prints what it reports, in one process or in several; then process 0 prints.

    Raises:
        JaxidError: from the command.
        CycloptsError: for arguments that do not fit it.
    """
    rest, place = (tokens, None) if tokens[:1] == ["plan"] else taken(tokens)
    if place is None or place.processes == 1:
        _act(*_parsed(rest))
        return
    words = _without_config(rest)[0]
    if not any(" ".join(words[:count]) in SHARED for count in (1, 2)):
        raise InputError(
            f"`jaxid {' '.join(words[:2])}` runs in one process; several share the experiments of `jaxid run`, and "
            "`jaxid finetune`."
        )
    quieten()
    with relayed() if place.process else contextlib.nullcontext():
        parsed = _parsed(rest)
        from jaxid import processes

        with processes.joined(place):
            _act(*parsed, quiet=place.process > 0)


def _act(command: Any, given: Any, *, quiet: bool = False) -> None:
    """Runs a command, and prints what it reports unless `quiet`."""
    if quiet:
        warnings.simplefilter("ignore")
    if getattr(command, "__module__", "").startswith("jaxid.") and not isinstance(command, type):
        check_values(command, given.arguments)
    try:
        result: Any = command(*given.args, **given.kwargs)
        if isinstance(result, str):
            lines = [result]
        else:
            lines = result.printed(result.run()) if isinstance(command, type) else ()
    except Elsewhere as done:
        lines = [str(done)] if str(done) else []
    for line in () if quiet else lines:
        print(line)


def _parsed(tokens: list[str]) -> tuple[Any, Any]:
    """The command that the tokens name, and its arguments."""
    # What follows `plan` are another command's arguments, with its own file of options.
    rest = tokens if tokens[:1] == ["plan"] else _without_config(tokens)[0]
    command, given, _ = app(tokens).parse_args(rest, exit_on_error=False, print_error=False, help_on_error=False)
    return command, given


def plan(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    device: str = "this",
    json: bool = False,
    save: Path | None = None,
) -> str:
    """Say what a job needs on a device, which batch it would choose, and the least time it takes.

    No weights are read. Memory on other devices is estimated; on this one, XLA's compiler tells it.

    Args:
        command: an experiment with the arguments of its own command, such as belief-swap --data COCO --ids FILE; an
            extraction of IDs; finetune; or dcsm eval.
        device: h100, h200, a100-40, a100-80, rtx4090, v5e, v5p, v6e, cpu, or this.
        json: print JSON instead of a table.
        save: file for the plan as JSON.
    """
    from jaxid.devices import device as device_of
    from jaxid.experiments import planning

    chip, words = device_of(device), list(command)
    if f"run {' '.join(words[:1])}" in COMMANDS:
        words = ["run", *words]
    if not any(word == "--out" or word.startswith("--out=") for word in words):
        words.append("--out=nothing-is-written")
    options, given = _parsed(words)
    if not isinstance(options, type) or not issubclass(options, planning.PLANNED):
        raise InputError(
            "plan needs a `jaxid run`, `jaxid ids`, `jaxid finetune` or `jaxid dcsm eval` command, such as: jaxid plan "
            "belief-swap ..."
        )
    found = planning.plan(options(*given.args, **given.kwargs), chip, measure=device == "this")
    if save is not None:
        write_json(save, found)
    return to_json(found) if json else "\n".join(found.report())


def view(
    *shown: Path,
    out: Path | None = None,
    limit: Count | None = None,
    picture_size: Count = 336,
    serve: bool = False,
    port: Annotated[int, Range(0, 65_535)] = 8000,
) -> str:
    """Show runs, IDs or dense maps as one HTML page that needs no network.

    The page holds pictures, questions, tokens and answers of every item, with heat maps by layer, and the IDs. Pictures
    and questions are read again from the run's data; no weights are.

    Args:
        shown: folders of `jaxid run` or `jaxid dcsm score`, and files of IDs.
        out: the page; view.html in the first folder by default.
        limit: number of items of each run, from its first; all by default.
        picture_size: longest side of the pictures in the page, in pixels.
        serve: also serve the page to browsers on this machine, at http://127.0.0.1, until Ctrl-C.
        port: of the server; 0 takes a free one.
    """
    from jaxid.experiments import viewing
    from jaxid.viewer.serve import serve as served

    page = viewing.write(shown, out, limit=limit, picture_size=picture_size)
    if serve:
        served(page, port)
    return str(page)


def merge(*folders: Path, out: Path) -> str:
    """Join the folders of a run's shards into one, as if it had been run at once.

    The folder then holds table, summary and figures, and the run's own command resumes it as finished. No weights are
    read.

    Args:
        folders: of all shards, in any order.
        out: folder for the result; a new one.
    """
    from jaxid.experiments import merge as shards

    return "\n".join(shards.merge(folders, out))


def app(tokens: Sequence[str] = ()) -> App:
    """The commands; where the tokens ask for help on a group, its commands are imported for their descriptions.

    Raises:
        InputError: for a `--config` file that cannot be read as one.
    """
    root = App(
        name="jaxid",
        version=f"jaxid {__version__}",
        help="Spatial and temporal IDs of vision-language models, and dense similarity maps of CLIP-like ones, in JAX."
        "\n\nEvery command takes --config FILE (YAML, TOML or JSON), which holds its options by name; every run writes "
        "the file that repeats it, config.yaml.\n\nThe experiments of `jaxid run`, and finetune, also run in "
        "several processes: start each with --coordinator HOST:PORT --processes N --process I, where HOST is the "
        "machine of process 0; or with --processes auto under Slurm, Open MPI, Kubernetes, torchrun or on a TPU pod.",
        help_format="plaintext",
        config=_config(tokens) if tokens[:1] != ["plan"] else (),
        default_parameter=Parameter(negative_iterable=()),
    )
    described = next(iter(tokens), None) if " ".join(tokens[:2]) not in COMMANDS else None
    groups = {name: App(name=name, help=text, help_format="plaintext") for name, text in GROUPS.items()}
    for path, target in COMMANDS.items():
        *group, name = path.split(" ")
        if group and group[0] == described:
            module, attribute = target.split(":")
            groups[group[0]].command(getattr(importlib.import_module(module), attribute), name=name)
        elif group:
            groups[group[0]].command(target, name=name)
        else:
            root.command(target, name=name, **({"help": SHORT[name]} if tokens[:1] != [name] else {}))
    for group in groups.values():
        root.command(group)
    root.register_install_completion_command()
    return root


def _config(tokens: Sequence[str]) -> tuple[Dict, ...]:
    """The options in the file that `--config` names, if it is given.

    They are nested under the words of the command: at the root, an option that shares the name of a group, such as
    data, would be dropped.

    Raises:
        InputError: for a file that cannot be read as one.
    """
    rest, file = _without_config(tokens)
    if file is None:
        return ()
    options = read_options(file)
    for word in reversed(rest[: 2 if rest[:1] and rest[0] in GROUPS else 1]):
        options = {word: options}
    return (Dict(options, source=str(file)),)


def _without_config(tokens: Sequence[str]) -> tuple[list[str], Path | None]:
    """The tokens without `--config FILE`, and the file.

    Raises:
        InputError: if no file follows, or its name does not say in which format it is.
    """
    rest = list(tokens)
    for index, token in enumerate(tokens):
        if token == "--config" or token.startswith("--config="):
            count = 1 if "=" in token else 2
            if index + count > len(tokens):
                raise InputError("--config needs a file.")
            path = Path(token.partition("=")[2] or tokens[index + 1])
            check_options_file(path)
            del rest[index : index + count]
            return rest, path
    return rest, None


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Prints each distinct warning once, as one line, and restores Python's own handling afterwards."""
    told = set()

    def tell(message: Warning | str, *_: object) -> None:
        line = f"warning: {' '.join(str(message).split())}"
        if line not in told:
            from tqdm import tqdm

            told.add(line)
            tqdm.write(line, file=sys.stderr)  # a progress bar is drawn again below it

    with warnings.catch_warnings():
        warnings.showwarning = tell
        if not sys.warnoptions:
            warnings.simplefilter("always", JaxidWarning)
        yield


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs between commands: in `JAX_COMPILATION_CACHE_DIR`, or the user's caches.

    Must be called before JAX is imported. If the folder cannot be written, nothing is cached and no error is raised.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = ensure_output_folder(Path(caches) / "jaxid" / "compilation")
    except (OutputError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
