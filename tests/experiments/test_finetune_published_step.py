"""A step of the published fine-tuning beside PyTorch: its texts, loss, gradients and tensors after it."""

import dataclasses
import functools
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from families import CASES, EVERY, Case
from test_finetune import QUICK, ids, items

from jaxid.data.coco_spatial import ANSWERS
from jaxid.experiments import finetune
from jaxid.experiments.finetune_data import Question
from jaxid.experiments.reference_finetune import FinetuneAsPublished
from jaxid.ids.spatial import SpatialIDs
from jaxid.train import loop as training

QWEN = next(case for case in EVERY if case.name == "qwen2-vl")
LAYER, WEIGHT = 1, 0.7
AGAIN = " Where is the fish?"
"""Names the second object once more."""

SETTINGS: dict[str, Any] = dataclasses.asdict(QUICK) | {
    "groups": None,
    "batch_size": 16,
    "steps": 10,
    "learning_rate": 5e-5,
    "warmup": 0.0,
    "schedule": "constant",
    "id_layer": LAYER,
    "train": "vision-mlp,projector",
    "prompt": "{query}" + AGAIN,
    "reference_bugs": True,
}
NAMES = {"up": "mlp.fc1", "down": "mlp.fc2", "projector_in": "linear_1", "projector_out": "linear_2"}


def settings(weight: float) -> dict[str, Any]:
    return {**SETTINGS, "id_weight": weight}


def own_ids(case: Case) -> SpatialIDs:
    loaded = fixtures.model(case)
    values = np.random.default_rng(2).standard_normal((loaded.num_layers, 1, 1, 4, 4, loaded.width))
    return dataclasses.replace(
        ids(), values=values.astype(np.float32), model=loaded.name, fingerprint=loaded.fingerprint
    )


def task_of(case: Case, config: finetune.FinetuneConfig) -> finetune.Task:
    """Of the pairs whose second object is a fish."""
    shown = [item for item in items() if item.object_b == "fish"]
    return finetune.task(fixtures.model(case), shown, own_ids(case), config)


def theirs(case: Case, questions: tuple[Question, ...], weight: float) -> tuple[Any, Any, dict[str, float]]:
    """PyTorch's gradients and tensors after the step, by name, and its losses."""
    loaded, network = fixtures.model(case), case.reference(fixtures.folder(case))
    tokenizer, rows = loaded.processor.tokenizer, []
    for question in questions:
        item = question.item
        text, along = (
            (f"Is the {item.object_a} to the left or right of the {item.object_b}?", 0)
            if question.axis == "horizontal"
            else (f"Is the {item.object_a} above or below the {item.object_b}?", 1)
        )
        answer = ANSWERS[question.axis][int(item.cell_a[along] > item.cell_b[along])]
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text + AGAIN}]}]
        reply = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        texts = [
            tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True),
            tokenizer.apply_chat_template(asked + reply, tokenize=False),
        ]
        rows.append((text + AGAIN, [tokenizer(one)["input_ids"] for one in texts]))
    prompts = loaded.prepare([question.item.picture for question in questions], [text for text, _ in rows])
    arguments = case.arguments(prompts)
    picture = int(np.asarray(prompts.inputs.token_ids)[0, np.asarray(prompts.inputs.image_rows)[0].argmax()])
    many = int((np.asarray(prompts.inputs.image_rows)[0] >= 0).sum())

    def expanded(tokens: list[int]) -> list[int]:
        place = tokens.index(picture)
        return [*tokens[:place], *[picture] * many, *tokens[place + 1 :]]

    pairs = [[expanded(tokens) for tokens in both] for _, both in rows]
    longest = max(len(whole) for _, whole in pairs)
    input_ids, labels = np.zeros((len(rows), longest), int), np.full((len(rows), longest), -100)
    mask = np.zeros_like(input_ids)
    for row, (prefix, whole) in enumerate(pairs):
        input_ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(prefix) : len(whole)] = whole[len(prefix) :]
    arguments |= {"input_ids": torch.tensor(input_ids), "attention_mask": torch.tensor(mask)}
    if "mm_token_type_ids" in arguments:
        arguments["mm_token_type_ids"] = torch.tensor(input_ids == picture).int()

    trained = {
        name: value
        for name, value in network.named_parameters()
        if name.endswith(".weight") and ("multi_modal_projector" in name or ("vis" in name and ".mlp.fc" in name))
    }
    for name, value in network.named_parameters():
        value.requires_grad_(name in trained)
    output = network(**arguments, labels=torch.tensor(labels), output_hidden_states=True, use_cache=False)
    fish = tokenizer.convert_tokens_to_ids("fish")
    last = [int(np.flatnonzero(row == fish)[-1]) for row in input_ids]
    assert all((row == fish).sum() == 2 for row in input_ids)
    held = output.hidden_states[LAYER + 1][torch.arange(len(rows)), torch.tensor(last)]
    cells = [question.item.cell_b for question in questions]
    target = torch.tensor(np.stack([own_ids(case).values[LAYER, 0, 0, x, y] for x, y in cells]))
    identity = 1 - torch.nn.functional.cosine_similarity(held - held.mean(0), target, dim=-1).mean()
    total = output.loss + weight * identity
    total.backward()
    slopes = {name: None if value.grad is None else value.grad.numpy().copy() for name, value in trained.items()}
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    torch.optim.AdamW(trained.values(), lr=5e-5, weight_decay=0.01).step()
    after = {name: value.detach().numpy() for name, value in trained.items()}
    losses = {"loss": total, "answer_loss": output.loss, "id_loss": identity}
    return slopes, after, {name: float(value.detach()) for name, value in losses.items()}


