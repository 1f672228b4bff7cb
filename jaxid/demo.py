"""The main job from end to end on tiny-llava: IDs found, drawn and proven causal."""

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import check_finite, check_options
from jaxid.data import scenes as drawn
from jaxid.data.grid import CELL_SIZE, GridItem, placements
from jaxid.data.scenes import OBJECTS
from jaxid.errors import DataError
from jaxid.experiments import activation_swap, belief_swap, grid, relations, steering
from jaxid.experiments.relations import ANSWERS, RelationBatch
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.forward import forward
from jaxid.io import ensure_output_folder, tidy, write_json, write_table
from jaxid.kernels import probing
from jaxid.nn.sites import Capture
from jaxid.stats import confidence_interval, mean_interval
from jaxid.zoo import evaluation
from jaxid.zoo import tiny_llava as recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """How much the demo does; the defaults stay under two minutes on two cores."""

    model: str = "tiny-llava"
    accuracy_questions: int = 256  # per kind of question
    partners: int = 2  # objects A that each object B is paired with for the IDs
    swap_items: int = 160  # per relation
    steer_items: int = 32  # per relation
    # Norm of a swap vector over that of the word's activation; 5 as published.
    factors: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 2.0, 5.0)
    multiplier: float = 1.0  # of the steering vectors
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            InputError: for one that is not finite, or a seed that generators do not take.
        """
        check_options(self)


def grid_items(partners: int, seed: int) -> tuple[list[tuple[str, str]], int, Iterator[GridItem]]:
    """All placements of every object beside a few others: pairs, number of pictures, the pictures one by one."""
    rng = np.random.default_rng((331, seed))
    size = len(OBJECTS)
    numbers = [((b + step) % size, b) for b in range(size) for step in rng.permutation(size - 1)[:partners] + 1]
    places = np.array(placements())

    def items() -> Iterator[GridItem]:
        for a, b in numbers:
            count = len(places)
            scenes = drawn.sample_grid(
                rng, np.full(count, a), places[:, 0], np.full(count, b), places[:, 1], jitter_angle=10.0
            )
            for picture, (a_cell, b_cell) in zip(drawn.render(scenes, recipe.IMAGE_SIZE), places, strict=True):
                yield GridItem(
                    picture=picture,
                    object_a=OBJECTS[a],
                    object_b=OBJECTS[b],
                    cell_a=(int(a_cell[0]), int(a_cell[1])),
                    cell_b=(int(b_cell[0]), int(b_cell[1])),
                    size=CELL_SIZE,
                )

    return [(OBJECTS[a], OBJECTS[b]) for a, b in numbers], len(numbers) * len(places), items()


def word_coordinates(model: Model, ids: SpatialIDs, words: list[str]) -> Float[np.ndarray, "L W 2"]:
    """Words without a picture, read at their own token, less their mean, and projected in the ID plane (Figure 5)."""
    prompts = model.prepare(None, words)
    at = jnp.asarray(prompts.word(words))[:, None]
    captured = forward(model, prompts, capture=Capture(("resid_post",), positions=at)).captured["resid_post"]
    activations = np.asarray(captured)[:, :, 0]
    centred = activations - activations.mean(axis=1, keepdims=True)
    return np.asarray(ids.plane_coordinates(jnp.asarray(centred)))


def swap_rates(
    model: Model, ids: SpatialIDs, batches: dict[str, RelationBatch], config: DemoConfig
) -> dict[str, belief_swap.BeliefSwap]:
    """Belief swap of both relations over all layers and factors."""
    layers = range(model.num_layers)
    return {
        axis: belief_swap.run(model, batch, ids, layers=layers, factors=config.factors, seed=config.seed)
        for axis, batch in batches.items()
    }


def choose_best(swaps: dict[str, belief_swap.BeliefSwap], selection: int) -> tuple[int, int]:
    """(layer, factor) indices with the largest lead of belief over noise, on the first `selection` items only."""
    lead = np.mean([_rates(swap.swapped[..., :selection]) for swap in swaps.values()], axis=0)
    layer, factor = np.unravel_index(np.argmax(lead[0] - lead[1]), lead.shape[1:])
    return int(layer), int(factor)


def _rates(swapped: np.ndarray) -> np.ndarray:
    return swapped.mean(axis=-1)


def run(out: Path, config: DemoConfig | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Runs the demo and writes report, summary, tables and figures below `out`.

    Args:
        out: folder for the results; made if need be.
        config: how much to do.
        progress: show progress bars, where there is a terminal.

    Returns:
        The summary that is also written as `summary.json`.

    Raises:
        OutputError: if `out` cannot be written.
        CheckpointError: if the model cannot be loaded.
    """
    from tqdm import tqdm

    ensure_output_folder(out)
    for name in ("results", "figures"):
        ensure_output_folder(out / name)
    # None: bars are drawn on a terminal only.
    hidden = None if progress else True
    # Closed before an error is shown, which therefore starts a line of its own.
    with tqdm(total=6, disable=hidden, bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}]") as stages:
        return _run(out, config or DemoConfig(), stages, hidden)


