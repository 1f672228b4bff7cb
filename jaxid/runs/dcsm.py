"""`jaxid dcsm ...`: training, scoring and evaluation of dense similarity maps, as jobs over files."""

import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import jobs, plots
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import find_folder
from jaxid.checks import check_finite
from jaxid.data.files import save_bytes
from jaxid.dcsm import benchmarks, datasets, evaluate
from jaxid.dcsm import training as scorer_training
from jaxid.dcsm.embedding import embed_images, embed_texts
from jaxid.dcsm.placement import find, place
from jaxid.dcsm.scoring import Scorer, score
from jaxid.dcsm.training import TrainingConfig
from jaxid.errors import CheckpointError, DataError, InputError, OutputError
from jaxid.families.base import Encoder
from jaxid.families.registry import ALIASES, ENCODERS
from jaxid.io import ensure_output_folder, read_json, reading, write_json, write_text
from jaxid.kernels import similarity
from jaxid.prompts.pictures import open_picture
from jaxid.train.trackers import Trackers

SCORER_FILE = "scorer.safetensors"
"""Name of the scorer that lies in a model's folder."""


def own_scorer(model: str) -> Path | None:
    """The scorer in a model's folder, if there is one."""
    path = find_folder(ALIASES.get(model, model)) / SCORER_FILE
    return path if path.is_file() else None


def find_scorer(model: str, path: Path | None) -> Scorer:
    """The scorer at a path, or the one in the model's folder.

    Raises:
        InputError: if there is neither.
        CheckpointError: if the scorer cannot be read, or the model is of a kind that has none.
    """
    found = own_scorer(model) if path is None else path
    if found is None:
        folder = find_folder(ALIASES.get(model, model))
        kind = read_json(folder / "config.json", CheckpointError, missing={}).get("model_type")
        if kind is not None and kind not in ENCODERS:
            raise CheckpointError(f"{folder}: model_type {kind!r} is no CLIP-like model; give one.")
        raise InputError(f"{model} has no scorer of its own; give --scorer, or train one with `jaxid dcsm train`.")
    return Scorer.load(found)


# --- scores of one picture -------------------------------------------------------------------------------------------


