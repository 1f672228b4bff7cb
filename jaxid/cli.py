"""The command line, `jaxid --help`; each command imports what it needs, so that help comes at once."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxid import __version__
from jaxid import cli_diagnosis as cli_diagnosis  # its commands join `run`
from jaxid.checks import check_finite, check_seed
from jaxid.cli_dcsm import dcsm_app
from jaxid.cli_finetune import compare_finetune, finetune, zoo_app
from jaxid.cli_run import run_app
from jaxid.cli_temporal import ids_temporal
from jaxid.errors import DataError, InputError, JaxidError, JaxidWarning, OutputError
from jaxid.io import ensure_output_folder

app = typer.Typer(
    name="jaxid",
    help="Spatial and temporal identifiers of vision-language models, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Pictures and datasets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


app.add_typer(run_app, name="run")
app.add_typer(dcsm_app, name="dcsm")
app.add_typer(zoo_app, name="zoo")
app.command("finetune")(finetune)
app.command("compare-finetune")(compare_finetune)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line: exit code 2 and one line on stderr for a JaxidError, 130 for Ctrl-C.

    Python's warnings become one line each, every distinct one once.

    Args:
        arguments: instead of the process's own.
    """
    use_compilation_cache()
    try:
        with _one_line_warnings():
            app(args=None if arguments is None else list(arguments))
    except JaxidError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Prints each distinct warning once, as one line; what else Python does with warnings comes back afterwards."""
    told = set()

    def tell(message: Warning | str, *_: Any) -> None:
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


@data_app.command("grid")
def data_grid(
    out: Annotated[Path, typer.Option(help="Folder for {A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png.")],
    pair: Annotated[list[str], typer.Option(help="An ordered pair of objects, A,B; may be given several times.")],
    size: Annotated[list[int] | None, typer.Option(min=1, max=224, help="Object sizes of 224; 224 by default.")] = None,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels.")] = 896,
    seed: Annotated[int, typer.Option(help="Seed of colours.")] = 0,
    near_far: Annotated[bool, typer.Option("--near-far", help="Only both ends of the top row.")] = False,
) -> None:
    """Draw all placements of pairs of objects on the 4x4 grid, in the published layout."""
    from jaxid.data.grid import CELL_SIZE, NEAR_FAR, write_grid_folder

    pairs = [_pair(text) for text in pair]
    items = write_grid_folder(
        ensure_output_folder(out),
        pairs,
        seed=seed,
        picture_size=picture_size,
        object_sizes=size or [CELL_SIZE],
        cells=NEAR_FAR if near_far else None,
    )
    typer.echo(f"{len(items)} pictures in {out}")


def _pair(text: str) -> tuple[str, str]:
    first, separator, second = text.partition(",")
    if not separator or not first or not second:
        raise InputError(f"a pair is two names joined by a comma, such as star,fish; got {text!r}.")
    return first, second


@data_app.command("coco-spatial")
def data_coco_spatial(
    out: Annotated[Path, typer.Option(help="Folder for coco_qa_two_obj.json, instances_val2017.json and val2017/.")],
    count: Annotated[int, typer.Option(min=1, help="Number of pictures.")] = 100,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    noise: Annotated[float, typer.Option(min=0, help="Noise over the pictures, as a share of the colours' range.")] = 0,
) -> None:
    """Draw two-object scenes with questions, in the layout of COCO-Spatial."""
    import numpy as np

    from jaxid.data.coco_spatial import write_coco_spatial
    from jaxid.data.scenes import sample_free

    scenes = sample_free(np.random.default_rng(seed), count, num_objects=(2, 2))
    items = write_coco_spatial(ensure_output_folder(out), scenes, picture_size, noise=noise)
    typer.echo(f"{len(items)} pictures in {out}")


@data_app.command("three-objects")
def data_three_objects(
    out: Annotated[Path, typer.Option(help="Folder for three_objects.json and val2017/.")],
    count: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 100,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
) -> None:
    """Draw three-object scenes for questions about what is in between."""
    import numpy as np

    from jaxid.data.three_objects import sample_in_between, write_three_objects

    scenes = sample_in_between(np.random.default_rng(seed), count)
    items = write_three_objects(ensure_output_folder(out), scenes, picture_size)
    typer.echo(f"{len(items)} pictures in {out}")


Pairs = Annotated[list[str], typer.Option(help="An ordered pair of objects, A,B; may be given several times.")]


@data_app.command("finetune")
def data_finetune(
    out: Annotated[Path, typer.Option(help="Folder for {A}_{ax}-{ay}_{B}_{bx}-{by}.png.")],
    pair: Pairs,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels.")] = 896,
    seed: Annotated[int, typer.Option(help="Seed of colours, grounds and jitter.")] = 0,
    varied: Annotated[
        bool, typer.Option("--varied", help="Varied grounds, sizes and angles; plain by default.")
    ] = False,
) -> None:
    """Draw all placements of pairs of objects as a fine-tuning set."""
    from jaxid.data.grid import write_finetune_folder
    from jaxid.data.scenes import VARIED

    options = {"backgrounds": VARIED, "jitter_size": 0.1, "jitter_angle": 15.0} if varied else {}
    pairs = [_pair(text) for text in pair]
    items = write_finetune_folder(ensure_output_folder(out), pairs, seed=seed, picture_size=picture_size, **options)
    typer.echo(f"{len(items)} pictures in {out}")


@data_app.command("appear")
def data_appear(
    out: Annotated[Path, typer.Option(help="Folder for appear_{A}{i}_{B}{j}.mp4.")],
    pair: Pairs,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels, even.")] = 144,
    seed: Annotated[int, typer.Option(help="Seed of places, colours and grounds.")] = 0,
) -> None:
    """Draw clips into which two objects come at all pairs of frames."""
    from jaxid.data.clips import write_appear_folder

    pairs = [_pair(text) for text in pair]
    items = write_appear_folder(ensure_output_folder(out), pairs, seed=seed, picture_size=picture_size)
    typer.echo(f"{len(items)} clips in {out}")


@data_app.command("mvbench")
def data_mvbench(
    out: Annotated[Path, typer.Option(help="Folder for manifest.csv and videos/.")],
    count: Annotated[int, typer.Option(min=1, help="Number of videos.")] = 100,
    picture_size: Annotated[int, typer.Option(min=32, help="Side of the pictures, in pixels, even.")] = 144,
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn.")] = 0,
) -> None:
    """Draw videos of one thing after another with questions of order, in the layout of MVBench's manifest."""
    from jaxid.data.clips import write_mvbench

    items = write_mvbench(ensure_output_folder(out), count, seed=seed, picture_size=picture_size)
    typer.echo(f"{len(items)} videos in {out}")


