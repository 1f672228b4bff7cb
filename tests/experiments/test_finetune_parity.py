"""Gradients of the whole fine-tuning loss, one step, and the exported folder, beside PyTorch, for every family."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import llava_next_video
import numpy as np
import optax
import torch
from families import EACH, Case, over

from jaxid.checkpoints.export import export
from jaxid.checkpoints.loading import load
from jaxid.checkpoints.tensors import flatten, published_name
from jaxid.experiments.finetune import FinetuneConfig, arrays_of, loss, optimizer
from jaxid.families.registry import family, kind_of
from jaxid.interp.forward import forward
from jaxid.train.trainable import Selection, Trained, choose, for_learning, tensors

ID_LAYER, ID_WEIGHT, RATE = 1, 0.7, 5e-5
CONFIG = FinetuneConfig(learning_rate=RATE, warmup=0.0, schedule="constant", clip_norm=1.0, weight_decay=0.01)

over_cases = over(EACH)


@functools.cache
def batch(case: Case) -> dict[str, Any]:
    """A small batch of the two prompts, whose answers are any two words."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    rng = np.random.default_rng(3)
    return {
        "inputs": arrays_of(fixtures.device_inputs(prompts)),
        "positions": jnp.asarray(prompts.last()[:, None]),
        "labels": jnp.asarray(rng.integers(5, 20, (2, 1)), jnp.int32),
        "word": jnp.asarray(prompts.word("fish")),
        "target": jnp.asarray(rng.standard_normal((2, model.width)), jnp.float32),
        "weight": jnp.ones(2),
    }


def selection(case: Case) -> Selection:
    """Every tensor of the model."""
    model = fixtures.model(case)
    every = tensors(model.parameters, tied=model.config.text_config.tie_word_embeddings)
    return Selection.of(choose(every, ["all"], budget=1.0, vision_blocks=None))


@functools.cache
def gradients(case: Case) -> tuple[Trained, Trained, float]:
    """All tensors, their gradients with recomputed blocks, and the loss."""
    model, chosen = fixtures.model(case), selection(case)
    definition = for_learning(model.definition, model.parameters, chosen, recompute="all")

    def whole(trained: Trained, batch: dict[str, Any]) -> tuple[Any, Any]:
        parameters = chosen.merge(model.parameters, trained)
        return loss(definition, parameters, batch, id_layer=ID_LAYER, id_weight=ID_WEIGHT)

    trained = chosen.split(model.parameters)
    (value, _), found = jax.jit(jax.value_and_grad(whole, has_aux=True))(trained, batch(case))
    return trained, found, float(value)


@functools.cache
def theirs(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
    """PyTorch's gradients and tensors after a step, by published names, and its loss."""
    network = case.reference(fixtures.folder(case))
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    held: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        held.append(output[0] if isinstance(output, tuple) else output)

    handle = network.get_submodule(case.parts["blocks"])[ID_LAYER].register_forward_hook(keep)
    arrays = {name: torch.tensor(np.asarray(value)) for name, value in batch(case).items() if name != "inputs"}
    output = network(**case.arguments(fixtures.prompts(case)), use_cache=False)
    handle.remove()
    rows = torch.arange(2)
    answer = torch.nn.functional.cross_entropy(
        output.logits[rows, arrays["positions"][:, 0].long()], arrays["labels"][:, 0].long()
    )
    word = held[0][rows, arrays["word"].long()]
    near = torch.nn.functional.cosine_similarity(word - word.mean(0), arrays["target"], dim=-1)
    total = answer + ID_WEIGHT * (1 - near.mean())
    total.backward()
    kind = family(*_kind(case))
    names = {name: _published(case, name, kind) for name, _ in network.named_parameters()}
    found = {
        names[name]: (torch.zeros_like(value) if value.grad is None else value.grad).numpy().copy()
        for name, value in network.named_parameters()
    }
    torch.nn.utils.clip_grad_norm_(network.parameters(), CONFIG.clip_norm)
    torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=CONFIG.weight_decay).step()
    after = {names[name]: value.detach().numpy().copy() for name, value in network.named_parameters()}
    return found, after, float(total.detach())


def _kind(case: Case) -> tuple[str, str]:
    return kind_of(json.loads((fixtures.folder(case) / "config.json").read_text())), case.name


def _published(case: Case, name: str, kind: Any) -> str:
    if case.reference is llava_next_video.load:
        return llava_next_video._published(name)
    return published_name(name, kind.renames)


