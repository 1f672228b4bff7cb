"""Model cards of the shipped models, in Hugging Face's format, from a template and from what a run recorded."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import io, zoo
from jaxid.data.scenes import COLORS, OBJECTS
from jaxid.errors import CheckpointError, DataError, InputError
from jaxid.train.folder import read_metrics
from jaxid.zoo import llava_texts, tiny_clip, tiny_llava, tiny_video, unknown
from jaxid.zoo.recipes import WEAK_FILE
from jaxid.zoo.records import read_record

CARD_FILE, CURVES_FILE = "README.md", "curves.png"
"""Names of the card and of its figure in a model's folder."""

TEMPLATES = Path(__file__).parent / "cards"
"""Folder of the templates."""

NOT_SHARES = ("step", "stage", "loss", "skipped")
"""Columns of a run's metrics that hold no share of correct answers."""


def write_card(name: str, model: Path, *, run: Path | None = None, gates: Path | None = None) -> Path:
    """Writes the card and the figure of a run's curves into a model's folder.

    Facts that were not recorded are named as such.

    Args:
        name: one of the shipped models.
        model: folder of the checkpoint.
        run: folder of the run that trained it.
        gates: folder with the results of `jaxid zoo gates` (`gates.json`) and `jaxid zoo unknown` (`unknown.json`).

    Returns:
        Path of the card.

    Raises:
        InputError: if the name is unknown, or run or gates belong to another model.
        CheckpointError: if the folder holds no checkpoint.
        DataError: if there are no results in a folder, or they are damaged.
        OutputError: if the record or metrics of the run are damaged, or the card cannot be written.
    """
    if name not in zoo.SHIPPED:
        raise InputError(f"{name!r} has no card; cards exist for {', '.join(zoo.SHIPPED)}.")
    if not (model / "model.safetensors").is_file():
        raise CheckpointError(f"{model} holds no model.safetensors; give the folder of a checkpoint.")
    facts = {} if run is None else _of_run(name, model, run)
    results = {} if gates is None else _of_gates(model, gates)
    tables = [*results.pop("tables", []), *facts.pop("tables", [])]
    rows = facts.pop("metrics", [])
    if rows:
        _draw_curves(name, rows, model / CURVES_FILE)
    return io.write_text(
        model / CARD_FILE,
        _rendered(
            name,
            weights=_weights(model),
            facts=_of_recipe(name),
            current=_words(model) == _vocabulary(name),
            curves=bool(rows),
            tables=tables,
            missing=list(_missing(facts, results, bool(rows), tables)),
            **facts,
            **results,
        ),
    )


