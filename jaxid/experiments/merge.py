"""Joins the folders of a run's shards into one, as if the run had not been divided."""

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxid import io, parts
from jaxid.errors import DataError, InputError, OutputError
from jaxid.experiments.base import Experiment, Summary, write_config
from jaxid.experiments.session import Session
from jaxid.experiments.stored import stored_experiment


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A shard's folder: what its `settings.json` holds, and its parts."""

    path: Path
    stored: Mapping[str, Any]

    @property
    def shard(self) -> Mapping[str, Any]:
        return self.stored["shard"]

    @property
    def name(self) -> str:
        return f"{self.path} (shard {self.shard['index']}/{self.shard['of']})"

    def files(self) -> list[Path]:
        """The parts' files, in order.

        Raises:
            OutputError: if one is missing.
        """
        sizes = parts.part_sizes(self.stored)
        found = [self.path / "parts" / parts.part_name(index) for index in range(len(sizes))]
        missing = sum(size for path, size in zip(found, sizes, strict=True) if not path.exists())
        if missing:
            raise OutputError(f"{self.name} is not finished: {missing} items are missing; resume it first.")
        return found


def merge(folders: Sequence[Path], out: Path) -> list[str]:
    """Writes the folder that a run would have made that was not divided; no weights are read.

    Args:
        folders: those of all shards, in any order.
        out: folder for the result; a new one.

    Returns:
        The run's report, and the path of its summary.

    Raises:
        InputError: if the shards do not belong together, or are not all there.
        OutputError: if one is damaged or not finished, or the folder exists or cannot be written.
    """
    started = time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists; give --out a new folder.")
    shards = _fitting([_read(folder) for folder in folders])
    stored, chunks, files = shards[0].stored, [], []
    for shard in shards:
        files.extend(shard.files())
        chunks.extend(parts.part_sizes(shard.stored))
    full = next(shard for shard in shards if shard.stored["items"]["count"])
    keys = [key for file in files for key in _keys(file)]
    if parts.summary_of(keys) != stored["shard"]["items"]:
        raise OutputError("the shards' parts do not hold the items of the whole run; run the shards anew.")
    experiment = stored_experiment(full.path, str(full.stored["settings"].get("experiment")))
    experiment = dataclasses.replace(experiment, shard=None, restart=False)
    io.ensure_output_folder(out.parent)
    made = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        io.ensure_output_folder(made / "parts")
        for index, file in enumerate(files):
            shutil.copyfile(file, made / "parts" / parts.part_name(index))
        whole = {name: value for name, value in full.stored.items() if name != "shard"}
        io.write_json(made / "settings.json", {**whole, "items": stored["shard"]["items"], "chunks": chunks})
        here = dataclasses.replace(experiment, out=made, mesh=None, progress=False)
        summary = _summarised(here, full, shards, started)
        write_config(dataclasses.replace(experiment, out=out), made)
        made.replace(out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror}; free some space or choose another place.") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [*experiment.report(summary), str(out / "summary.json")]


def _summarised(
    experiment: Experiment[Any, Any, Any], full: _Folder, shards: Sequence[_Folder], started: float
) -> Summary:
    """Writes the table, the summary and the figures of a folder that holds all parts."""
    session = Session(experiment)
    session.model = dataclasses.replace(session.model, fingerprint=full.stored["settings"]["fingerprint"])
    session.about(experiment.items(session))
    session.settings = session.described()
    table = session.table()
    own = [io.read_json(shard.path / "summary.json", OutputError, missing={}) for shard in shards]
    session.facts |= {
        "words_of_several_tokens": sum(one.get("words_of_several_tokens", 0) for one in own),
        "unknown_words": dict(sum((Counter(one.get("unknown_words", {})) for one in own), Counter())),
    }
    return experiment.finish(session, table, started)


def _read(folder: Path) -> _Folder:
    """A shard's folder.

    Raises:
        InputError: if it is none.
    """
    if not (folder / "settings.json").is_file():
        raise InputError(f"{folder} holds no run; give the --out folders of the shards.")
    stored = parts.read_settings(folder / "settings.json")
    shard = stored.get("shard")
    if shard is None:
        raise InputError(f"{folder} holds a whole run, not a shard of one.")
    try:
        parts.Shard.parse(f"{shard['index']}/{shard['of']}")
        _ = shard["items"]["count"], shard["items"]["digest"], dict(shard["versions"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{folder / 'settings.json'} is damaged; run this shard anew with --restart.") from error
    return _Folder(folder, stored)


def _fitting(folders: Sequence[_Folder]) -> list[_Folder]:
    """The folders in the order of their shards, if these belong together and all are there.

    Raises:
        InputError: if not.
    """
    if not folders:
        raise InputError("give the folders of the shards that are to be joined.")
    first = folders[0]
    for folder in folders[1:]:
        found = [
            io.differences(one, other, "is {} and {}")
            for one, other in (
                ({"number of shards": first.shard["of"]}, {"number of shards": folder.shard["of"]}),
                (first.shard["versions"], folder.shard["versions"]),
                _comparable(first, folder),
                ({"items": first.shard["items"]}, {"items": folder.shard["items"]}),
            )
        ]
        if told := [text for texts in found for text in texts]:
            raise InputError(f"{first.path} and {folder.path} do not belong together: {'; '.join(told)}.")
    count, found = first.shard["of"], {}
    for folder in folders:
        if (index := folder.shard["index"]) in found:
            raise InputError(f"{found[index].path} and {folder.path} are the same shard, {index}/{count}.")
        found[index] = folder
    if missing := [f"{index}/{count}" for index in range(1, count + 1) if index not in found]:
        listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"shards are missing, {len(missing)} of {count}: {listed}.")
    return [found[index] for index in range(1, count + 1)]


def _comparable(*folders: _Folder) -> tuple[dict[str, Any], ...]:
    """The settings that must agree; a shard without items never read the weights, and knows no fingerprint."""
    known = all("fingerprint" in folder.stored["settings"] for folder in folders)
    return tuple(
        {name: value for name, value in folder.stored["settings"].items() if known or name != "fingerprint"}
        for folder in folders
    )


def _keys(file: Path) -> list[str]:
    try:
        return parts.noted(io.read_table(file))["items"]
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise OutputError(f"{file} is damaged; delete it, and resume its shard first.") from error