def noted(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimiser whose state begins with the gradients that it was given."""

    def note(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return updates, updates

    return optax.chain(optax.GradientTransformation(lambda params: optax.tree.zeros_like(params), note), rule)


@pytest.mark.parametrize(
    ("case", "weight"),
    [(CASES[0], WEIGHT), (QWEN, WEIGHT), (QWEN, 0.0)],
    ids=["llava-with the ID loss", "qwen2-vl-with the ID loss", "qwen2-vl-answers alone"],
)
def test_a_step(case: Case, weight: float) -> None:
    config = FinetuneAsPublished(**settings(weight))
    task = task_of(case, config)
    stage = task.stage()
    stage = stage._replace(optimizer=noted(stage.optimizer))
    # Of a batch that is padded, if there is one.
    step = next((step for step in range(9) if len(task.config.drawn(task.groups, step)[0]) < 16), 0)
    batch, (questions,) = stage.batch(step), task.config.drawn(task.groups, step)
    assert len({question.axis for question in questions}) == 2
    assert (batch["weight"].sum() == len(questions)) and (weight == 0 or len(questions) == 8)
    slopes, after, losses = theirs(case, questions, weight)
    with jax.numpy_dtype_promotion("standard"):
        start = training._start(stage, task.initial())
        state, metrics = training._step_function(stage)(start, dict(batch), stage.constants)
    found = state["optimizer"].inner_state[0]
    for name, value in losses.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-4), name
    checked, largest = 0, max(float(np.abs(slope).max()) for slope in slopes.values() if slope is not None)
    for path, rows in task.selection.rows:
        part = NAMES[path.removeprefix("tower.layers.").removesuffix(".kernel")]
        for index, row in enumerate((None,) if rows is None else rows):
            own = f"{part}.weight" if row is None else f".{row}.{part}.weight"
            (name,) = (name for name in slopes if name.endswith(own))
            of_row = (lambda leaf: np.asarray(leaf).T) if row is None else (lambda leaf, i=index: np.asarray(leaf)[i].T)
            slope = slopes[name]
            if slope is None:  # of a block that nothing reads
                assert not of_row(found[path]).any()
                continue
            np.testing.assert_allclose(of_row(found[path]), slope, atol=1e-4 * np.abs(slope).max() + 1e-7 * largest)
            told = np.abs(slope) > 1e-3 * np.abs(slope).max()
            difference = np.abs(of_row(state["parameters"][path]) - after[name])
            assert difference[told].max() <= 1e-6 and told.mean() > 0.6, name
            checked += 1
    assert checked == len([slope for slope in slopes.values() if slope is not None])


def test_the_id_loss_elsewhere_is_another() -> None:
    """By default the first occurrence is read, the answer's own tokens are trained, and a batch has one axis."""
    case = CASES[0]
    config = FinetuneAsPublished(**settings(WEIGHT))
    task = task_of(case, config)
    questions = task.config.drawn(task.groups, 0)[0]
    found = []
    for own in (task.config, finetune.FinetuneConfig(**settings(WEIGHT))):
        batch = finetune.small_batch(fixtures.model(case), questions, own_ids(case), own, len(questions))
        arrays = jax.tree.map(jnp.asarray, batch)
        whole = jax.jit(functools.partial(finetune.loss, task.definition, id_layer=LAYER, id_weight=WEIGHT))
        _, metrics = whole(task.model.parameters, arrays)
        found.append(float(metrics["id_loss"]))
    assert abs(found[0] - found[1]) > 1e-3
