"""`jaxid run depth`: does the model take height for depth? (Figure 7)."""

from typing import Any

import numpy as np

from jaxid import plots
from jaxid.data.coco_spatial import SpatialItem
from jaxid.experiments import depth
from jaxid.experiments.relations import RelationBatch
from jaxid.runs.common import PUBLISHED_TEMPLATE, Columns, Run, RunConfig, about, filled, joined
from jaxid.runs.steer import PUBLISHED_LAYERS, mean_change, scaled, steering_rows


def run(config: RunConfig) -> dict[str, Any]:
    """Steers above/below items along the vertical axis under two questions; writes parts, table, summary and figure.

    Returns:
        The summary.
    """
    job = Run(config, "depth")
    ids = job.ids()
    layers = job.layers(scaled(PUBLISHED_LAYERS, job.model.num_layers))
    factor = 5.0 if config.factor is None else config.factor
    template = config.text(PUBLISHED_TEMPLATE)
    items = job.spatial_items("vertical")
    settings = {"layers": layers, "factor": factor, "template": template}

    def batches_of(chunk: list[SpatialItem]) -> dict[str, RelationBatch]:
        return depth.prepare(job.model, chunk, template=template, case=job.case)

    model = job.begin(items, lambda item: item.key, settings, lambda item: [*batches_of([item]).values()], items[:1])
    batch_size = job.batch_size(16 * len(layers))

    def compute(chunk: list[SpatialItem]) -> Columns:
        full = filled(chunk, batch_size)
        batches = batches_of(full)
        job.checked(batches["height"], [(item.subject, item.object) for item in full], len(chunk))
        found = depth.run(model, batches, ids, layers=layers, multiplier=factor, compat=config.compat)
        keys = [item.key for item in chunk]
        tables = []
        for name, result in found._asdict().items():
            rows = steering_rows(result, layers, keys, batches[name].answers, model.name)
            tables.append(rows | {"question": np.full(len(rows["change"]), name)})
        return joined(tables)

    table, summary = job.finish(compute, batch_size=batch_size)
    changes, words, within = {}, {}, {}
    for name in depth.QUESTIONS:
        changes[name], words[name], within[name] = mean_change(table, layers, question=name)
    by_row = {name: change.mean(axis=1) for name, change in changes.items()}  # over columns: Float[L, 4, 2]
    sides = {name: values[..., 0] - values[..., 1] for name, values in by_row.items()}
    agreement = float(np.corrcoef(sides["height"].ravel(), sides["depth"].ravel())[0, 1])
    summary |= {
        "layers": layers,
        "words": words,
        "change": changes,
        "change_interval": within,
        "height_depth_correlation": agreement,
    }
    # The published figure swaps the labels of its two questions.
    shown = (
        {"height": "depth", "depth": "height"}
        if config.compat == "reference"
        else {"height": "height", "depth": "depth"}
    )
    figure = plots.depth_by_row(
        np.array(layers),
        by_row[shown["height"]],
        by_row[shown["depth"]],
        words["height"],
        words["depth"],
        about=about(summary, factor, plots.means_note(list(within.values()))),
    )
    plots.save(figure, config.out / "depth.png")
    return job.write_summary(summary)
