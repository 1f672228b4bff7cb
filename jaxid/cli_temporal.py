"""`jaxid ids temporal`, `jaxid run temporal-swap` and `jaxid run temporal-steer`."""

from pathlib import Path
from typing import Annotated

import typer

from jaxid.cli_run import (
    BatchSize,
    CaseOption,
    CompatOption,
    Dtype,
    Factor,
    Layers,
    Limit,
    ModelName,
    Out,
    Resume,
    Seed,
    SkipBad,
    SplitWords,
    Template,
    options_of,
    print_scores,
    run_app,
    skipped_note,
)

Manifest = Annotated[Path, typer.Option(help="Folder with manifest.csv (or .json, .jsonl), or the manifest itself.")]


def ids_temporal(
    data: Annotated[Path, typer.Option(help="Folder of clips appear_{A}{i}_{B}{j}.mp4.")],
    out: Annotated[Path, typer.Option(help="The file to write, for example temporal_ids.safetensors.")],
    model: ModelName = "tiny-video",
    batch_size: Annotated[int, typer.Option(min=1, help="Clips per forward pass.")] = 16,
    dtype: Dtype = "float32",
    compat: CompatOption = "none",
    skip_bad: SkipBad = False,
) -> None:
    """Extract temporal IDs from clips in which objects appear (Figure 10 b)."""
    from jaxid.runs import temporal as job

    summary = job.extract(data, out, model=model, batch_size=batch_size, dtype=dtype, compat=compat, skip_bad=skip_bad)
    order = ", ".join(f"{value:.2f}" for value in summary["rank_correlation"])
    typer.echo(
        f"{out}: {summary['clips']} clips, {summary['pairs']} pairs; rank correlation with the frame, by block: {order}"
        f"{skipped_note(summary)}"
    )


@run_app.command("temporal-swap")
def temporal_swap(
    data: Manifest,
    out: Out,
    model: ModelName = "tiny-video",
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
    """Put activations of the clip played backwards into the control run (Figure 10 a)."""
    from jaxid.runs import temporal as job
    from jaxid.runs.common import RunConfig

    summary = job.run_swap(RunConfig(**options_of(locals())))
    print_scores(summary, "0 as for the clip itself, 1 as for the clip played backwards")
    typer.echo(
        f"{summary['items']} items, {summary['accuracy']:.1%} answered rightly{skipped_note(summary)}\n"
        f"{out / 'summary.json'}"
    )


@run_app.command("temporal-steer")
def temporal_steer(
    data: Manifest,
    ids: Annotated[Path, typer.Option(help="The model's temporal IDs, made by jaxid ids temporal.")],
    out: Out,
    model: ModelName = "tiny-video",
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
    """Steer the second scene's words to every frame (Figure 10 c)."""
    from jaxid.runs import temporal as job
    from jaxid.runs.common import RunConfig

    summary = job.run_steering(RunConfig(**options_of(locals())))
    for row, layer in enumerate(summary["layers"]):
        lead = ", ".join(f"{before - after:+.2f}" for before, after in summary["change_mean"][row])
        typer.echo(f"block {layer}: change of log p(before) - log p(after) by frame {lead}")
    typer.echo(f"{summary['items']} items{skipped_note(summary)}\n{out / 'summary.json'}")
