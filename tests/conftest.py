"""Settings for every test, as environment variables, so that processes which tests start have them too."""

import os

from xla_flags import OLDER_EMITTERS

# JAX reads its variables when it is imported. Eight devices on one machine show whether sharding is right,
# strict promotion that no dtype changes by accident; no compiled program may outlive the code it came from.
# Flags given from outside come last and win.
flags = ["--xla_force_host_platform_device_count=8", OLDER_EMITTERS]
os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", "")]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's, in each of the processes that share the tests

import gc
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import pytest
from benchmark_files import Modules, importable
from jaxtyping import install_import_hook
from torch_users import imports_torch


def pytest_configure(config: pytest.Config) -> None:
    """Checks every annotated shape and dtype at run time; only modules imported from here on are checked.

    The fast suite makes these checks, and slow tests alone run without.
    """
    if config.option.markexpr != "slow":
        install_import_hook("jaxid", "runtime_types.checked")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m "not torch"`, files that import PyTorch are not imported either, so that it need not be installed."""
    without = "not torch" in config.option.markexpr and collection_path.suffix == ".py"
    return True if without and imports_torch(collection_path) else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks all tests of files that import PyTorch."""
    if imports_torch(item.path):
        item.add_marker("torch")


_MOST_MAPPINGS = 30_000
"""Of memory; systems allow a process 65,530, every compiled program takes some, and without any XLA crashes."""


def pytest_collection_finish() -> None:
    """Tracing makes many small objects: looking for garbage among all that was imported takes much time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Drops compiled programs behind a test once there are very many; they are compiled again where needed."""
    start = time.perf_counter()
    result = yield
    mappings, slow = Path("/proc/self/maps"), time.perf_counter() - start > 0.5
    if slow and mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
    return result


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most tests compile many small programs and run each a few times; modules marked `optimized` run theirs long."""
    quick = request.node.get_closest_marker("optimized") is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(quick))  # of processes that are started from now on
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    """Imports files of the benchmarks."""
    with importable() as load:
        yield load
