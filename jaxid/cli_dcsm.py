"""`jaxid dcsm ...`: dense similarity maps of CLIP-like models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxid.checks import check_seed
from jaxid.errors import InputError

dcsm_app = typer.Typer(help="Dense similarity maps of CLIP-like models.", no_args_is_help=True)

ModelName = Annotated[str, typer.Option("--model", help="Alias, Hugging Face id, folder, or OpenCLIP file.")]
Out = Annotated[Path, typer.Option(help="Folder for what is written.")]
ScorerFile = Annotated[
    Path | None,
    typer.Option("--scorer", help="A scorer, .safetensors or the authors' .pt; the model's own by default."),
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


@dcsm_app.command("score")
def score(
    picture: Annotated[Path, typer.Argument(help="The picture.")],
    captions: Annotated[list[str] | None, typer.Argument(help="Captions.")] = None,
    model: ModelName = "tiny-clip",
    scorer: ScorerFile = None,
    group: Annotated[
        str, typer.Option(help="What maps are standardised over: call (all captions, as published) or pair.")
    ] = "call",
    out: Annotated[Path | None, typer.Option(help="Figure of the maps, .png.")] = None,
) -> None:
    """Score captions of a picture by their dense maps, beside the pooled cosine."""
    from jaxid.runs import dcsm as job

    if not captions:
        raise InputError("the list of captions is empty; give at least one.")
    rows = job.score_picture(picture, captions, model=model, scorer=scorer, group=group, out=out)
    best = max(range(len(rows)), key=lambda row: rows[row]["score"])
    width = max(len(caption) for caption in captions)
    typer.echo(f"{'caption':{width}s}    score   cosine")
    for number, row in enumerate(rows):
        mark = "  <-" if number == best else ""
        typer.echo(f"{row['caption']:{width}s}  {row['score']:+7.3f}  {row['cosine']:7.3f}{mark}")


@dcsm_app.command("data")
def data(
    out: Out,
    count: Annotated[int, typer.Option(min=8, help="Items of each data set.")] = 200,
    seed: Seed = 0,
) -> None:
    """Draw the three training sets and an evaluation set (WhatsUp's, NCD's and COCO-Spatial's layouts)."""
    from jaxid.zoo import tiny_dcsm

    check_seed(seed)
    tiny_dcsm.write(out, seed, count)
    typer.echo(str(out))


@dcsm_app.command("train")
def train(
    data: Annotated[Path, typer.Option(help="Folder with spatial/, attributes/, negation.json, or COCO-Spatial.")],
    out: Out,
    model: ModelName = "tiny-clip",
    kind: Annotated[str, typer.Option(help="cnn or mlp.")] = "cnn",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the largest data set.")] = 26,
    batch_size: Annotated[int, typer.Option(min=2, help="Items of each data set per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of Adam; published are 1e-3, 1e-4 and 1e-5.")] = 1e-3,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Behind the CNN's hidden layers.")] = 0.5,
    augment: Annotated[bool, typer.Option(help="Change pictures anew at every step, or encode them once.")] = True,
    learn_vectors: Annotated[bool, typer.Option("--learn-vectors", help="Train the functional vectors too.")] = False,
    words: Annotated[
        Path | None, typer.Option(help="Functional words, one a line; the published ones by default.")
    ] = None,
    placement: Annotated[str, typer.Option(help="token, or as published: replace or insert.")] = "token",
    seed: Seed = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 100,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases to log to.")] = None,
    torch_file: Annotated[Path | None, typer.Option(help="Also write the scorer in the authors' layout, .pt.")] = None,
) -> None:
    """Train a scorer over a frozen encoder; run again after a kill, it goes on."""
    from jaxid.dcsm.placement import PUBLISHED
    from jaxid.dcsm.training import TrainingConfig
    from jaxid.runs import dcsm as job

    config = TrainingConfig(
        kind=kind,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        augment=augment,
        learn_vectors=learn_vectors,
        vocabulary=PUBLISHED if words is None else job.read_words(words),
        placement=placement,
        seed=seed,
    )
    found = job.train(data, out, model=model, config=config, save_every=save_every, wandb=wandb, torch_file=torch_file)
    last = f", loss {found['rows'][-1]['loss']:.3f}" if found["rows"] else ""
    typer.echo(f"{sum(found['sets'].values())} items of {', '.join(found['sets'])}{last}\n{out / job.SCORER_FILE}")


@dcsm_app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Option(help="Folder of the benchmarks, in their published layouts.")],
    out: Out,
    model: Annotated[list[str] | None, typer.Option(help="Encoders; tiny-clip by default.")] = None,
    scorer: Annotated[list[Path] | None, typer.Option(help="Scorers, each used for the encoder it belongs to.")] = None,
    benchmark: Annotated[list[str] | None, typer.Option(help="Names; all that the folder holds by default.")] = None,
    rewrite: Annotated[bool, typer.Option(help="Word captions as the published evaluation does.")] = True,
    group: Annotated[str, typer.Option(help="What maps are standardised over: row (as published) or pair.")] = "row",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 64,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be used, and list it.")] = False,
) -> None:
    """Compare pooled cosine and dense maps on the published benchmarks."""
    from jaxid.runs import dcsm as job

    config = job.EvalConfig(
        data=data,
        out=out,
        models=tuple(model or ["tiny-clip"]),
        scorers=tuple(scorer or []),
        names=None if benchmark is None else tuple(benchmark),
        rewrite=rewrite,
        group=group,
        batch_size=batch_size,
        resume=resume,
        skip_bad=skip_bad,
    )
    summary = job.evaluate_all(config)
    typer.echo((out / "table.md").read_text().rstrip())
    if summary["skipped"]:
        typer.echo(f"{len(summary['skipped'])} left out; see {out / 'summary.json'}")


