"""The command line, `jaxid --help`; each command imports what it needs, so that help comes at once."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from jaxid import __version__
from jaxid.errors import JaxidError, OutputError
from jaxid.results import ensure_output_folder

app = typer.Typer(
    name="jaxid",
    help="Spatial and temporal identifiers of vision-language models, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Pictures and datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line: exit code 2 and one line on stderr for a JaxidError, 130 for Ctrl-C.

    Args:
        arguments: instead of the process's own.
    """
    use_compilation_cache()
    try:
        app(args=None if arguments is None else list(arguments))
    except JaxidError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def use_compilation_cache() -> None:
    """Lets JAX keep compiled programs between commands: in `JAX_COMPILATION_CACHE_DIR`, or the user's caches.

    Has to come before JAX is imported. A cache folder that cannot be written is no cache, never an error.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = ensure_output_folder(Path(caches) / "jaxid" / "compilation")
    except (OutputError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def _print_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"jaxid {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    """Options that stand before the command."""


@data_app.command("preview")
def data_preview(
    out: Annotated[Path, typer.Option(help="The picture to write, for example scenes.png.")],
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 16,
    size: Annotated[int, typer.Option(min=8, help="Side of each scene, in pixels.")] = 112,
) -> None:
    """Draw a sheet of procedural scenes with their captions."""
    from jaxid.data import scenes

    scenes.preview(out, seed=seed, count=count, size=size)


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, summary, tables and figures.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="tiny-llava, or the folder of one trained like it.")] = "tiny-llava",
    seed: Annotated[int, typer.Option(help="Seed of the scenes and of the noise.")] = 0,
) -> None:
    """Find, draw and prove the spatial IDs of the model that ships with jaxid."""
    from jaxid import demo as main_job

    summary = main_job.run(out, main_job.DemoConfig(model=model, seed=seed))
    layer, factor = summary["best_layer"], summary["best_factor"]
    right, swapped, by_noise = summary["accuracy"]["left_right"], summary["belief_swap"], summary["noise_swap"]
    typer.echo(
        f"{summary['model']}: left/right {right:.1%} right; block {layer}, factor {factor}: beliefs swapped "
        f"{swapped[layer]:.1%} by IDs, {by_noise[layer]:.1%} by noise.\n"
        f"Report: {out / 'report.md'} ({summary['seconds']} s)"
    )


zoo_app = typer.Typer(help="The small trained models that ship with jaxid.", no_args_is_help=True)
app.add_typer(zoo_app, name="zoo")


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Which model: tiny-llava.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint is written to its `model` folder.")],
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the recipe's by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=8, help="Pictures per step; the recipe's by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of parameters and data.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 100,
) -> None:
    """Train a shipped model from scratch, or go on from the last save after a kill."""
    from jaxid.errors import InputError
    from jaxid.zoo import SHIPPED, training

    if name not in SHIPPED:
        raise InputError(f"{name!r} is no model of the zoo; there is {', '.join(SHIPPED)}.")
    given = {"steps": steps, "batch_size": batch_size}
    config = training.TrainingConfig(seed=seed, **{key: value for key, value in given.items() if value is not None})
    folder = training.train_and_export(ensure_output_folder(out), config, save_every=save_every)
    typer.echo(f"checkpoint: {folder}")


@zoo_app.command("evaluate")
def zoo_evaluate(
    model: Annotated[str, typer.Argument(help="tiny-llava, or the folder of one trained like it.")] = "tiny-llava",
    count: Annotated[int, typer.Option(min=8, help="Questions of each kind.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 1,
) -> None:
    """Print a model's accuracy on scenes that training never showed."""
    from jaxid.checkpoints.loading import load
    from jaxid.zoo import evaluation

    for kind, result in evaluation.evaluate(load(model), count=count, seed=seed).items():
        typer.echo(
            f"{kind:12s} {result.value:7.1%}   95 % interval {result.low:.1%} to {result.high:.1%}   n = {result.count}"
        )