def _rendered(name: str, **values: Any) -> str:
    """The card, its template filled in."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    nothing = dict.fromkeys(("settings", "record", "minutes", "seed", "stages", "unknown", "unknown_count", "weak"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,  # Markdown
    )
    text = environment.get_template(f"{name}.md").render(nothing | values | {"name": name})
    lines = [line.rstrip() for line in text.splitlines()]
    # Parts that are left out leave empty lines.
    kept = [line for row, line in enumerate(lines) if line or (row and lines[row - 1])]
    return "\n".join(kept).strip() + "\n"


def _missing(
    facts: Mapping[str, Any], results: Mapping[str, Any], curves: bool, tables: Sequence[str]
) -> Iterator[str]:
    """What a card cannot tell."""
    if not facts.get("settings"):
        yield "the settings of the run"
    if not facts.get("record"):
        yield "the run's date, duration, hardware and versions"
    if not curves:
        yield "the run's curves"
    if not tables and not results.get("unknown"):
        yield "results"


# --- the model -----------------------------------------------------------------------------------------------------


def _weights(model: Path) -> dict[str, Any]:
    """Number, precision and size of the parameters."""
    from safetensors import safe_open

    path = model / "model.safetensors"
    with io.reading(path, "safetensors"), safe_open(path, framework="numpy") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (not a mapping)
        count = sum(math.prod(part.get_shape()) for part in slices)
        kinds = sorted({part.get_dtype() for part in slices})
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return {
        "parameters": f"{count:,}",
        "dtype": " and ".join(str(names.get(kind, kind)) for kind in kinds),
        "megabytes": f"{path.stat().st_size / 1e6:.1f}",
        "words": len(_words(model)),
    }


def _words(model: Path) -> list[str]:
    """The tokens of a word-level tokenizer in the order of their ids."""
    path = model / "tokenizer.json"
    with io.reading(path, "a tokenizer"):
        ids = io.read_json(path)["model"]["vocab"]
        return sorted(ids, key=ids.__getitem__)


def _vocabulary(name: str) -> list[str]:
    recipes: dict[str, Sequence[str]] = {"tiny-video": tiny_video.VOCABULARY, "tiny-clip": tiny_clip.VOCABULARY}
    return list(recipes.get(name, llava_texts.VOCABULARY))


def _of_recipe(name: str) -> dict[str, Any]:
    """What the recipe's code says of its data."""
    names: Sequence[str] = OBJECTS
    pairs, places, size = tiny_llava.held_out_pairs(), tiny_llava.held_out_places(), tiny_llava.IMAGE_SIZE
    if name == "tiny-video":
        pairs, places, size = tiny_video.held_out_pairs(), tiny_video.held_out_times(), tiny_video.IMAGE_SIZE
    elif name == "tiny-clip":
        names = tiny_clip.SHAPES
    return {
        "objects": len(names),
        "names": ", ".join(names),
        "colors": len(COLORS),
        "pairs": int(pairs.sum()) // 2,
        "places": int(places.sum()) // 2,
        "image_size": size,
    }


# --- the run -------------------------------------------------------------------------------------------------------


def _of_run(name: str, model: Path, run: Path) -> dict[str, Any]:
    """What a run's folder tells of the run.

    Raises:
        InputError: if it is no such folder, or its model is another one.
    """
    if not any((run / file).is_file() for file in ("run.json", "accuracy.json")):
        raise InputError(f"{run} is not the folder of a run: it holds neither run.json nor accuracy.json.")
    weak = name == "tiny-llava-weak"
    trained = run / ("model-weak" if weak else "model") / "model.safetensors"
    if trained.is_file() and io.digest(trained) != io.digest(model / "model.safetensors"):
        raise InputError(f"{trained} and {model / 'model.safetensors'} differ: the run trained another model.")
    settings = io.read_json(run / "run.json", DataError, missing={})
    # A scorer of each kind, each in a run of its own; those with other seeds have the same settings.
    scorers = {path.parent.name: io.read_json(path, DataError) for path in sorted(run.glob("scorer-*-0/run.json"))}
    record, rows = read_record(run), read_metrics(run / "metrics.csv")
    shown = settings | scorers
    found: dict[str, Any] = {
        "metrics": rows,
        "stages": _stages(rows),
        "settings": io.to_json(shown) if shown else None,
        "seed": settings.get("seed", "not recorded"),
        "weak": io.read_json(run / WEAK_FILE, DataError, missing={}),
    }
    if record is not None:
        found |= {"record": record, "minutes": round(record["seconds"] / 60)}
    if not weak and (run / "accuracy.json").is_file():
        found["tables"] = list(_accuracy_tables(run / "accuracy.json"))
    return found