@dcsm_app.command("geometry")
def geometry(
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of every set of conditions.")] = 16,
    dimension: Annotated[int, typer.Option(min=2, help="Coordinates of the vectors.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Of each search.")] = 600,
    seed: Seed = 0,
) -> None:
    """Which conditions one vector a picture and one a caption can meet together: a table and a figure."""
    import jax
    import numpy as np

    from jaxid import plots
    from jaxid.dcsm import geometry as study
    from jaxid.io import ensure_output_folder, write_table

    check_seed(seed)
    ensure_output_folder(out)
    rows = study.study(jax.random.key(seed), seeds=seeds, dimension=dimension, steps=steps)
    write_table(out / "geometry.parquet", rows)
    columns = [np.asarray(rows[name]) for name in ("law", "conditions", "margin")]
    about = plots.About(items=seeds, unit="searches of each set", note=f"{dimension} coordinates, seed {seed}")
    figure = plots.attainable_margins(*columns, resolution=study.RESOLUTION, about=about)
    plots.save(figure, out / "geometry.png")
    for law in study.LAWS:
        chosen = columns[0] == law
        best = {name: columns[2][chosen & (columns[1] == name)].max() for name in dict.fromkeys(columns[1].tolist())}
        met = [name for name, margin in best.items() if margin > study.RESOLUTION]
        typer.echo(f"{law}: {len(met)} of {len(best)} sets can be met: {'; '.join(met)}")
    typer.echo(str(out / "geometry.png"))


@dcsm_app.command("words")
def words(
    captions: Annotated[Path, typer.Argument(help="Captions, one a line.")],
    out: Out,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint; without it, rules tell functional words.")
    ] = None,
    llm: Annotated[str, typer.Option(help="The language model's name there.")] = "gpt-4o-mini",
    key_variable: Annotated[
        str, typer.Option(help="Environment variable of the key; empty for none.")
    ] = "OPENAI_API_KEY",
    keep: Annotated[bool, typer.Option(help="Begin with the published functional words.")] = True,
) -> None:
    """Find functional words in captions; `jaxid dcsm train --words` takes the list."""
    from tqdm import tqdm

    from jaxid.dcsm import functional_words as found_words
    from jaxid.dcsm.placement import PUBLISHED
    from jaxid.io import write_text
    from jaxid.runs import dcsm as job

    lines = job.read_lines(captions)
    known = PUBLISHED if keep else ()
    if base_url is None:
        found = found_words.by_rules(lines, known)
    else:
        ask = found_words.Endpoint(base_url, llm, out / "answers", key_variable=key_variable or None)
        with tqdm(total=len(lines), unit="caption", disable=None) as bar:
            found = found_words.by_model(lines, ask, known, progress=lambda done: _show(bar, done))
    write_text(out / "words.txt", "\n".join(found.vocabulary) + "\n")
    write_text(out / "captions.txt", "\n".join(found.captions) + "\n")
    write_text(out / "marked.txt", "\n".join(job.marked(found.captions, found.vocabulary)) + "\n")
    typer.echo(f"{len(found.vocabulary)} functional words: {', '.join(found.vocabulary)}\n{out / 'words.txt'}")


def _show(bar: Any, done: int) -> None:
    """Moves a progress bar to a number."""
    bar.update(done - bar.n)
