"""Shared by tests: the tiny models on disk, loaded by jaxid and by PyTorch, and PyTorch's values at every site.

Everything is made once per test run, on first use.
"""

import functools
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from families import Case
from numpy.typing import ArrayLike
from torch_users import WITHOUT_TORCH

from jaxid.checkpoints.loading import load
from jaxid.families.base import Model
from jaxid.interp.trace import Trace, trace
from jaxid.prompts.pictures import Clip
from jaxid.prompts.processor import Inputs, Prompts

SCRATCH = tempfile.TemporaryDirectory(prefix="jaxid-tests-")
"""Removed when the test run ends."""

QUESTIONS = ("Is the star to the left or right of the fish?", "Where is the fish?")

TorchEdit = tuple[str, int, Callable[[torch.Tensor], torch.Tensor]]
"""Site, layer, and the change of the value there."""


def pictures() -> list[np.ndarray]:
    """Two pictures of different sizes and aspect ratios, no two rows, columns or channels alike."""
    rng = np.random.default_rng(7)
    made = []
    for height, width in ((48, 40), (30, 70)):
        slope = np.linspace(0, 160, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
        made.append((slope * [1.0, 0.6, 0.3] + rng.integers(0, 35, (height, width, 3))).astype(np.uint8))
    return made


@functools.cache
def folder(case: Case) -> Path:
    """The checkpoint folder of a tiny model, as `save_pretrained` writes it."""
    path = Path(SCRATCH.name) / case.name
    case.build().save_pretrained(path)
    case.describe(path)
    return path


@functools.cache
def model(case: Case, dtype: str = "float32") -> Model:
    """The tiny model through jaxid's loader."""
    return load(folder(case), dtype=dtype)


@functools.cache
def prompts(case: Case) -> Prompts:
    """Two prompts of unequal length, each with a picture."""
    return model(case).prepare(shown(case), QUESTIONS)


def shown(case: Case) -> list[np.ndarray] | list[Clip]:
    """Two pictures, or for a family that reads clips, two clips of them."""
    first, second = pictures()
    if not case.clips:
        return [first, second]
    return [Clip([first, second, first[::-1]]), Clip([second, second[:, ::-1], first[:30, :40]])]


@functools.cache
def recorded(case: Case) -> Trace:
    """The clean pass over `prompts`."""
    return trace(model(case), prompts(case))


@functools.cache
def reference(case: Case) -> Any:
    """The tiny model through Hugging Face's loader."""
    return case.reference(folder(case))


@functools.cache
def clean_record(case: Case) -> dict[str, np.ndarray]:
    """PyTorch's values at all sites on `prompts`."""
    return record(case, prompts(case))


def record(case: Case, batch: Prompts, edits: Sequence[TorchEdit] = ()) -> dict[str, np.ndarray]:
    """Runs the PyTorch model and records every site.

    Args:
        case: the model.
        batch: the prompts.
        edits: changes of values during the pass, between blocks and at the sites of `case.sites` except "resid_mid",
            which hooks cannot change.

    Returns:
        By name: "tower" Float[L1, N, I, D], "projector", "embed" Float[B, T, D], the block sites
        Float[L, B, T, D], "norm" Float[B, T, D] and "logits" Float[B, T, V].
    """
    network = reference(case)
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []

    def visit(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        for edited_site, edited_layer, change in edits:
            if (site, layer) == (edited_site, edited_layer):
                value = change(value)
        found[site, layer] = value
        return value

    def before(module: torch.nn.Module, site: str, layer: int) -> None:
        def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (visit(site, layer, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": visit(site, layer, kwargs["hidden_states"])}

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(module: torch.nn.Module, site: str, layer: int) -> None:
        def hook(_: torch.nn.Module, __: object, output: Any) -> object:
            if isinstance(output, tuple):
                return visit(site, layer, output[0]), *output[1:]
            return visit(site, layer, output)

        handles.append(module.register_forward_hook(hook))

    part = {name: network.get_submodule(path) for name, path in case.parts.items() if name != "tower_blocks"}
    towers = [network.get_submodule(path) for path in case.parts["tower_blocks"].split(",")]
    pictured = batch.inputs.pixels is not None
    if pictured:
        before(towers[0][0], "tower", 0)
        for layer, block in enumerate(itertools.chain.from_iterable(towers)):
            after(block, "tower", layer + 1)
        after(part["projector"], "projector", 0)
    before(part["blocks"][0], "embed", -1)
    for layer, block in enumerate(part["blocks"]):
        before(block, "resid_pre", layer)
        for site, path in case.sites.items():
            (before if site == "resid_mid" else after)(block.get_submodule(path), site, layer)
        after(block, "resid_post", layer)
    after(part["norm"], "norm", 0)
    try:
        with torch.no_grad():
            output = network(**case.arguments(batch), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    names = {site for site, _ in found}
    order = sorted(found.items(), key=lambda item: item[0])
    values = {name: torch.stack([value for (site, _), value in order if site == name]) for name in names}
    if "attn_out" not in case.sites:
        values["attn_out"] = values["resid_mid"] - values["resid_pre"]
    if "mlp_out" not in case.sites:
        values["mlp_out"] = values["resid_post"] - values["resid_mid"]
    single = {name: values[name][0] for name in ("projector", "embed", "norm") if name in values}
    return {name: value.numpy() for name, value in {**values, **single, "logits": output.logits}.items()}


def carried(output: Any) -> dict[str, Any]:
    """Keys and values from a pass of Hugging Face's class for the next one, by the name of the argument.

    transformers 5.24 renamed the argument.
    """
    return {name: output[name] for name in ("past_key_values", "cache") if name in output.keys()}  # noqa: SIM118


def device_inputs(batch: Prompts) -> Inputs:
    """The arrays of prompts on the device."""
    return jax.tree.map(jnp.asarray, batch.inputs)


def distance(ours: ArrayLike, theirs: ArrayLike, rows: np.ndarray | None = None) -> float:
    """Largest difference relative to the largest reference value, optionally only at the positions `rows` [B, T]."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    if rows is not None:
        ours, theirs = ours[..., rows, :], theirs[..., rows, :]
    assert np.isfinite(theirs).all() and np.abs(theirs).max() > 1e-2
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def prepared_without_torch(model_folder: Path, picture: np.ndarray, question: str, made: Path) -> dict[str, np.ndarray]:
    """Token ids and pixels of a prompt, made by a process without PyTorch.

    Args:
        model_folder: folder of the checkpoint.
        picture: the picture.
        question: the user's text.
        made: a new `.npz` file for the results.
    """
    np.save(made.with_suffix(".npy"), picture)
    code = f"""{WITHOUT_TORCH}
import numpy as np
from jaxid.checkpoints.loading import load
inputs = load(sys.argv[1]).prepare(np.load(sys.argv[2]), sys.argv[3]).inputs
assert not {{"torch", "torchvision"}} & set(sys.modules)
np.savez(sys.argv[4], pixels=inputs.pixels, ids=inputs.token_ids)
"""
    files = (str(model_folder), str(made.with_suffix(".npy")), question, str(made))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *files], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(np.load(made))