def _run(out: Path, config: DemoConfig, stages: Any, hidden: bool | None) -> dict[str, Any]:
    from tqdm import tqdm

    from jaxid import plots, report

    started = time.perf_counter()

    def stage(name: str) -> None:
        stages.set_description(name)

    def figure(name: str, make: Callable[[], Any]) -> None:
        plots.save(make(), out / "figures" / f"{name}.png")

    def about(items: int | None, strength: float | None = None, note: str = "", unit: str = "items") -> Any:
        return plots.About(model=model.name, items=items, unit=unit, strength=strength, note=note)

    stage("loading")
    checkpoint = open_checkpoint(config.model)
    for axis in ANSWERS:  # what the questions need, before the weights are read
        sample, _ = evaluation.relation_items(np.random.default_rng(0), 4, axis)
        asked = relations.prepare(checkpoint.model, sample)
        relations.answer_forms(checkpoint.model.processor, asked.answers, asked.case)
    model = checkpoint.load()
    stages.update()

    stage("answers on unseen scenes")
    accuracy = evaluation.evaluate(model, count=config.accuracy_questions, seed=config.seed + 1)
    names = list(accuracy)
    write_table(
        out / "results" / "accuracy.parquet",
        {"model": [model.name] * len(names), "question": names}
        | {field: [getattr(accuracy[name], field) for name in names] for field in ("value", "low", "high", "count")},
    )
    rng = np.random.default_rng((55, config.seed))
    items = {axis: evaluation.relation_items(rng, config.swap_items, axis) for axis in ANSWERS}
    samples = [(*items[axis][0][row : row + 1], items[axis][1][row]) for row in range(6) for axis in ANSWERS]
    pictures = np.stack([picture for _, picture in samples])
    questions = [item.query for item, _ in samples]
    given = evaluation.answers(model, pictures, questions)
    truths = [item.relation for item, _ in samples]
    figure("scenes", lambda: plots.scenes_with_answers(pictures, questions, given, truths, about=about(None)))
    stages.update()

    stage("spatial IDs")
    pairs, total, pictures_to_read = grid_items(config.partners, config.seed)
    bar = tqdm(pictures_to_read, total=total, unit="picture", leave=False, disable=hidden)
    # An iterator, not the bar itself: run-time type checkers peek into what they take for a collection.
    ids = grid.extract(model, iter(bar), pairs=pairs)
    ids.save(out / "results" / "spatial_ids.safetensors")
    probes = probe_ids(ids)
    layers = list(range(model.num_layers))
    write_table(
        out / "results" / "ids_by_layer.parquet",
        {"model": [model.name] * len(layers), "layer": layers} | probes,
    )
    stages.update()

    stage("belief swap")
    batches = {axis: relations.prepare(model, axis_items) for axis, (axis_items, _) in items.items()}
    swaps = swap_rates(model, ids, batches, config)
    for swap in swaps.values():
        check_finite(f"the log-probabilities of {model.name}", swap.steered, DataError)
    selection = config.swap_items // 4
    best_layer, best_factor = choose_best(swaps, selection)
    tables: list[dict[str, np.ndarray]] = [
        tidy(
            swap.steered,
            {
                "condition": list(belief_swap.CONDITIONS),
                "layer": swap.layers.tolist(),
                "factor": swap.factors.tolist(),
                "item": range(len(swap.truth)),
                "word": list(ANSWERS[axis]),
            },
            name="logprob",
        )
        | {
            "relation": np.full(swap.steered.size, axis),
            "control": np.broadcast_to(swap.control, swap.steered.shape).ravel(),
            "truth": np.broadcast_to(np.array(ANSWERS[axis])[swap.truth, None], swap.steered.shape).ravel(),
        }
        for axis, swap in swaps.items()
    ]
    write_table(
        out / "results" / "belief_swap.parquet",
        {name: np.concatenate([t[name] for t in tables]) for name in tables[0]},
    )
    # Layer and factor were chosen on the first quarter of the items: the rates come from the others.
    rates = np.stack([_rates(swap.swapped[..., selection:]) for swap in swaps.values()])
    stages.update()

    stage("steering")
    steer_batches = {
        axis: relations.prepare(model, axis_items[: config.steer_items]) for axis, (axis_items, _) in items.items()
    }
    steered = {
        axis: steering.run(model, batch, ids, layers=layers, multiplier=config.multiplier).change
        for axis, batch in steer_batches.items()
    }
    for axis, change in steered.items():
        check_finite(f"the log-probabilities of {model.name}", change, DataError)
        axes = {
            "layer": layers,
            "x": range(4),
            "y": range(4),
            "item": range(change.shape[3]),
            "word": ANSWERS[axis],
        }
        write_table(out / "results" / f"steering_{axis}.parquet", tidy(change, axes, name="change"))
    stages.update()

    stage("mirror swap")
    mirrored = model.prepare(
        [np.ascontiguousarray(picture[:, ::-1]) for picture in items["horizontal"][1]],
        list(batches["horizontal"].prompts.questions),
    )
    scores = activation_swap.run(model, batches["horizontal"], mirrored).scores
    write_table(
        out / "results" / "mirror_swap.parquet",
        tidy(
            np.stack(list(scores.values())),
            {
                "tokens": list(scores),
                "layer": layers,
                "item": range(config.swap_items),
                "word": ANSWERS["horizontal"],
            },
            name="score",
        ),
    )
    stages.update()

    summary = summarise(
        model, config, accuracy, probes, swaps, rates, steered, scores, best_layer, best_factor, selection
    )
    figure("id_plane", lambda: _id_plane(plots, model, ids, summary, about(240 * config.partners, unit="pictures")))
    figure("variance", lambda: _variance(plots, probes, about(total, unit="pictures")))
    chosen = f"block and factor chosen on {selection} other items of each"
    of_swap = about(config.swap_items - selection, note=chosen, unit="items of each relation")
    figure("belief_swap", lambda: _belief_figure(plots, summary, rates, best_factor, config, of_swap))
    of_steering = about(config.steer_items, config.multiplier)
    figure("steering", lambda: _steering_figure(plots, steered["horizontal"], layers, of_steering))
    figure("steering_map", lambda: _steering_map(plots, steered["horizontal"], best_layer, of_steering))
    figure("mirror_swap", lambda: plots.swap_scores(scores, ANSWERS["horizontal"], robust=True, about=about(None)))
    summary["seconds"] = round(time.perf_counter() - started, 1)
    report.write(out / "report.md", summary)
    write_json(out / "summary.json", summary)
    return summary


