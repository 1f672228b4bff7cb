"""`jaxid finetune` and `jaxid compare-finetune`."""

from pathlib import Path
from typing import Annotated, Any

import typer


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
    from jaxid.checkpoints.loading import find_folder, parsed, read_config
    from jaxid.experiments.finetune import FinetuneConfig
    from jaxid.models.registry import family, kind_of
    from jaxid.processing.families import SIDES
    from jaxid.runs import finetune as job
    from jaxid.runs.common import PLAIN, PUBLISHED_SUFFIX
    from jaxid.zoo import SHIPPED

    folder = find_folder(model)
    fields = read_config(folder)
    name = kind_of(fields)
    where = str(folder / "config.json")
    blocks = parsed(family(name, where), fields, folder / "config.json").text_config.num_hidden_layers
    published = SIDES[name].case
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
