"""`jaxid finetune`, `jaxid compare-finetune` and `jaxid zoo`: all that trains vision-language models."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxid.checks import check_seed
from jaxid.errors import InputError


def finetune(
    data: Annotated[Path, typer.Option(help="Fine-tuning set {A}_{ax}-{ay}_{B}_{bx}-{by}.png, or a grid folder.")],
    ids: Annotated[Path, typer.Option(help="The model's spatial IDs, .safetensors or the authors' .pt.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the trained model is written to its `model` folder.")],
    model: Annotated[str, typer.Option(help="Alias, Hugging Face id or folder.")] = "tiny-llava",
    coco: Annotated[Path | None, typer.Option(help="COCO-Spatial folder to evaluate on as well.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 800,
    groups: Annotated[int, typer.Option(min=1, help="Small batches whose gradients a step averages.")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of a small batch.")] = 12,
    id_weight: Annotated[float, typer.Option(min=0, help="Weight of the ID loss; 0 trains on answers alone.")] = 1.0,
    id_layer: Annotated[
        int | None, typer.Option(min=0, help="Decoder block whose activations are compared; 11 of 32 by default.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak.")] = 5e-5,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.01,
    schedule: Annotated[str, typer.Option(help="After the warm-up: linear, cosine or constant.")] = "linear",
    train: Annotated[
        str, typer.Option(help="Kinds of tensors, joined by commas: vision-mlp, projector, lm-mlp, ..., all, random.")
    ] = "vision-mlp,projector",
    vision_blocks: Annotated[int, typer.Option(min=1, help="Last blocks of the tower that may be trained.")] = 6,
    budget: Annotated[float, typer.Option(help="Share of all parameters that may be trained.")] = 0.3,
    held_out: Annotated[float, typer.Option(help="Share of object pairs that training never sees.")] = 0.15,
    recompute: Annotated[
        str,
        typer.Option(help="In the backward pass: nothing, cheap (all but products with weights), or all of a block."),
    ] = "cheap",
    template: Annotated[
        str | None, typer.Option(help="The user's text, with {query}, {first}, {second}, {First}, {Second}.")
    ] = None,
    case: Annotated[str | None, typer.Option(help="Form of the answer that is trained: lower or capital.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16; what is trained is float32 besides.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of held-out pairs and the order of the data.")] = 0,
    questions: Annotated[int, typer.Option(min=1, help="Most questions of an evaluation.")] = 500,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 100,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases to log to.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write events for TensorBoard.")] = False,
) -> None:
    """Fine-tune on grid scenes with a loss on spatial IDs; run again after a kill, it goes on."""
    from jaxid.checkpoints.loading import described, find_folder
    from jaxid.experiments.finetune import FinetuneConfig
    from jaxid.runs import finetune as job
    from jaxid.runs.common import PLAIN, PUBLISHED_SUFFIX
    from jaxid.zoo import SHIPPED

    kind, described_config = described(find_folder(model, weights=False))
    blocks = described_config.text_config.num_hidden_layers
    published = kind.processor.case
    config = FinetuneConfig(
        steps=steps,
        groups=groups,
        batch_size=batch_size,
        id_weight=id_weight,
        id_layer=round(11 * blocks / 32) if id_layer is None else id_layer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        selectors=tuple(part.strip() for part in train.split(",")),
        vision_blocks=vision_blocks,
        budget=budget,
        held_out=held_out,
        recompute=recompute,
        template=template or (PLAIN if model in SHIPPED else "{query}" + PUBLISHED_SUFFIX),
        case=case or ("capital" if published == "capital" and model not in SHIPPED else "lower"),
        seed=seed,
    )
    summary = job.run(
        job.FinetuneRun(
            out=out,
            data=data,
            ids=ids,
            model=model,
            coco=coco,
            questions=questions,
            dtype=dtype,
            save_every=save_every,
            check_every=check_every,
            wandb=wandb,
            tensorboard=tensorboard,
            config=config,
        )
    )
    first, last = summary["evaluations"][0], summary["evaluations"][-1]
    for name, shown in (("held_out", "held-out pairs"), ("coco_spatial", "COCO-Spatial")):
        if name in first:
            typer.echo(f"{shown}: {first[name]:.1%} -> {last[name]:.1%} of {int(last[f'{name}_questions'])} questions")
    typer.echo(f"{summary['trained_parameters']} parameters trained ({summary['trained_share']:.1%})\n{out / 'model'}")


def compare_finetune(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished fine-tuning runs, several seeds of both.")],
    out: Annotated[Path, typer.Option(help="Folder for table and figure.")],
) -> None:
    """Fine-tuning with and without the ID loss side by side, with confidence intervals over seeds."""
    from jaxid.runs import finetune as job

    print_comparison(job.compare(folders, out))
    typer.echo(str(out / "comparison.png"))


def print_comparison(found: dict[str, Any]) -> None:
    """A line for every set and kind of run."""
    for name, entries in found.items():
        for kind, entry in entries.items():
            typer.echo(
                f"{name:13s} {kind:12s} {entry['mean']:+7.1%}   95 % interval {entry['low']:+.1%} to "
                f"{entry['high']:+.1%}   {len(entry['values'])} runs"
            )


zoo_app = typer.Typer(help="The small trained models that ship with jaxid.", no_args_is_help=True)


@zoo_app.command("train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="Which model: tiny-llava, tiny-video, or tiny-clip with its scorers.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the checkpoint is written to its `model` folder.")],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Most steps of every stage, and of every scorer; the recipe's by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=8, help="Pictures or clips per step, in every stage; the recipe's by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of parameters and data.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saves.")] = 100,
) -> None:
    """Train a shipped model from scratch, or go on from the last save after a kill."""
    from jaxid.zoo import RECIPES

    if name not in RECIPES:
        raise InputError(f"{name!r} has no recipe; recipes exist for {', '.join(RECIPES)}.")
    check_seed(seed)
    from jaxid.zoo.sampling import limited

    if name == "tiny-clip":
        from jaxid.zoo import clip_evaluation, clip_training

        folder = clip_training.train_and_export(
            out,
            limited(clip_training.TrainingConfig(seed=seed), steps, batch_size),
            save_every=save_every,
            finish=lambda model: clip_evaluation.train_scorers(out, model, steps=steps),
        )
        typer.echo(f"checkpoint and scorer: {folder}")
        return
    if name == "tiny-video":
        from jaxid.zoo import video_training as training
    else:
        from jaxid.zoo import training
    config: Any = limited(training.TrainingConfig(seed=seed), steps, batch_size)
    typer.echo(f"checkpoint: {training.train_and_export(out, config, save_every=save_every)}")


@zoo_app.command("evaluate")
def zoo_evaluate(
    model: Annotated[
        str, typer.Argument(help="tiny-llava, tiny-video, tiny-clip, or the folder of one trained like them.")
    ] = "tiny-llava",
    count: Annotated[int, typer.Option(min=8, help="Questions of each kind.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 1,
) -> None:
    """Print a model's accuracy on scenes that training never showed."""
    from jaxid.checkpoints.loading import find_folder, load
    from jaxid.io import read_json
    from jaxid.zoo import evaluation, video_evaluation

    check_seed(seed)
    kind_of_model = read_json(find_folder(model, weights=False) / "config.json").get("model_type")
    if kind_of_model == "clip":
        _evaluate_clip(model, count, seed)
        return
    evaluate = video_evaluation.evaluate if kind_of_model == "llava_qwen" else evaluation.evaluate
    for kind, result in evaluate(load(model), count=count, seed=seed).items():
        typer.echo(
            f"{kind:14s} {result.value:7.1%}   95 % interval {result.low:.1%} to {result.high:.1%}   n = {result.count}"
        )


