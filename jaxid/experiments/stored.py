"""The experiment that a run folder is of, from its `config.yaml`."""

import importlib
from pathlib import Path
from typing import Any

from jaxid.commands import COMMANDS
from jaxid.errors import InputError, OutputError
from jaxid.experiments.base import Experiment
from jaxid.experiments.reference import with_bugs
from jaxid.options import made_from


def stored_experiment(folder: Path, name: str) -> Experiment[Any, Any, Any]:
    """The experiment of a run folder with its options, and with the published bugs if it had them.

    Args:
        folder: the run's folder.
        name: the experiment's name, as its summary and settings have it.

    Raises:
        OutputError: for an unknown experiment, or a `config.yaml` that does not hold its options.
    """
    target = COMMANDS.get(f"run {name}")
    if target is None:
        raise OutputError(f"{folder} is of an experiment {name!r}, which jaxid does not have.")
    module, attribute = target.split(":")
    try:
        experiment = made_from(getattr(importlib.import_module(module), attribute), folder / "config.yaml")
    except InputError as error:
        raise OutputError(f"{folder} does not hold the options of {name}: {error}") from error
    return with_bugs(experiment) if experiment.reference_bugs else experiment