def score_picture(
    picture: Path,
    captions: Sequence[str],
    *,
    model: str = "tiny-clip",
    scorer: Path | None = None,
    group: str = "call",
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Scores of one picture with captions; optionally a figure of the maps.

    Returns:
        One row a caption: "caption", "cosine", "score".
    """
    if not captions or not all(caption.strip() for caption in captions):
        raise InputError("the list of captions is empty, or one of them is; give at least one.")
    if group not in similarity.GROUPS:
        raise InputError(f"group {group!r} is not one of {', '.join(similarity.GROUPS)}.")
    if out is not None:
        if out.suffix.lower() != ".png":
            raise OutputError(f"{out} cannot be written: figures are PNG files, so the name must end in .png.")
        ensure_output_folder(out.parent)
    open_picture(picture)
    own = find_scorer(model, scorer)
    encoder = load_encoder(model)
    pictures = embed_images(encoder, [picture])
    texts = embed_texts(encoder, captions, own.map_shape[1])
    scores, cosine = score(own, pictures, texts, group=group)[0], pictures.pooled[0] @ texts.pooled.T
    check_finite("the cosine of picture and captions", cosine)
    rows = [
        {"caption": caption, "cosine": float(near), "score": float(value)}
        for caption, near, value in zip(captions, cosine, scores, strict=True)
    ]
    if out is not None:
        maps = np.einsum("ie,mte->mit", pictures.tokens[0], texts.tokens)
        names = [_token_names(own, texts, row) for row in range(len(captions))]
        over = {"call": "all these captions", "row": "all these captions", "pair": "each map alone"}[group]
        about = plots.About(
            model=model, items=len(captions), unit="captions of one picture", note=f"scores standardised over {over}"
        )
        shown = encoder.processor.shown(picture)
        figure = plots.caption_maps(shown, maps, names, rows, encoder.processor.grid, about=about)
        plots.save(figure, out)
    return rows


def _token_names(scorer: Scorer, texts: Any, row: int) -> list[tuple[int, str, bool]]:
    """Column, words and whether it is functional, of every caption token that stands for characters."""
    captions = texts.captions
    words = place(captions, scorer.vocabulary).words[row]
    found = []
    for column, (start, stop) in enumerate(captions.offsets[row].tolist()):
        if captions.valid[row, column] and stop > start:
            found.append((column, captions.texts[row][start:stop], bool(words[column] >= 0)))
    return found


# --- training --------------------------------------------------------------------------------------------------------


def read_sets(data: Path) -> dict[str, list[datasets.Item]]:
    """The data sets below a folder: `spatial/`, `attributes/`, `sizes/`, `negation.json`, and COCO-Spatial's layout.

    Raises:
        DataError: if there is none, or one is not in its layout.
    """
    found: dict[str, list[datasets.Item]] = {}
    for name, read in (
        ("spatial", datasets.read_spatial),
        ("attributes", datasets.read_attributes),
        ("sizes", datasets.read_attributes),
    ):
        if (data / name).is_dir():
            found[name] = read(data / name)
    if "sizes" in found:  # published as one set
        found["attributes"] = [*found.get("attributes", []), *found.pop("sizes")]
    if (data / "negation.json").is_file():
        found["negation"] = datasets.read_negation(data / "negation.json")
    if (data / datasets.coco_spatial.CAPTIONS_FILE).is_file():
        found["coco"] = datasets.read_coco(data)
    if not found:
        raise DataError(
            f"{data} holds no data set: spatial/, attributes/, sizes/, negation.json or "
            f"{datasets.coco_spatial.CAPTIONS_FILE}."
        )
    return found


def train(
    data: Path,
    out: Path,
    *,
    model: str = "tiny-clip",
    config: TrainingConfig | None = None,
    save_every: int = 100,
    wandb: str | None = None,
    torch_file: Path | None = None,
) -> dict[str, Any]:
    """Trains a scorer on the data sets below a folder; writes it with metrics and their curves.

    Args:
        data: see `read_sets`.
        out: folder of the run.
        model: the encoder.
        config: the run's settings.
        save_every: steps between saves.
        wandb: project of Weights & Biases that metrics go to as well.
        torch_file: also writes the scorer in the authors' layout.

    Returns:
        What `metrics.json` holds.
    """
    config = config or TrainingConfig()
    sets = read_sets(data)
    scorer_training.check_sets(sets, config)
    ensure_output_folder(out)
    if torch_file is not None:
        from jaxid.checkpoints.torch_files import check_torch

        check_torch(f"Writing {torch_file}")
        ensure_output_folder(torch_file.parent)
    encoder = load_encoder(model)
    with Trackers(dataclasses.asdict(config) | {"model": model}, wandb=wandb) as log:
        found = scorer_training.train(out, encoder, sets, config, save_every=save_every, log=log)
    if torch_file is not None:
        from jaxid.checkpoints.scorer_files import write_authors_scorer

        write_authors_scorer(torch_file, found.network, np.asarray(found.vectors))
    metrics = read_json(out / "metrics.json", DataError, expected=list)
    if metrics:
        columns = {name: np.array([row[name] for row in metrics]) for name in ("epoch", "loss", "accuracy")}
        counts = ", ".join(f"{len(items)} {name}" for name, items in sets.items())
        about = plots.About(model=model, items=counts, note=f"seed {config.seed}")
        plots.save(plots.training_curves(**columns, about=about), out / "curves.png")
    return {"rows": metrics, "sets": {name: len(items) for name, items in sets.items()}}


# --- evaluation ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of an evaluation."""

    data: Path  # folder of the benchmarks
    out: Path  # folder for parts, tables and figure
    models: tuple[str, ...] = ("tiny-clip",)  # encoders
    scorers: tuple[Path, ...] = ()  # scorers, each for the encoder that it was trained with
    names: tuple[str, ...] | None = None  # benchmarks; all that the folder holds by default
    rewrite: bool = True  # word captions as published
    group: str = "row"  # what maps are standardised over
    batch_size: int = 64  # questions answered together
    resume: bool = False  # go on with what the folder holds
    skip_bad: bool = False  # leave out rows and pictures that cannot be used


def evaluate_all(config: EvalConfig) -> dict[str, Any]:
    """Pooled cosine and dense maps on every benchmark, for every model; one table (CSV, Markdown, figure).

    Returns:
        The summary, as `summary.json` holds it.

    Raises:
        InputError: for an unknown group, or a scorer that belongs to none of the encoders.
        DataError: if benchmarks cannot be read.
        CheckpointError: if a scorer or an encoder cannot.
    """
    if config.group not in ("row", "pair"):
        raise InputError(f"group {config.group!r} is not one of row, pair.")
    ensure_output_folder(config.out)
    names = None if config.names is None else list(config.names)
    # Captions are worded below: the cosine and the scorer are shown different ones.
    found = benchmarks.read(config.data, names, rewrite=False, skip_bad=config.skip_bad)
    read, bad_rows = found if isinstance(found, tuple) else (found, [])
    asked = [(name, question) for name, questions in read.items() for question in questions]
    # Questions about one picture stand together, so that it is encoded once.
    asked.sort(key=lambda entry: (str(entry[1].picture), str(entry[1].crop), entry[0], entry[1].key))
    chances = {(name, question.key): 1 / len(question.captions) for name, question in asked}
    scorers = _scorers(config)
    summary: dict[str, Any] = {"models": {}, "skipped": [], "unknown_words": {}}
    summary["skipped"] += [{"item": f"{row.file}, row {row.row}", "reason": row.reason} for row in bad_rows]
    for model in config.models:
        encoder = load_encoder(model)
        finished = _run_model(config, encoder, scorers[model], asked)
        columns = finished.table.to_pydict()
        keys = zip(columns["benchmark"], columns["question"], strict=True)
        entry = evaluate.summary(columns | {"chance": [chances[key] for key in keys]})
        summary["models"][model] = entry
        lost = ({word for caption in one.captions for word in encoder.processor.unknown(caption)} for _, one in asked)
        summary["unknown_words"][model] = dict(Counter(word for own in lost for word in sorted(own)))
        summary["skipped"] += [{"item": f"{model}: {bad.key}", "reason": bad.reason} for bad in finished.skipped]
    _write_tables(config.out, summary)
    write_json(config.out / "summary.json", summary)
    return summary


def _scorers(config: EvalConfig) -> dict[str, Scorer | None]:
    """Every encoder's scorer: one that was given, or else the one in its folder."""
    given = {path: Scorer.load(path) for path in config.scorers}
    found: dict[str, Scorer | None] = {}
    for model in config.models:
        # The authors' files do not tell the encoder.
        own = [path for path, scorer in given.items() if scorer.encoder in (model, "")]
        if len(own) > 1:
            raise InputError(f"{own[0]} and {own[1]} are both for {model}; give one of them.")
        path = own[0] if own else own_scorer(model)
        found[model] = None if path is None else given.get(path) or Scorer.load(path)
    for path, scorer in given.items():
        if scorer.encoder not in ("", *config.models):
            raise InputError(f"{path} was trained on {scorer.encoder}, which is none of {', '.join(config.models)}.")
    return found


def _run_model(config: EvalConfig, encoder: Encoder, scorer: Scorer | None, asked: list[Any]) -> jobs.Finished:
    def compute(chunk: list[Any]) -> dict[str, Any]:
        pictures: dict[Any, int] = {}
        shown = [pictures.setdefault((question.picture, question.crop), len(pictures)) for _, question in chunk]
        opened: list[Any] = [None] * len(pictures)
        for number, (_, question) in zip(shown, chunk, strict=True):
            if opened[number] is None:
                opened[number] = benchmarks.load_picture(question)

        def worded(flat: bool) -> list[tuple[str, ...]]:
            if not config.rewrite:
                return [question.captions for _, question in chunk]
            return [
                tuple(benchmarks.published_caption(name, caption, flat=flat) for caption in question.captions)
                for name, question in chunk
            ]

        answers = evaluate.answer(
            encoder, opened, worded(False), scorer, scorer_captions=worded(True), shown=shown, group=config.group
        )
        columns: dict[str, Any] = {
            "model": [encoder.name] * len(chunk),
            "benchmark": [name for name, _ in chunk],
            "question": [question.key for _, question in chunk],
            "cosine": answers.cosine,
        }
        return columns if answers.dcsm is None else columns | {"dcsm": answers.dcsm}

    settings = {
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "scorer": None if scorer is None else _digest(scorer),
        "rewrite": config.rewrite,
        "group": config.group,
    }
    out = config.out / "models" / encoder.name.replace("/", "--")
    finished = jobs.run(
        out,
        settings=settings,
        items=asked,
        key=lambda entry: f"{entry[0]}/{entry[1].key}",
        compute=compute,
        chunk_size=config.batch_size,
        resume=config.resume,
        skip_bad=config.skip_bad,
        unit="question",
    )
    jobs.write_merged(out, finished)
    return finished


def _digest(scorer: Scorer) -> str:
    import hashlib

    import jax

    digest = hashlib.sha256(f"{scorer.vocabulary} {scorer.placement}".encode())
    for leaf in jax.tree.leaves(scorer):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _write_tables(out: Path, summary: Mapping[str, Any]) -> None:
    """`table.csv` and `table.md`: a row for every model and method, a column for every benchmark; and the figure."""
    entries = [
        (model, method, found) for model, methods in summary["models"].items() for method, found in methods.items()
    ]
    columns = list(dict.fromkeys(name for _, _, found in entries for name in found))
    labels = {"cosine": "pooled cosine", "dcsm": "dense maps"}
    chance = {name: found[name]["chance"] for _, _, found in entries for name in found}
    told = ("accuracy", "low", "high", "questions", "chance")
    cells = [[model, labels[method]] for model, method, _ in entries]
    lines = [list(row) for row in cells]
    for row, line, (_, _, found) in zip(cells, lines, entries, strict=True):
        for name in columns:
            own = found.get(name)
            row.append(
                "{accuracy:.4f} ({low:.3f} to {high:.3f}, n = {questions})".format(**own) if own is not None else ""
            )
            line += ["" if own is None else f"{own[part]:.6g}" for part in told]
    buffer = io.StringIO()
    head = ["model", "method", *(name if part == "accuracy" else f"{name} {part}" for name in columns for part in told)]
    csv.writer(buffer, lineterminator="\n").writerows([head, *lines])
    save_bytes(out / "table.csv", buffer.getvalue().encode())
    head = ["model", "method", *columns]
    text = "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *cells])
    guesses = ", ".join(f"{name} {chance[name]:.3g}" for name in columns)
    write_text(
        out / "table.md", f"{text}\nShares of right answers, 95 % Wilson intervals, n questions. Chance: {guesses}.\n"
    )
    accuracy, low, high = (
        np.array([[found.get(name, {}).get(part, np.nan) for name in columns] for _, _, found in entries])
        for part in ("accuracy", "low", "high")
    )
    names = [f"{model}, {labels[method]}" for model, method, _ in entries]
    about = plots.About(model=", ".join(summary["models"]))
    figure = plots.benchmark_bars(
        names,
        [
            f"{name}\nn = {max(found[name]['questions'] for _, _, found in entries if name in found)}"
            for name in columns
        ],
        accuracy,
        np.stack([low, high], axis=1),
        chance=[chance[name] for name in columns],
        about=about,
    )
    plots.save(figure, out / "table.png")


# --- words -----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that hold something.

    Raises:
        DataError: if it cannot be read or holds none.
    """
    with reading(path, "lines of text", DataError):
        text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no lines.")
    return lines


def read_words(path: Path) -> tuple[str, ...]:
    """Functional words of a text file, one a line, in lower case.

    Raises:
        DataError: if it cannot be read or holds none.
    """
    return tuple(dict.fromkeys(line.lower() for line in read_lines(path)))


def marked(captions: Sequence[str], vocabulary: Sequence[str]) -> list[str]:
    """Captions with their functional words <LIKE THIS>."""
    found = []
    for caption in captions:
        for _, start, stop in reversed(find(caption, vocabulary)):
            caption = f"{caption[:start]}<{caption[start:stop].upper()}>{caption[stop:]}"
        found.append(caption)
    return found
