"""`jaxid ids temporal`, `jaxid run temporal-swap` and `temporal-steer`: time in video models (Figure 10)."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import plots
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import check_finite
from jaxid.data.clips import AppearItem, OrderItem, read_appear_folder, read_mvbench
from jaxid.errors import DataError, InputError
from jaxid.experiments import activation_swap, temporal
from jaxid.experiments.activation_swap import TOKEN_SETS
from jaxid.experiments.relations import RelationBatch
from jaxid.families.base import Model
from jaxid.ids.temporal import FRAMES, rank_correlation
from jaxid.io import tidy, write_json
from jaxid.prompts.pictures import Clip
from jaxid.runs.common import Columns, Run, RunConfig, about, filled
from jaxid.runs.spatial_ids import check_extraction, with_bar

PUBLISHED_LAYER, PUBLISHED_BLOCKS = 13, 28
"""Block of the published steering, of the model's 28."""


def extract(
    data: Path,
    out: Path,
    *,
    model: str = "tiny-video",
    batch_size: int = 16,
    dtype: str = "float32",
    compat: str = "none",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Extracts temporal IDs from a folder of clips; writes them, what lies along each block's line, and the figure.

    Args:
        data: folder of `appear_{A}{i}_{B}{j}.mp4`.
        out: the file of IDs; `.json` and `.png` are written beside it.
        model: alias, Hugging Face id or folder.
        batch_size: clips per forward pass.
        dtype: of parameters and activations.
        compat: "reference" reproduces the published code.
        skip_bad: leave clips out that are wrongly named, unreadable or too short, and list them.

    Returns:
        By block: rank correlation with the frame, share of variance, coordinates of frames and words; the best block.

    Raises:
        DataError: for a bad clip, unless those are skipped; or if none is left.
    """
    if compat not in ("none", "reference"):
        raise InputError(f"compat is none or reference, not {compat!r}.")
    check_extraction(out, batch_size)
    bad: list[tuple[str, DataError]] = []
    items = read_appear_folder(data, bad=bad if skip_bad else None)
    misnamed = len(bad)
    checkpoint = open_checkpoint(model, dtype=dtype)
    for item in _readable(items[:1], [] if skip_bad else None, or_none=True):
        question = temporal.QUESTION.format(a=item.object_a, b=item.object_b)
        checkpoint.model.prepare([item.video], question).word(item.object_a)
    loaded = checkpoint.load()
    pairs = list(dict.fromkeys((item.object_a, item.object_b) for item in items))
    clips = _readable(with_bar(items, batch_size, "clip"), bad if skip_bad else None)
    ids = temporal.extract(loaded, clips, pairs=pairs, batch_size=batch_size, compat=compat)
    check_finite(f"the IDs of {model} in {dtype}", np.asarray(ids.values), DataError)
    ids.save(out)
    line, words = ids.line(), temporal.word_coordinates(loaded, ids)
    coordinates = line.coordinates(np.asarray(ids.universal))
    best = int(np.lexsort((line.share, line.order))[-1])
    summary = {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "clips": len(items) - len(bad) + misnamed,
        "pairs": len(pairs),
        "skipped": {"count": len(bad), "items": [{"key": key, "reason": str(error)} for key, error in bad]},
        "frames": list(ids.frames),
        "rank_correlation": line.order,
        "share_of_variance": line.share,
        "coordinates": coordinates,
        "words": words,
        "best_layer": best,
    }
    write_json(out.with_suffix(".json"), summary)
    about = plots.About(
        items=summary["clips"], unit="clips", note="block of the highest rank correlation, of the same clips"
    )
    figure = plots.temporal_line(
        coordinates, np.array(ids.frames), words, line.order, best, title=loaded.name, about=about
    )
    plots.save(figure, out.with_suffix(".png"))
    return summary


def _readable(
    items: Iterable[AppearItem], bad: list[tuple[str, DataError]] | None, *, or_none: bool = False
) -> Iterator[AppearItem]:
    """The items with their clips opened; those that cannot be are noted where they are to be skipped.

    Raises:
        DataError: for the first of them else, and if none is left, unless that is allowed.
    """
    count = 0
    for item in items:
        try:
            clip = item.open()
        except DataError as error:
            if bad is None:
                raise DataError(f"{str(error).rstrip('.')}; --skip-bad leaves such clips out.") from error
            bad.append((item.key, error))
            continue
        count += 1
        yield dataclasses.replace(item, video=clip)
    if not count and not or_none:
        raise DataError(f"no clip could be used: {bad[-1][1] if bad else 'there are none'}")


def _items(job: Run) -> list[OrderItem]:
    return job.sample(read_mvbench(job.data_folder(), bad=job.bad_rows()))


def _begin(job: Run, items: list[OrderItem], settings: dict[str, Any], template: str) -> Model:
    def prepared(item: OrderItem) -> list[RelationBatch]:
        return [temporal.prepare(job.model, [item], clips=[item.open()], template=template, case=job.case).asked]

    return job.begin(items, lambda item: item.key, settings, prepared, items[:1])


def run_swap(config: RunConfig) -> dict[str, Any]:
    """Swaps activations of clips played backwards into the control run; writes parts, table, summary and figure.

    Returns:
        The summary.
    """
    job = Run(config, "temporal-swap")
    layers = job.layers(range(job.model.num_layers))
    template = config.template or "{query}"
    items = _items(job)
    model = _begin(job, items, {"layers": layers, "template": template}, template)
    batch_size = job.batch_size(len(layers))

    def compute(chunk: list[OrderItem]) -> Columns:
        full = filled(chunk, batch_size)
        clips = _opened(full)
        batch = temporal.prepare(model, full, clips=clips, template=template, case=job.case)
        job.checked(batch.asked, [(item.scene1, item.scene2) for item in full], len(chunk))
        backwards = temporal.reversed_prompts(model, batch, clips)
        swap = temporal.run_swap(model, batch, backwards, layers=layers)
        count, found = len(chunk), np.stack(list(swap.scores.values()))
        patched = swap.patched[:, :, :count]
        axes = {
            "tokens": TOKEN_SETS,
            "layer": layers,
            "item": [item.key for item in chunk],
            "word": batch.asked.answers,
        }
        truth = np.array([item.answer for item in chunk])
        return tidy(patched, axes, name="patched") | {
            "model": np.full(patched.size, model.name),
            "answer": np.broadcast_to(truth[:, None], patched.shape).ravel(),
            "control": np.broadcast_to(swap.control[:count], patched.shape).ravel(),
            "intervened": np.broadcast_to(swap.intervened[:count], patched.shape).ravel(),
            "score": (np.nan_to_num(found) if config.compat == "reference" else found)[:, :, :count].ravel(),
        }

    table, summary = job.finish(compute, batch_size=batch_size)
    words = list(temporal.ANSWERS)
    scores = {}
    for tokens in TOKEN_SETS:
        chosen = table["tokens"] == tokens
        layer, word, score = (table[name][chosen] for name in ("layer", "word", "score"))
        scores[tokens] = np.stack(
            [np.stack([score[(layer == k) & (word == w)] for w in words], axis=-1) for k in layers]
        )
    summary |= {
        "layers": layers,
        "words": words,
        "accuracy": _accuracy(table, "control"),
        "accuracy_backwards": 1 - _accuracy(table, "intervened"),
        **activation_swap.statistics(scores),
    }
    figure = plots.swap_scores(
        scores,
        words,
        layers=np.array(layers),
        robust=config.compat != "reference",
        about=about(summary, note="clips played backwards"),
    )
    plots.save(figure, config.out / "temporal_swap.png")
    return job.write_summary(summary)


def _opened(items: list[OrderItem]) -> list[Clip]:
    """Clips of items; a batch that is filled up reads its first one once."""
    opened: dict[str, Clip] = {}
    return [opened.setdefault(item.key, opened.get(item.key) or item.open()) for item in items]


def _accuracy(table: Columns, run: str) -> float:
    """Share of items whose more probable word is the answer to the clip played forwards."""
    first = (table["tokens"] == TOKEN_SETS[0]) & (table["layer"] == table["layer"].min())
    item, word, value, answer = (table[name][first] for name in ("item", "word", run, "answer"))
    right = [
        answer[item == key][0] == word[item == key][int(np.argmax(value[item == key]))] for key in dict.fromkeys(item)
    ]
    return float(np.mean(right))


def run_steering(config: RunConfig) -> dict[str, Any]:
    """Steers the second scene's words to every frame; writes parts, table, summary and figure.

    Returns:
        The summary.

    Raises:
        InputError: if no file of IDs was given.
    """
    job = Run(config, "temporal-steer")
    ids, blocks = job.temporal_ids(), job.model.num_layers
    layers = job.layers([min(blocks - 1, round(PUBLISHED_LAYER * blocks / PUBLISHED_BLOCKS))])
    factor = 5.0 if config.factor is None else config.factor
    template = config.template or "{query}"
    items = _items(job)
    model = _begin(job, items, {"layers": layers, "factor": factor, "template": template}, template)
    batch_size = job.batch_size(len(FRAMES) * len(layers))

    def compute(chunk: list[OrderItem]) -> Columns:
        full = filled(chunk, batch_size)
        batch = temporal.prepare(model, full, clips=_opened(full), template=template, case=job.case)
        job.checked(batch.asked, [(item.scene1, item.scene2) for item in full], len(chunk))
        found = temporal.run_steering(model, batch, ids, layers=layers, multiplier=factor, compat=config.compat)
        count = len(chunk)
        steered, change = found.steered[:, :, :count], found.change[:, :, :count]
        axes = {
            "layer": layers,
            "frame": list(ids.frames),
            "item": [item.key for item in chunk],
            "word": batch.asked.answers,
        }
        return tidy(steered, axes, name="steered") | {
            "model": np.full(steered.size, model.name),
            "control": np.broadcast_to(found.control[:count], steered.shape).ravel(),
            "change": change.ravel(),
        }

    table, summary = job.finish(compute, batch_size=batch_size)
    words = list(temporal.ANSWERS)
    changes = _changes(table, layers, ids.frames)
    means = changes.mean(axis=2)
    summary |= {
        "layers": layers,
        "words": words,
        "frames": list(ids.frames),
        "factor": factor,
        "change_mean": means,
        "change_std": changes.std(axis=2),
        "rank_correlation": _monotone(means[..., 0] - means[..., 1], ids.frames),
    }
    shown = len(layers) // 2
    figure = plots.temporal_steering(
        np.array(ids.frames),
        changes[shown],
        words,
        f"{model.name}, block {layers[shown]}",
        about=about(summary, factor),
    )
    plots.save(figure, config.out / "temporal_steering.png")
    return job.write_summary(summary)


def _changes(table: Columns, layers: list[int], frames: tuple[int, ...]) -> np.ndarray:
    """Changes of log-probability, Float[L, F, B, 2]."""
    found = [
        [
            [
                table["change"][(table["layer"] == k) & (table["frame"] == f) & (table["word"] == word)]
                for word in temporal.ANSWERS
            ]
            for f in frames
        ]
        for k in layers
    ]
    values = np.moveaxis(np.array(found, np.float32), 2, 3)
    if not values.size:
        raise DataError("no item could be used.")
    return values


def _monotone(lead: np.ndarray, frames: tuple[int, ...]) -> list[float]:
    """Spearman's rank correlation of the lead of "before" and the frame, by block."""
    return [rank_correlation(row, np.array(frames)) for row in lead]
