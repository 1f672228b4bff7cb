"""`jaxid run deviation` and `jaxid run occlusion`: why models err."""

from pathlib import Path
from typing import Annotated

import typer

from jaxid.cli_run import (
    BatchSize,
    CaseOption,
    CompatOption,
    Data,
    Dtype,
    Ids,
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
    run_app,
    skipped_note,
)


@run_app.command("deviation")
def deviation(
    data: Data,
    ids: Ids,
    out: Out,
    model: ModelName = "tiny-llava",
    layer: Annotated[
        int | None, typer.Option(help="Block that is reported; the published one, or one as deep, by default.")
    ] = None,
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
    """Compare where words say objects are with where they are (Figure 8 a); split items into easy and hard."""
    from jaxid.runs import deviation as job

    summary = job.run(job.DeviationConfig(**options_of(locals())))
    tested, halves = summary["mann_whitney"], summary["halves"]
    parts = [f"{summary['items']} items, {summary['accuracy']:.1%} answered rightly; block {summary['layer']}"]
    if tested["auc"] is None:
        parts.append("nothing to compare, as all answers are alike")
    else:
        parts.append(
            f"right before wrong answers AUC {tested['auc']:.2f} (Mann-Whitney U p = {tested['p_two_sided']:.2g})"
        )
    parts += [
        f"{name} half {half['accuracy']:.1%} right" for name, half in halves.items() if half["accuracy"] is not None
    ]
    typer.echo(f"{', '.join(parts)}{skipped_note(summary)}\n{out / 'summary.json'}")


@run_app.command("occlusion")
def occlusion(
    data: Data,
    out: Out,
    model: ModelName = "tiny-llava",
    radius: Annotated[float, typer.Option(help="Of the blur, in pixels; as published by default.")] = 20.0,
    deviation: Annotated[
        Path | None, typer.Option(help="Folder of a deviation run, to compare its margins with.")
    ] = None,
    batch_size: BatchSize = None,
    dtype: Dtype = "float32",
    limit: Limit = None,
    seed: Seed = 0,
    resume: Resume = False,
    skip_bad: SkipBad = False,
    compat: CompatOption = "none",
    template: Template = None,
    case: CaseOption = "both",
) -> None:
    """Blur subjects, and as much elsewhere: how much do answers need them? (Figure 8 b)."""
    from jaxid.runs import occlusion as job

    summary = job.run(job.OcclusionConfig(**options_of(locals())))
    means = (summary[name]["all"]["mean"] for name in ("drop", "random_drop", "sensitivity"))
    drop, elsewhere, sensitivity = (round(mean, 2) + 0.0 for mean in means)  # no "-0.00"
    right = summary["accuracy_by_kind"]
    typer.echo(
        f"{summary['items']} items, {right['original']:.1%} answered rightly, {right['object']:.1%} with the subject "
        f"blurred; log p(correct) falls by {drop:.2f} then, by {elsewhere:.2f} with as much blurred elsewhere; "
        f"sensitivity {sensitivity:+.2f}{skipped_note(summary)}\n{out / 'summary.json'}"
    )