def compared(case: Case, ours: Trained, others: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Every tensor of the checkpoint: its name, our numbers and theirs."""
    model, found = fixtures.model(case), []
    for key in family(*_kind(case)).keys(model.config):
        if key.copy:
            continue
        parameter = np.asarray(ours[key.target])
        for name, row in key.tensors(parameter.shape):
            other = others[name]
            if key.part is not None:
                other = np.split(other, key.part[1])[key.part[0]]
            mine = key.to_checkpoint(parameter if row is None else parameter[row])
            found.append((f"{name} {key.target}", mine.reshape(other.shape), other))
    return found


@over_cases
def test_gradients(case: Case) -> None:
    _, ours, value = gradients(case)
    expected, _, total = theirs(case)
    assert abs(value - total) < 1e-4 * abs(total)
    pairs = compared(case, ours, expected)
    largest = max(float(np.abs(other).max()) for _, _, other in pairs)
    moved = 0
    for name, mine, other in pairs:
        scale = float(np.abs(other).max())
        # What attention adds to all scores of a query alike has no gradient but rounding.
        assert np.abs(mine - other).max() <= 1e-4 * scale + 1e-7 * largest, name
        moved += scale > 1e-6 * largest
    assert moved > 0.6 * len(pairs)


# The step knows no family: it is given gradients by name, and `test_gradients` compares those of all models.
STEPPED = ("gemma3", "mllama", "llava-plain")
# One model of each decoder and tower; `test_finetune_published_step.py` has LLaVA's and Qwen2-VL's beside PyTorch.
FEW = ("gemma3", "internvl", "mllama", "qwen2.5-vl-windows", "onevision-pictures-shrunk")


@over(FEW, among=(*FEW, "mllama-last-cross"))
def test_gradients_of_few(case: Case) -> None:
    """Of the published choice, where the decoder's blocks have none and its last one runs for few tokens."""
    model = fixtures.model(case)
    every = tensors(model.parameters, tied=model.config.text_config.tie_word_embeddings)
    chosen = Selection.of(choose(every, ["vision-mlp", "projector"], budget=1.0, vision_blocks=1))
    definition = for_learning(model.definition, model.parameters, chosen, recompute="cheap")

    def whole(trained: Trained, batch: dict[str, Any]) -> Any:
        parameters = chosen.merge(model.parameters, trained)
        return loss(definition, parameters, batch, id_layer=ID_LAYER, id_weight=ID_WEIGHT)[0]

    found = jax.jit(jax.grad(whole))(chosen.split(model.parameters), batch(case))
    _, expected, _ = gradients(case)
    largest = max(float(np.abs(np.asarray(expected[path])).max()) for path in found)
    for path, rows in chosen.rows:
        other = np.asarray(expected[path])
        other = other if rows is None else other[np.array(rows)]
        np.testing.assert_allclose(found[path], other, rtol=1e-4, atol=1e-5 * largest, err_msg=path)


@over(STEPPED, among=(*STEPPED, "llava-grouped-tied-linear-full-odd"))
def test_one_step(case: Case) -> None:
    trained, found, _ = gradients(case)
    rule = optimizer(CONFIG)

    def stepped(trained: Trained, found: Trained) -> Any:
        updates, _ = rule.update(found, rule.init(trained), trained)
        return optax.apply_updates(trained, updates)

    with jax.numpy_dtype_promotion("standard"):
        moved: Any = jax.jit(stepped)(trained, found)
    slopes, after, _ = theirs(case)
    slope_of = {name: slope for name, _, slope in compared(case, moved, slopes)}
    exact = whole = 0
    for name, mine, other in compared(case, moved, after):
        # Adam's first step is as long for a slope of rounding alone as for any other, and its sign is then chance.
        slope = np.abs(slope_of[name])
        told = slope > 1e-4 * slope.max()
        difference = np.abs(mine - other)
        assert difference[told].max(initial=0) <= 1e-5 and difference.max() <= 2.1 * RATE, name
        exact, whole = exact + told.sum(), whole + told.size
    assert exact > 0.6 * whole


@over_cases
def test_export(case: Case, tmp_path: Path) -> None:
    """A changed model's folder: PyTorch's class computes from it what the changed model does."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    rng = np.random.default_rng(5)
    changed = {
        path: jnp.asarray(np.asarray(leaf) * (1 + 0.1 * rng.standard_normal(leaf.shape)), jnp.float32)
        for path, leaf in flatten(model.parameters).items()
    }
    chosen = selection(case)
    new = dataclasses.replace(model, parameters=chosen.merge(model.parameters, changed))
    folder = export(new, tmp_path / "model")
    ours = np.asarray(forward(new, prompts).logits)
    again = np.asarray(forward(load(folder), prompts).logits)
    np.testing.assert_array_equal(again, ours)
    with torch.no_grad():
        logits = case.reference(folder)(**case.arguments(prompts), use_cache=False).logits.numpy()
    expected = logits[np.arange(2), prompts.last()]
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(ours - np.asarray(forward(model, prompts).logits)).max() > 1e-2 * np.abs(ours).max()
