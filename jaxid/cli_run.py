"""`jaxid run ...`: the published experiments as resumable jobs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxid.errors import InputError

run_app = typer.Typer(help="The published experiments, as jobs that can be stopped and resumed.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder for parts, table, summary and figures.")]
Data = Annotated[Path, typer.Option(help="Folder of the data set, for example one with coco_qa_two_obj.json.")]
Ids = Annotated[Path, typer.Option(help="The model's spatial IDs, .safetensors or the authors' .pt.")]
ModelName = Annotated[str, typer.Option("--model", help="Alias, Hugging Face id or folder.")]
Layers = Annotated[str | None, typer.Option(help="Decoder blocks, counted from 0, such as 3,5-8.")]
Factor = Annotated[float | None, typer.Option(help="Strength of what is added; 5 as published by default.")]
BatchSize = Annotated[int | None, typer.Option(help="Prompts traced together; from the free memory by default.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Limit = Annotated[int | None, typer.Option(help="How many items, drawn by the seed; all by default.")]
Seed = Annotated[int, typer.Option(help="Seed of the sample and of the noise.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out items that cannot be used, and list them.")]
CompatOption = Annotated[str, typer.Option("--compat", help="none, or reference: with the published code's slips.")]
Template = Annotated[
    str | None,
    typer.Option(help="The user's text, with {query}, {first}, {second}, {First}, {Second}; as published by default."),
]
CaseOption = Annotated[
    str, typer.Option("--case", help="Form of the answer words: lower, capital, both together, or published.")
]
SplitWords = Annotated[str, typer.Option(help="A word of several tokens: last (read there) or refuse.")]


@run_app.command("belief-swap")
def belief_swap(
    data: Data,
    ids: Ids,
    out: Out,
    model: ModelName = "tiny-llava",
    layers: Layers = None,
    factor: Factor = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
    split_words: SplitWords = "last",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens written; 0 reads the first one alone.")] = 250,
) -> None:
    """Turn beliefs round with spatial IDs, beside noise of the same norm (Figure 2)."""
    from jaxid.runs import belief_swap as job

    summary = job.run(job.BeliefSwapConfig(**options_of(locals())))
    best = summary["best"]
    chosen = "the same items" if best["chosen_on"] == "same items" else "others"
    typer.echo(
        f"{summary['answered_items']} items, {summary['accuracy']:.1%} answered rightly; best blocks "
        f"{', '.join(map(str, sorted(best['layers'])))}, chosen on {chosen}: {best['belief']:.1%} swapped by IDs, "
        f"{best['noise']:.1%} by noise (of {best['items']} items){skipped_note(summary)}\n{out / 'summary.json'}"
    )


@run_app.command("compare")
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished belief-swap runs.")], out: Out
) -> None:
    """Several belief-swap runs side by side: Figure 2, and accuracy against steerability (Figure 9)."""
    from jaxid.runs import belief_swap as job

    for name, entry in job.compare(folders, out).items():
        typer.echo(
            f"{name:30s} accuracy {entry['accuracy']:6.1%}   mean drop {entry['mean_accuracy_drop']:6.1%}   "
            f"swapped {entry['best']['belief']:6.1%} (noise {entry['best']['noise']:.1%})"
        )


@run_app.command("mirror-swap")
def mirror_swap(
    data: Data,
    out: Out,
    model: ModelName = "tiny-llava",
    layers: Layers = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
    split_words: SplitWords = "last",
) -> None:
    """Put activations of the mirrored picture into the control run (Figure 4)."""
    _activation_swap("mirror", locals())


@run_app.command("attribute-swap")
def attribute_swap(
    data: Data,
    out: Out,
    model: ModelName = "tiny-llava",
    layers: Layers = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
    split_words: SplitWords = "last",
) -> None:
    """Put activations of the recoloured picture into the control run (Figure 4)."""
    _activation_swap("attribute", locals())


def _activation_swap(change: Any, values: dict[str, Any]) -> None:
    from jaxid.runs import activation_swap as job
    from jaxid.runs.common import RunConfig

    summary = job.run(RunConfig(**options_of(values)), change)
    print_scores(summary, "0 as for the picture itself, 1 as for the changed one")
    typer.echo(f"{summary['items']} items{skipped_note(summary)}\n{values['out'] / 'summary.json'}")


@run_app.command("steer")
def steer(
    ids: Ids,
    out: Out,
    data: Annotated[Path | None, typer.Option(help="Folder of the relation's data set.")] = None,
    relation: Annotated[str, typer.Option(help="left-right, above-below, near-far or between.")] = "left-right",
    picture: Annotated[Path | None, typer.Option(help="A single picture instead of a data set.")] = None,
    subject: Annotated[str | None, typer.Option(help="Its steered object.")] = None,
    object: Annotated[str | None, typer.Option(help="Its other object.")] = None,
    cells: Annotated[
        str, typer.Option(help="Cells of the single picture's subject and object, column,row:column,row.")
    ] = "0,0:3,0",
    id_layer: Annotated[int | None, typer.Option(help="Block whose IDs are added to the single picture.")] = None,
    model: ModelName = "tiny-llava",
    layers: Layers = None,
    factor: Factor = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
    split_words: SplitWords = "last",
) -> None:
    """Steer subjects to every cell of the grid, or one picture at every block (Figure 6)."""
    from jaxid.runs import steer as job

    options: dict[str, Any] = options_of(locals()) | {"cells": _cells(cells)}
    summary = job.run(job.SteerConfig(**options))
    first, second = summary["words"]
    if picture is not None:
        own, other = summary["subject"], summary["object"]
        typer.echo(
            f"{own['name']} to cell {_cell(own)}, {other['name']} to cell {_cell(other)} (column, row from the upper "
            f"left), by IDs of block {summary['id_layer']} after each block; change of log p"
        )
        for layer, change in zip(summary["layers"], summary["change"], strict=True):
            typer.echo(f"block {layer:3d}   {first} {change[0]:+.2f}   {second} {change[1]:+.2f}")
    else:
        typer.echo(f"change of log p({first}) - log p({second}) by cell, mean of {summary['items']} items")
        for row in (summary["change"][..., 0] - summary["change"][..., 1]).mean(axis=0).T:
            typer.echo("   ".join(f"{value:+6.2f}" for value in row))
    typer.echo(f"{out / 'summary.json'}{skipped_note(summary)}")


@run_app.command("depth")
def depth(
    data: Data,
    ids: Ids,
    out: Out,
    model: ModelName = "tiny-llava",
    layers: Layers = None,
    factor: Factor = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
    split_words: SplitWords = "last",
) -> None:
    """Ask whether height is taken for depth: one steering under two questions (Figure 7)."""
    from jaxid.runs import depth as job
    from jaxid.runs.common import RunConfig

    summary = job.run(RunConfig(**options_of(locals())))
    typer.echo(
        f"{summary['items']} items: steering moves both answers alike with correlation "
        f"{summary['height_depth_correlation']:+.2f}{skipped_note(summary)}\n{out / 'summary.json'}"
    )


def options_of(values: dict[str, Any]) -> dict[str, Any]:
    """The command's options as a config's fields."""
    return {name: value for name, value in values.items() if name != "job" and not isinstance(value, type)}


def print_scores(summary: dict[str, Any], meaning: str) -> None:
    """Prints what the figure of a swap draws: for each token set and word, medians, or the published means."""
    statistic = "mean" if summary["settings"]["compat"] == "reference" else "median"
    typer.echo(f"{statistic} score of {summary['score_items']} items by block: {meaning}")
    for tokens, scores in summary[f"score_{statistic}"].items():
        for word, by_block in zip(summary["words"], scores.T, strict=True):
            typer.echo(
                f"{tokens:6s} {word:7s} {', '.join(f'{round(float(value), 2) + 0.0:.2f}' for value in by_block)}"
            )


def skipped_note(summary: dict[str, Any]) -> str:
    """What a command says of items left out."""
    count = summary.get("skipped", {}).get("count", 0)
    return f"; {count} bad items left out, see the summary" if count else ""


def _cell(entry: dict[str, Any]) -> str:
    return ",".join(map(str, entry["cell"]))


def _cells(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    try:
        (x1, y1), (x2, y2) = (map(int, cell.split(",")) for cell in text.split(":"))
    except ValueError as error:
        raise InputError(f"cells are two places x,y joined by a colon, such as 0,0:3,0; got {text!r}.") from error
    return (x1, y1), (x2, y2)
