"""Runs the notebooks, several at a time, checks what they print, and keeps the outputs for the documentation site.

    python notebooks/run.py                          # all
    python notebooks/run.py quickstart sweeps        # some
    python notebooks/run.py --changed                # those whose code differs from what the cache holds

The outputs go to a Jupyter cache, where myst-nb finds them. A notebook fails if a cell raises an error, if it takes
longer than the limit, or if its output contains a warning, anything written to stderr, or a path of this machine. The
exit code is then 1. The notebooks themselves are never changed.
"""

import argparse
import importlib.metadata
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from nbclient import NotebookClient
from nbclient.exceptions import CellTimeoutError
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "docs" / "_build" / ".jupyter_cache"

_JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])

# The kernels share the cores: each computes in few threads, and programs that one has compiled serve the others too.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONUNBUFFERED": "1",
    # Nearly all of the time goes into compilation, and the older emitters of XLA's CPU compiler are faster at it.
    **({"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if _JAXLIB <= (0, 10) else {}),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # without widgets, tqdm draws its bars as text
}

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_WARNING = re.compile(r"\b\w*Warning\b|\bWARNING\b|^\s*warning:|\bdeprecated\b", re.MULTILINE)
_PATH = re.compile(r"(?<![\w/.:<])/(?:home|root|tmp|usr|var|opt|mnt|work|workspace|Users|private)/[\w.-]+")


class Ran(NamedTuple):
    """A notebook with outputs, its seconds, and what is wrong with it."""

    notebook: NotebookNode
    seconds: float
    faults: list[str]


def read(path: Path) -> NotebookNode:
    """A notebook of the folder."""
    return nbformat.read(path, as_version=4)


def execute(path: Path, limit: float) -> Ran:
    """Runs a notebook in a temporary folder.

    Args:
        path: the notebook.
        limit: seconds that it may take from the start of its kernel to the end of its last cell.
    """
    notebook, started, faults = read(path), time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            startup_timeout=180,
            record_timing=False,  # in the metadata of cells, by which the cache finds notebooks
            timeout_func=lambda _: max(1, int(started + limit - time.monotonic())),
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except CellTimeoutError:
            faults.append(f"was stopped after {limit:g} s, in cell {begun(notebook)}")
        except Exception as error:  # of the notebook, or of its kernel
            faults.append(_ANSI.sub("", str(error)))
    seconds = time.monotonic() - started
    if not faults and seconds > limit:
        faults.append(f"took longer than {limit:g} s")
    return Ran(notebook, seconds, faults or list(output_faults(notebook)))


def begun(notebook: NotebookNode) -> int | None:
    """Index of the last cell that was begun."""
    return max((index for index, cell in enumerate(notebook.cells) if cell.get("execution_count")), default=None)


def texts(output: NotebookNode) -> Iterator[str]:
    """What a reader sees of an output, other than pictures."""
    if output.output_type == "stream":
        yield output.text
    for kind, value in output.get("data", {}).items():
        if kind in ("text/plain", "text/html", "text/markdown"):
            yield value


def output_faults(notebook: NotebookNode) -> Iterator[str]:
    """What a notebook with outputs should not show: stderr, warnings, and paths of the machine."""
    own = [str(place) for place in (HERE.parent, Path.home(), Path(sys.prefix), Path(tempfile.gettempdir()))]
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                yield f"cell {index} writes to stderr: {output.text.strip()[:2000]}"
                continue
            for text in texts(output):
                warning = _WARNING.search(text)
                if warning:
                    line = next(line for line in text.splitlines() if warning.group().strip() in line)
                    yield f"cell {index} prints a warning: {line.strip()[:300]}"
                path = _PATH.search(text)
                found = path.group() if path else next((one for one in own if len(one) > 4 and one in text), None)
                if found:
                    yield f"cell {index} prints a path of this machine: {found}"


def is_cached(cache: JupyterCacheAbstract, path: Path) -> bool:
    """Whether the cache holds outputs of the notebook's present code."""
    try:
        cache.match_cache_notebook(read(path))
    except KeyError:
        return False
    return True


def keep(cache: JupyterCacheAbstract, path: Path, ran: Ran) -> None:
    """Puts outputs where myst-nb looks for them."""
    bundle = CacheBundleIn(ran.notebook, str(path), data={"execution_seconds": ran.seconds})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def chosen(names: Sequence[str]) -> list[Path]:
    """The notebooks of these names, or all of them."""
    known = {path.stem: path for path in sorted(HERE.glob("*.ipynb"))}
    unknown = [name for name in names if Path(name).stem not in known]
    if unknown:
        raise SystemExit(f"no notebook is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[Path(name).stem] for name in names] or list(known.values())


def run(paths: Sequence[Path], cache: JupyterCacheAbstract, *, processes: int, limit: float) -> list[str]:
    """Runs notebooks, prints a line for each, and keeps the outputs of those without faults.

    Returns:
        The names of the others.
    """
    failed = []
    with ThreadPoolExecutor(processes) as pool:
        running = {pool.submit(execute, path, limit): path for path in paths}
        for done in as_completed(running):
            path, ran = running[done], done.result()
            print(f"{path.stem:40} {ran.seconds:6.1f} s{'  FAILED' if ran.faults else ''}", flush=True)
            for fault in ran.faults:
                print("    " + fault.replace("\n", "\n    "), flush=True)
            if ran.faults:
                failed.append(path.stem)
            else:
                keep(cache, path, ran)
    return sorted(failed)


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of notebooks; all by default")
    parser.add_argument("--changed", action="store_true", help="only those whose code is not in the cache")
    parser.add_argument("--processes", type=int, default=2, help="notebooks that run at a time (2)")
    parser.add_argument("--limit", type=float, default=60, help="seconds that a notebook may take (60)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of the cache (docs/_build/.jupyter_cache)")
    options = parser.parse_args()

    options.cache.parent.mkdir(parents=True, exist_ok=True)
    cache = get_cache(options.cache)
    paths = chosen(options.names)
    if options.changed:
        paths = [path for path in paths if not is_cached(cache, path)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compiled-") as compiled:
        for name, value in {**_ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": compiled}.items():
            os.environ.setdefault(name, value)
        failed = run(paths, cache, processes=options.processes, limit=options.limit)
    print(f"{len(paths) - len(failed)} of {len(paths)} notebooks passed in {time.monotonic() - started:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