@zoo_app.command("finetune-study")
def zoo_finetune_study(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and comparison.")],
    model: Annotated[str, typer.Option(help="What all runs begin with.")] = "tiny-llava-weak",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds.")] = 3,
    steps: Annotated[int | None, typer.Option(min=1, help="Of every run; the study's by default.")] = None,
    train: Annotated[str | None, typer.Option(help="Kinds of tensors, as in jaxid finetune.")] = None,
) -> None:
    """Fine-tune a weaker tiny-llava with and without the ID loss, over several seeds, and compare."""
    import dataclasses

    from jaxid.runs import finetune_study as job

    config = job.CONFIG if steps is None else dataclasses.replace(job.CONFIG, steps=steps)
    if train is not None:
        config = dataclasses.replace(config, selectors=tuple(part.strip() for part in train.split(",")))
    print_comparison(job.run(out, model=model, seeds=range(seeds), config=config))
    typer.echo(str(out / "comparison" / "comparison.png"))


def _evaluate_clip(model: str, count: int, seed: int) -> None:
    from jaxid.checkpoints.encoders import load_encoder
    from jaxid.dcsm.scoring import Scorer, own_scorer
    from jaxid.zoo import clip_evaluation

    path = own_scorer(model)
    scorer = None if path is None else Scorer.load(path)
    for kind, entry in clip_evaluation.evaluate(load_encoder(model), scorer, count=count, seed=seed).items():
        shown = [
            f"{name} {entry[method]['accuracy']:.1%} ({entry[method]['low']:.1%} to {entry[method]['high']:.1%})"
            for method, name in (("cosine", "pooled cosine"), ("dcsm", "dense maps"))
            if method in entry
        ]
        typer.echo(f"{kind:9s} chance {entry['chance']:.0%}   {'   '.join(shown)}")