def probe_ids(ids: SpatialIDs) -> dict[str, list[float]]:
    """The geometry of the IDs, layer by layer."""
    column, row = probing.row_column_shares(ids.universal)
    correlation = np.asarray(probing.place_correlation(ids.universal))
    numbers = {
        "explained_variance": ids.explained_variance(),
        "id_agreement": ids.agreement(),
        "column_correlation": correlation[:, 0],
        "row_correlation": correlation[:, 1],
        "axes_cosine": probing.axes_cosine(*ids.axes()),
        "row_share": row,
        "column_share": column,
    }
    return {name: [round(float(value), 4) for value in np.asarray(values)] for name, values in numbers.items()}


def summarise(
    model: Model,
    config: DemoConfig,
    accuracy: dict[str, evaluation.Accuracy],
    probes: dict[str, list[float]],
    swaps: dict[str, belief_swap.BeliefSwap],
    rates: Float[np.ndarray, "R C L F"],
    steered: dict[str, Float[np.ndarray, "L X Y B 2"]],
    scores: dict[str, Float[np.ndarray, "L N 2"]],
    best_layer: int,
    best_factor: int,
    selection: int,
) -> dict[str, Any]:
    """All numbers of the report."""
    counted = config.swap_items - selection
    mean = rates.mean(axis=0)

    def rounded(values: Any) -> Any:
        return np.round(np.asarray(values, float), 4).tolist()

    by_relation = {}
    for number, axis in enumerate(swaps):
        by_relation["_".join(ANSWERS[axis])] = {
            condition: {
                "rate": rounded(rates[number, row, :, best_factor]),
                "interval": [
                    rounded(confidence_interval(round(rate * counted), counted))
                    for rate in rates[number, row, :, best_factor]
                ],
            }
            for row, condition in enumerate(belief_swap.CONDITIONS)
        }
    steering_correlation = {}
    for axis, change in steered.items():
        preference = (change[..., 0] - change[..., 1]).mean(axis=-1)
        along = preference.mean(axis=2 if axis == "horizontal" else 1)
        steering_correlation["_".join(ANSWERS[axis])] = {
            "preference_by_cell": rounded(along),
            "correlation": rounded([_correlation(layer) for layer in along]),
            "monotone": [bool((np.diff(layer) < 0).all()) for layer in along],
        }
    mirror = activation_swap.statistics(scores)
    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "accuracy": {name: round(result.value, 4) for name, result in accuracy.items()},
        "accuracy_interval": {name: rounded([result.low, result.high]) for name, result in accuracy.items()},
        **probes,
        "best_layer": best_layer,
        "best_factor": config.factors[best_factor],
        "belief_swap": rounded(mean[0, :, best_factor]),
        "noise_swap": rounded(mean[1, :, best_factor]),
        "swap_by_factor": {
            str(factor): {
                "belief": rounded(mean[0, best_layer, number]),
                "noise": rounded(mean[1, best_layer, number]),
            }
            for number, factor in enumerate(config.factors)
        },
        "swap_by_relation": by_relation,
        "swap_items": {"choosing": selection, "reported": counted, "per": "relation"},
        "control_accuracy": {"_".join(ANSWERS[axis]): rounded(swap.correct.mean()) for axis, swap in swaps.items()},
        "steering": steering_correlation,
        # The mean of the two words' medians over items.
        "mirror_swap": {name: rounded(median.mean(axis=1)) for name, median in mirror["score_median"].items()},
        "mirror_swap_by_word": {name: rounded(median) for name, median in mirror["score_median"].items()},
        "mirror_swap_items": mirror["score_items"],
        "seeds": {"demo": config.seed},
        "versions": versions(),
    }


