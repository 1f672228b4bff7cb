"""`jaxid run mirror-swap` and `attribute-swap`: activations of a changed picture in the control run (Figure 4)."""

import zlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from jaxid import plots
from jaxid.data.coco_spatial import SpatialItem
from jaxid.data.pictures import mirrored, recoloured
from jaxid.experiments import activation_swap
from jaxid.experiments.relations import prepare
from jaxid.io import tidy
from jaxid.prompts.pictures import open_picture
from jaxid.runs.common import PUBLISHED_SUFFIX, Columns, Run, RunConfig, about, filled

PUBLISHED_ITEMS = 100


def run(config: RunConfig, change: Literal["mirror", "attribute"]) -> dict[str, Any]:
    """Swaps activations of changed pictures into left/right items; writes parts, table, summary and figure.

    Args:
        config: the options; 100 items are drawn by default, as published.
        change: "mirror" turns pictures left-right, "attribute" gives them other colours.

    Returns:
        The summary.
    """
    job = Run(config, f"{change}-swap")
    layers = job.layers(range(job.model.num_layers))
    template = config.text("{query}" + PUBLISHED_SUFFIX)
    items = job.spatial_items("horizontal")
    if config.limit is None and len(items) > PUBLISHED_ITEMS:
        chosen = np.random.default_rng(config.seed).choice(len(items), PUBLISHED_ITEMS, replace=False)
        items = [items[row] for row in sorted(chosen)]
    settings = {"layers": layers, "template": template, "change": change}
    model = job.begin_spatial(items, settings, template)
    batch_size = job.batch_size(len(layers))

    def changed(item: SpatialItem) -> np.ndarray:
        picture = np.asarray(open_picture(item.picture))
        if change == "mirror":
            return mirrored(picture)
        return recoloured(picture, np.random.default_rng((config.seed, zlib.crc32(item.key.encode()))))

    def compute(chunk: list[SpatialItem]) -> Columns:
        full = filled(chunk, batch_size)
        batch = prepare(model, full, template=template, case=job.case)
        job.checked(batch, [(item.subject, item.object) for item in full], len(chunk))
        other = model.prepare([changed(item) for item in full], list(batch.prompts.questions))
        swap = activation_swap.run(model, batch, other, layers=layers)
        axes = {
            "tokens": activation_swap.TOKEN_SETS,
            "layer": layers,
            "item": [item.key for item in chunk],
            "word": batch.answers,
        }
        count, found = len(chunk), np.stack(list(swap.scores.values()))
        patched = swap.patched[:, :, :count]
        columns = tidy(patched, axes, name="patched")
        return columns | {
            "model": np.full(patched.size, model.name),
            "control": np.broadcast_to(swap.control[:count], patched.shape).ravel(),
            "intervened": np.broadcast_to(swap.intervened[:count], patched.shape).ravel(),
            "score": (np.nan_to_num(found) if config.compat == "reference" else found)[:, :, :count].ravel(),
        }

    table, summary = job.finish(compute, batch_size=batch_size)
    words = list(dict.fromkeys(table["word"].tolist()))
    scores = {name: _scores(table, name, layers, words) for name in activation_swap.TOKEN_SETS}
    summary |= {
        "layers": layers,
        "words": words,
        **activation_swap.statistics(scores),
        "mean_change_of_answers": float(np.abs(table["control"] - table["intervened"]).mean()),
    }
    figure = plots.swap_scores(
        scores,
        words,
        layers=np.array(layers),
        robust=config.compat != "reference",
        about=about(summary, note=f"{change} swap"),
    )
    plots.save(figure, config.out / f"{change}_swap.png")
    return job.write_summary(summary)


def _scores(table: Columns, tokens: str, layers: Sequence[int], words: Sequence[str]) -> np.ndarray:
    """Scores of a token set, Float[L, B, 2]."""
    chosen = table["tokens"] == tokens
    layer, word, score = (table[name][chosen] for name in ("layer", "word", "score"))
    return np.stack([np.stack([score[(layer == k) & (word == w)] for w in words], axis=-1) for k in layers])