def _stages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The stages with their steps and what their last records say."""
    last = {row["stage"]: row for row in rows}
    found, first = [], 1
    for name, row in last.items():
        end = int(row["step"])
        values = {key: f"{row[key]:.3f}" if key in row else "" for key in ("loss", "accuracy")}
        found.append({"name": name, "first": first, "last": end, **values})
        first = end + 1
    return found


def _draw_curves(name: str, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    from jaxid import plots

    def column(key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in rows], float)

    names = dict.fromkeys(key for row in rows for key in row if key not in NOT_SHARES)
    figure = plots.recipe_curves(
        column("step"),
        [str(row["stage"]) for row in rows],
        column("loss"),
        {key: column(key) for key in names},
        about=plots.About(model=name),
    )
    plots.save(figure, path)


def _accuracy_tables(path: Path) -> Iterator[str]:
    """The shares that a run's evaluation found, as tables in Markdown."""
    found = io.read_json(path, DataError)
    with _results(path, "an evaluation"):
        if "tables" not in found:
            rows = [
                (kind.replace("_", " "), _share(row["value"], row["low"], row["high"]), row["count"])
                for kind, row in found.items()
            ]
            yield _markdown(("question", "correct", "questions"), rows)
            return
        for title, table in found["tables"].items():
            methods = [key for key in next(iter(table.values())) if key != "chance"]
            names = ["pooled cosine" if key == "cosine" else f"dense maps, {key.upper()}" for key in methods]
            rows = [
                (
                    kind,
                    f"{row['chance']:.0%}",
                    *(_share(row[key]["accuracy"], row[key]["low"], row[key]["high"]) for key in methods),
                )
                for kind, row in table.items()
            ]
            counts = found["questions"] if title == "held-out" else found["demonstrations"]
            what = f"{counts} questions of each kind" if title == "held-out" else f"{counts} scenes, six captions each"
            yield f"{title[0].upper()}{title[1:]}, {what}:\n\n" + _markdown(("question", "chance", *names), rows)


@contextlib.contextmanager
def _results(path: Path, source: str) -> Iterator[None]:
    """Raises a DataError where parts of a file's value are missing or of another type."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not hold the results of {source}: {io.first_line(error)}.") from error


def _share(value: float, low: float, high: float) -> str:
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


# --- the gates -----------------------------------------------------------------------------------------------------


def _of_gates(model: Path, gates: Path) -> dict[str, Any]:
    """The values of the gates, and the accuracy on unknown pictures.

    Raises:
        InputError: if the folder holds neither, or they were measured on another model.
    """
    paths = gates / "gates.json", gates / "unknown.json"
    if not any(path.is_file() for path in paths):
        raise InputError(
            f"{gates} holds neither gates.json nor unknown.json; run jaxid zoo gates or jaxid zoo unknown."
        )
    _check_model(model, gates)
    found: dict[str, Any] = {}
    if paths[0].is_file():
        measured = io.read_json(paths[0], DataError, expected=list)
        with _results(paths[0], "jaxid zoo gates"):
            found["tables"] = [
                _markdown(("measure", "value", "interval or range", "wanted", ""), list(_gate_rows(measured)))
            ]
    if paths[1].is_file():
        stored = io.read_json(paths[1], DataError)
        with _results(paths[1], "jaxid zoo unknown"):
            found |= {"unknown": "\n".join(unknown.table(stored)), "unknown_count": stored["count"]}
    return found


def _gate_rows(gates: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for gate in gates:
        ends = ((">=", gate["least"]), ("<=", gate["most"]))
        wanted = " and ".join(f"{sign} {end:g}" for sign, end in ends if end is not None)
        mark = "" if not wanted else "passed" if gate["passed"] else "missed"
        low, high = (f"{gate[end]:.3f}" for end in ("low", "high"))
        yield gate["name"], f"{gate['value']:.3f}", f"{low} to {high}", wanted, mark


def _check_model(model: Path, gates: Path) -> None:
    """Raises an InputError if results in the folder name the fingerprint of another model."""
    files = [gates / "unknown.json", *sorted(gates.glob("seed-*/summary.json"))]
    marks = {path: io.read_json(path, DataError).get("fingerprint") for path in files if path.is_file()}
    if not any(marks.values()):
        return
    from jaxid.checkpoints.loading import load

    own = load(str(model)).fingerprint
    for path, mark in marks.items():
        if mark and mark != own:
            raise InputError(f"{path} was measured on another model (fingerprint {mark}) than {model} ({own}).")