def _correlation(values: Float[np.ndarray, "4"]) -> float:
    """Correlation with the column's or row's number; 0 where nothing varies, as after the last block."""
    return float(np.corrcoef(np.arange(4), values)[0, 1]) if np.ptp(values) > 1e-6 else 0.0


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jaxid-vlm", "jax", "jaxlib", "flax", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def _id_plane(plots: Any, model: Model, ids: SpatialIDs, summary: dict[str, Any], about: Any) -> Any:
    layer = summary["best_layer"]
    name = "star" if "star" in ids.objects else ids.objects[0]
    coordinates = np.asarray(ids.plane_coordinates(ids.for_object(name)))[layer]
    words = ["left", "right", "above", "below"]
    projected = word_coordinates(model, ids, words)[layer]
    return plots.id_plane(coordinates, dict(zip(words, projected, strict=True)), f"{name}, block {layer}", about=about)


def _variance(plots: Any, probes: dict[str, list[float]], about: Any) -> Any:
    names = ("explained_variance", "row_share", "column_share", "id_agreement")
    return plots.variance_by_layer(*(np.array(probes[name]) for name in names), about=about)


def _belief_figure(
    plots: Any, summary: dict[str, Any], rates: np.ndarray, best_factor: int, config: DemoConfig, about: Any
) -> Any:
    by_relation = summary["swap_by_relation"]
    intervals = [
        np.array([entry[condition]["interval"] for entry in by_relation.values()])
        for condition in belief_swap.CONDITIONS
    ]
    mean = rates.mean(axis=0)[:, summary["best_layer"]]
    return plots.belief_swap_by_layer(
        np.arange(rates.shape[2]),
        rates[:, 0, :, best_factor],
        rates[:, 1, :, best_factor],
        [name.replace("_", "/") for name in by_relation],
        belief_intervals=intervals[0],
        noise_intervals=intervals[1],
        factor=summary["best_factor"],
        factor_layer=summary["best_layer"],
        factors=np.array(config.factors),
        belief_by_factor=mean[0],
        noise_by_factor=mean[1],
        about=about,
    )


def _steering_figure(plots: Any, change: Float[np.ndarray, "L X Y B 2"], layers: list[int], about: Any) -> Any:
    by_item = change.mean(axis=2)
    by_column = by_item.mean(axis=2)
    about = dataclasses.replace(about, note=plots.means_note(mean_interval(by_item, axis=2)))
    return plots.steering_by_column(
        np.array(layers), by_column[..., 0], by_column[..., 1], words=ANSWERS["horizontal"], about=about
    )


def _steering_map(plots: Any, change: Float[np.ndarray, "L X Y B 2"], layer: int, about: Any) -> Any:
    preference = change[layer, ..., 0] - change[layer, ..., 1]
    about = dataclasses.replace(about, note=plots.means_note(mean_interval(preference, axis=2)))
    return plots.steering_map(change.mean(axis=3)[layer], ANSWERS["horizontal"], layer, about=about)
