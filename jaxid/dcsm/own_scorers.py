"""The scorers in an encoder's own folder: a default one, and one of another kind beside it."""

from pathlib import Path

from jaxid.checkpoints.loading import find_folder
from jaxid.dcsm.scoring import KINDS, SCORER_FILE, Scorer
from jaxid.errors import CheckpointError, InputError
from jaxid.families.registry import ALIASES, ENCODERS
from jaxid.io import read_json

KIND_FILE = "scorer-{}.safetensors"
"""Name of a scorer of another kind than the default one's."""


def own_scorer(model: str) -> Path | None:
    """The default scorer in a model's folder, if there is one."""
    path = find_folder(ALIASES.get(model, model)) / SCORER_FILE
    return path if path.is_file() else None


def own_scorers(model: str) -> dict[str, Scorer]:
    """The scorers in a model's folder by kind, the default one first.

    Raises:
        CheckpointError: if one cannot be read.
    """
    folder = find_folder(ALIASES.get(model, model))
    paths = [folder / SCORER_FILE, *(folder / KIND_FILE.format(kind) for kind in KINDS)]
    found: dict[str, Scorer] = {}
    for scorer in (Scorer.load(path) for path in paths if path.is_file()):
        found.setdefault(scorer.kind, scorer)
    return found


def is_kind(given: Path) -> bool:
    """Whether what a user gave for a scorer is a kind, "cnn" or "mlp", and not a file."""
    return str(given) in KINDS and not given.is_file()


def find_scorer(model: str, given: Path | None = None) -> Scorer:
    """A model's default scorer, its own one of a kind, or the scorer in a file.

    Args:
        model: alias, Hugging Face id or folder.
        given: "cnn" or "mlp", for the model's own scorer of that kind; or a file.

    Raises:
        InputError: if the model has no such scorer of its own.
        CheckpointError: if the scorer cannot be read, or the model is of a kind that has none.
    """
    if given is not None and not is_kind(given):
        return Scorer.load(given)
    if given is None:
        path = own_scorer(model)
        if path is not None:
            return Scorer.load(path)
    else:
        own = own_scorers(model)
        if str(given) in own:
            return own[str(given)]
        if own:
            raise InputError(f"{model} has no scorer {str(given)!r} of its own, only {', '.join(own)}; or give a file.")
    folder = find_folder(ALIASES.get(model, model))
    kind = read_json(folder / "config.json", CheckpointError, missing={}).get("model_type")
    if kind is not None and kind not in ENCODERS:
        raise CheckpointError(f"{folder}: model_type {kind!r} is not a CLIP-like model; pass one.")
    raise InputError(f"{model} has no scorer of its own; give --scorer, or train one with `jaxid dcsm train`.")