@app.command("ask")
def ask(
    picture: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Annotated[str, typer.Option(help="Alias, Hugging Face id or folder.")] = "tiny-llava",
    top: Annotated[int, typer.Option(min=1, help="How many answers to print.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Ask a model about a picture; prints the most probable next tokens with their probabilities."""
    import jax
    import numpy as np

    from jaxid.checkpoints.loading import open_checkpoint
    from jaxid.interp.forward import forward

    checkpoint = open_checkpoint(model, dtype=dtype)
    prompts = checkpoint.model.prepare([picture], question)  # before the weights, which may take minutes
    loaded = checkpoint.load()
    _tell("compiling ...")
    logits = forward(loaded, prompts).logits[0]
    check_finite(f"the numbers that {model} computes in {dtype}", logits, DataError)
    probabilities = np.asarray(jax.nn.softmax(logits))
    for token in np.argsort(-probabilities)[:top]:
        # An unembedding may have more rows than the tokenizer has tokens.
        word = loaded.processor.tokenizer.convert_ids_to_tokens(int(token)) or f"(no token, id {token})"
        typer.echo(f"{probabilities[token]:8.3%}  {word}")


def _tell(text: str) -> None:
    """Says what a command is waiting for, on terminals."""
    if sys.stderr.isatty():
        typer.echo(text, err=True)


ids_app = typer.Typer(help="Spatial and temporal IDs.", no_args_is_help=True)
app.add_typer(ids_app, name="ids")
ids_app.command("temporal")(ids_temporal)


@ids_app.command("extract")
def ids_extract(
    data: Annotated[Path, typer.Option(help="Folder of grid pictures in the published layout, or a fine-tuning set.")],
    out: Annotated[Path, typer.Option(help="The file to write, for example ids.safetensors.")],
    model: Annotated[str, typer.Option(help="Alias, Hugging Face id or folder.")] = "tiny-llava",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Extract spatial IDs from a folder of grid pictures."""
    from jaxid.runs import spatial_ids as job

    summary = job.extract(data, out, model=model, batch_size=batch_size, dtype=dtype)
    variance = ", ".join(f"{float(share):.2f}" for share in summary["explained_variance"])
    typer.echo(
        f"{out}: {summary['pictures']} pictures, {summary['pairs']} pairs; two axes explain, by block: {variance}"
    )


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


def _check_numbers(commands: Any) -> None:
    """Gives every command a check of its numbers: NaN, infinity and seeds that generators do not take are refused."""
    for command in commands.registered_commands:
        command.callback = _checked(command.callback)
    for group in commands.registered_groups:
        _check_numbers(group.typer_instance)


def _checked(command: Any) -> Any:
    @functools.wraps(command)
    def checked(**options: Any) -> Any:
        for name, value in options.items():
            if name == "seed":
                check_seed(value)
            elif isinstance(value, float):
                check_finite(f"--{name.replace('_', '-')}", value)
        return command(**options)

    return checked


_check_numbers(app)
