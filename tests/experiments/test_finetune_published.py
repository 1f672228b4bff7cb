"""The published fine-tuning (`--reference-bugs`) beside oracles written from its description, and ours beside it.

Batches, prompts, labels, learning rates, tensors, held-out pairs and written answers; `test_finetune_published_step.py`
takes a step.
"""

import copy
import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
import torch
import transformers
from families import CASES, EVERY, VOCABULARY
from test_finetune import QUICK, command, ids, items, model, write_data
from test_finetune_refused import refused

from jaxid.cli import main
from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.errors import InputError, PromptError
from jaxid.experiments import finetune
from jaxid.experiments.finetune import FinetuneConfig
from jaxid.experiments.finetune_data import Question, questions_of, text_of
from jaxid.experiments.reference_finetune import FinetuneAsPublished, by_writing, first_written, reply_tokens
from jaxid.experiments.relations import prepare_questions
from jaxid.families.base import Model
from jaxid.prompts.processor import Processor

QWEN = next(case for case in EVERY if case.name == "qwen2-vl")
LLAVA = CASES[0]
BUGS = FinetuneAsPublished(**{field.name: getattr(QUICK, field.name) for field in dataclasses.fields(QUICK)})

QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] "
    "}}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in "
    "message['content'] %}{% if content['type'] == 'image' %}{% set image_count.value = image_count.value + 1 %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor "
    "%}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As in Qwen2-VL-2B-Instruct, without its counting of pictures and its videos."""


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "published", "plain"),
    [
        (
            "left",
            'Is hot dog to the left or right of the cat? Answer with "left" or "right" only.',
            "Is the hot dog to the left or right of the the cat?",
        ),
        (
            "below",
            'Is hot dog above or below the cat? Answer with "above" or "below" only.',
            "Is the hot dog above or below the the cat?",
        ),
    ],
)
def test_prompts(relation: str, published: str, plain: str) -> None:
    """Objects without "the", which may belong to a name."""
    picture = np.zeros((8, 8, 3), np.uint8)
    question = SpatialItem(image_id=0, picture=picture, subject="hot dog", object="the cat", relation=relation)
    assert text_of(question, "published") == published
    assert text_of(question, "plain") == plain
    assert text_of(question, "{query} {Second}!") == f"{plain} {'Right' if relation == 'left' else 'Below'}!"


def test_defaults_follow_the_published_model() -> None:
    """Hidden state 11 is what block 10 returns, of 28; as deep in other models by default, as published always 10."""
    deep: Any = dataclasses.replace(model(), config=Deep(32))
    two: Any = dataclasses.replace(model(), config=Deep(28))
    found = [finetune.resolved(FinetuneConfig(), own).id_layer for own in (two, deep, model())]
    assert found == [10, 11, 1]
    bugs = FinetuneAsPublished()
    assert [finetune.resolved(bugs, own).id_layer for own in (two, deep, model())] == [10, 10, 1]
    ours, theirs = (finetune.resolved(config, model()) for config in (FinetuneConfig(), bugs))
    assert (ours.prompt, ours.case, ours.groups) == ("published", "capital", 2)
    assert (theirs.prompt, theirs.case, theirs.groups) == ("published", "lower", 1)
    assert (theirs.batch_size, theirs.learning_rate, theirs.weight_decay, theirs.clip_norm) == (16, 5e-5, 0.01, 1.0)
    assert (theirs.warmup, theirs.held_out, theirs.budget, theirs.vision_blocks) == (0.03, 0.15, 0.3, 6)


@dataclasses.dataclass(frozen=True)
class Deep:
    """A model's config, as far as the number of its layers goes."""

    num_layers: int

    @property
    def text_config(self) -> Any:
        return dataclasses.replace(model().config.text_config, num_hidden_layers=self.num_layers)


# --- data ------------------------------------------------------------------------------------------------------------


def named(question: Question) -> tuple[Any, ...]:
    item = question.item
    return item.object_a, item.cell_a, item.object_b, item.cell_b, question.axis


def every_question() -> list[tuple[Any, ...]]:
    """By hand: a question along an axis wherever the cells differ along it."""
    return [
        (item.object_a, item.cell_a, item.object_b, item.cell_b, axis)
        for item in items()
        for axis, along in (("horizontal", 0), ("vertical", 1))
        if item.cell_a[along] - item.cell_b[along]
    ]


def epoch(config: FinetuneConfig, groups: list[Any], number: int, count: int) -> list[list[tuple[Any, ...]]]:
    return [
        [named(question) for question in batch]
        for step in range(number * count, (number + 1) * count)
        for batch in config.drawn(groups, step)
    ]


def test_batches_with_the_id_loss() -> None:
    """Every epoch has every question once; a batch has one pair and first cell, and the questions of both axes."""
    config = dataclasses.replace(BUGS, groups=1, batch_size=16)
    groups = config.grouped(items())
    count = 12 * 2  # 12 pairs and cells, each of 24 questions: batches of 16 and 8
    epochs = [epoch(config, groups, number, count) for number in range(2)]
    for batches in epochs:
        assert Counter(question for batch in batches for question in batch) == Counter(every_question())
        assert Counter(map(len, batches)) == {16: 12, 8: 12}
        for batch in batches:
            assert len({question[:3] for question in batch}) == 1
        assert sum(len({question[4] for question in batch}) == 2 for batch in batches) > 12
        places = [batch[0][:3] for batch in batches]
        assert len(set(places[:12])) > 6  # they are shuffled
    assert epochs[0] != epochs[1] and epoch(config, groups, 0, count) == epochs[0]
    # By default a batch asks about one axis.
    assert all(len({question.axis for question in batch}) == 1 for batch in QUICK.drawn(QUICK.grouped(items()), 0))


def test_batches_of_the_baseline() -> None:
    config = dataclasses.replace(BUGS, groups=1, batch_size=16, id_weight=0.0)
    groups = config.grouped(items())
    questions = every_question()
    count = math.ceil(len(questions) / 16)
    batches = epoch(config, groups, 0, count)
    assert Counter(question for batch in batches for question in batch) == Counter(questions)
    assert sorted(map(len, batches))[1:] == [16] * (count - 1)
    assert np.mean([len({question[:3] for question in batch}) for batch in batches]) > 6
    ours = dataclasses.replace(QUICK, id_weight=0.0)  # compared with a run that differs in the loss alone
    same = [
        [named(question) for batch in own.drawn(own.grouped(items()), 3) for question in batch] for own in (ours, QUICK)
    ]
    assert same[0] == same[1]


def test_ordered_pairs_are_held_out() -> None:
    """int() of their share; so the other order may be trained, which by default it never is."""
    words = ("star", "fish", "cat", "A")
    several = [
        dataclasses.replace(items()[0], object_a=a, object_b=b)
        for a, b in itertools.permutations(words, 2)
        for _ in range(3)
    ]
    share = 0.32  # of 12 pairs: 3.84, or of 6: 1.92
    mixed = 0
    for seed in range(8):
        train, held = dataclasses.replace(BUGS, held_out=share, seed=seed).split(several)
        pairs = {(item.object_a, item.object_b) for item in held}
        rest = {(item.object_a, item.object_b) for item in train}
        assert len(pairs) == int(share * 12) == 3 and not pairs & rest and len(train) + len(held) == len(several)
        mixed += any((b, a) in rest for a, b in pairs)
        ours = dataclasses.replace(QUICK, held_out=share, seed=seed).split(several)
        sides = [{frozenset((item.object_a, item.object_b)) for item in side} for side in ours]
        assert [len(side) for side in sides] == [4, 2] and not sides[0] & sides[1]
    assert mixed > 4
    none, nobody = dataclasses.replace(BUGS, held_out=0.05).split(several)
    assert len(none) == len(several) and not nobody  # int(0.6)


def test_the_last_occurrence() -> None:
    """The ID loss reads the second object where it is named last; by default, where it is named first."""
    config = dataclasses.replace(BUGS, prompt="{query} Where is the fish?", groups=1)
    questions = [question for question in questions_of(items()) if question.item.object_b == "fish"][:5]
    batches = [
        finetune.small_batch(model(), questions, ids(), own, 5)
        for own in (config, dataclasses.replace(QUICK, prompt=config.prompt))
    ]
    for batch, which in zip(batches, (-1, 0), strict=True):
        tokens = np.asarray(batch["inputs"]["token_ids"])
        places = [np.flatnonzero(row == VOCABULARY.index("fish")) for row in tokens]
        assert all(len(own) == 2 for own in places)
        assert batch["word"].tolist() == [own[which] for own in places]


# --- labels ----------------------------------------------------------------------------------------------------------


def with_template(loaded: Model, template: str | None) -> Model:
    processor: Processor = copy.copy(loaded.processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    if template is not None:
        processor.tokenizer.chat_template = template
    return dataclasses.replace(loaded, processor=processor)


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE], ids=["tiny", "qwen2-vl-2b"])
def test_labels_are_all_that_follows_the_prompt(template: str | None) -> None:
    """The tokenizer's own template around question and reply; what the prompt alone has is masked."""
    own = with_template(fixtures.model(QWEN), template)
    values = np.zeros((own.num_layers, 1, 1, 4, 4, own.width), np.float32)
    questions, own_ids = questions_of(items())[:6], dataclasses.replace(ids(), values=values)
    batch, ours = (finetune.small_batch(own, questions, own_ids, config, 6) for config in (BUGS, QUICK))
    tokenizer = own.processor.tokenizer
    assert {question.axis for question in questions} == {"horizontal", "vertical"}
    for row, question in enumerate(questions):
        item, along = question.item, list(ANSWERS).index(question.axis)
        answer = ANSWERS[question.axis][item.cell_a[along] > item.cell_b[along]]
        text = {
            "horizontal": f"Is the {item.object_a} to the left or right of the {item.object_b}?",
            "vertical": f"Is the {item.object_a} above or below the {item.object_b}?",
        }[question.axis]
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        replied = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(replied, tokenize=False)
        inputs = np.asarray(batch["inputs"]["token_ids"])[row]
        shown = int((np.asarray(batch["inputs"]["image_rows"])[row] >= 0).sum())
        whole, prompt = (each.replace("<|image_pad|>", "<|image_pad|>" * shown) for each in (whole, prompt))
        tokens, masked = tokenizer(whole)["input_ids"], len(tokenizer(prompt)["input_ids"])
        labels = np.array([-100] * masked + tokens[masked:])
        end = len(tokens) - 1  # the last token is read nowhere
        assert inputs[:end].tolist() == tokens[:-1]
        counted = batch["labels"][row] >= 0
        assert (batch["positions"][row][counted] + 1).tolist() == np.flatnonzero(labels >= 0).tolist()
        assert batch["labels"][row][counted].tolist() == labels[labels >= 0].tolist()
        assert tokenizer.convert_ids_to_tokens(labels[labels >= 0].tolist()) == [answer, "<|im_end|>"]
        assert tokenizer.convert_ids_to_tokens(ours["labels"][row].tolist()) == [answer]


def test_a_template_that_begins_replies_otherwise() -> None:
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'][0]['text'] }} {% endfor %}"
    processor = with_template(model(), template + "{% if add_generation_prompt %}model{% endif %}").processor
    with pytest.raises(PromptError, match="does not write the reply 'left' after the generation prompt"):
        reply_tokens(processor, ["left"])


# --- what is trained -------------------------------------------------------------------------------------------------


def chosen(case: Any, config: FinetuneConfig) -> set[tuple[str, int | None]]:
    rows = finetune.select(fixtures.model(case), config).rows
    return {(path, row) for path, kept in rows for row in ((None,) if kept is None else kept)}


@pytest.mark.parametrize(
    ("case", "mlps", "projector"),
    [(LLAVA, ".encoder.layers.", "multi_modal_projector"), (QWEN, "visual.blocks.", "multi_modal_projector")],
    ids=["llava", "qwen2-vl"],
)
@pytest.mark.parametrize(("blocks", "budget"), [(2, 0.3), (6, 0.3), (6, 0.06)])
def test_tensors(case: Any, mlps: str, projector: str, blocks: int, budget: float) -> None:
    """Of Hugging Face's parameters by name: weights of the last MLPs and the projector, the largest first."""
    network = fixtures.reference(case)
    sizes = {name: value.numel() for name, value in network.named_parameters()}
    depth = 3
    wanted = [
        name
        for name in sizes
        if name.endswith(".weight")
        and (projector in name or (mlps in name and ".mlp." in name and of_block(name, mlps) >= depth - blocks))
    ]
    room, theirs = budget * sum(sizes.values()), Counter[int]()
    for name in sorted(wanted, key=lambda name: -sizes[name]):
        if sizes[name] <= room:
            room -= sizes[name]
            theirs[sizes[name]] += 1
    settings: dict[str, Any] = {"train": "vision-mlp,projector", "vision_blocks": blocks, "budget": budget}
    ours = chosen(case, dataclasses.replace(BUGS, **settings))
    leaves = {tensor.name: tensor for tensor in finetune.tensors(fixtures.model(case).parameters, tied=False)}
    found = [leaves[path if row is None else f"{path}[{row}]"] for path, row in ours]
    assert Counter(tensor.size for tensor in found) == theirs
    if budget == 0.3:  # all of them fit
        assert len(found) == len(wanted)
        named_ones = {"up": "fc1", "down": "fc2", "projector_in": "linear_1", "projector_out": "linear_2"}
        expected = set()
        for name in wanted:
            part = next(key for key, value in named_ones.items() if f"{value}.weight" in name)
            block = None if projector in name else of_block(name, mlps)
            expected.add((f"{part}.kernel" if block is None else f"tower.layers.{part}.kernel", block))
        assert ours == expected
    further = chosen(case, dataclasses.replace(QUICK, **settings)) - ours
    if budget == 0.3:
        kinds = {path.rsplit(".", 1)[-1] for path, _ in further}
        assert "bias" in kinds
        assert any(path.startswith("tower.merge") for path, _ in further) == (case is QWEN)


def of_block(name: str, before: str) -> int:
    return int(name.partition(before)[2].partition(".")[0])


# --- learning rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 100, 250])
def test_learning_rates(steps: int) -> None:
    """int(3 % of the steps) from 0 upwards, then down to 0 along a line, step by step as PyTorch takes them."""
    weight = torch.nn.Parameter(torch.zeros(1))
    rule = torch.optim.AdamW([weight], lr=5e-5)
    schedule = transformers.get_linear_schedule_with_warmup(rule, int(0.03 * steps), steps)
    expected = []
    for _ in range(steps):
        expected.append(rule.param_groups[0]["lr"])
        rule.step()
        schedule.step()
    config = dataclasses.replace(BUGS, steps=steps, learning_rate=5e-5, warmup=0.03, schedule="linear")
    rates = config.learning_rates()
    found = [float(np.asarray(rates(step))) for step in range(steps)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-12)
    ours = dataclasses.replace(QUICK, steps=steps, learning_rate=5e-5, warmup=0.03).learning_rates()
    assert (found[0] == 0) == (steps >= 34) and float(np.asarray(ours(0))) > 0


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("left", 0),
        ("Right.", 1),
        ("The right, not left", 1),
        ("LEFT or right", 0),
        ("upright", 1),
        ("", -1),
        ("It is above", -1),
    ],
)
def test_the_option_that_is_written_first(text: str, index: int) -> None:
    assert first_written(text, ["left", "right"]) == index


def test_written_answers() -> None:
    """Of five tokens that Hugging Face's model writes; the words are some that a random model happens to write."""
    questions = [question for question in questions_of(items()) if question.axis == "horizontal"][:12]
    asked = [question.spatial for question in questions]
    prompts = model().prepare([own.picture for own in asked], [own.query for own in asked])
    tokens = LLAVA.arguments(prompts)
    last = prompts.last()
    texts = []
    network = fixtures.reference(LLAVA)
    for row in range(len(asked)):
        arguments = {name: value[row : row + 1] for name, value in tokens.items()}
        end = int(last[row]) + 1
        arguments |= {name: arguments[name][:, :end] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            new = network.generate(**arguments, max_new_tokens=5, do_sample=False, eos_token_id=2)[0, end:]
        texts.append(model().processor.decode(new.tolist()))
    words = [word for word, _ in Counter(word for text in texts for word in text.split()).most_common(2)]
    expected = []
    for text in texts:
        places = [text.lower().find(word.lower()) for word in words]
        order = sorted((place, index) for index, place in enumerate(places) if place >= 0)
        expected.append(order[0][1] if order else -1)
    batch = prepare_questions(
        model(),
        [own.picture for own in asked],
        [own.query for own in asked],
        [(own.subject, own.object) for own in asked],
        axis="horizontal",
        answers=words,
        truth=[0] * len(asked),
    )
    assert by_writing(model(), batch)().tolist() == expected and len(set(expected)) > 1


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends, is resumed by the same command, and is another run than ours and than one of an older version."""
    folder = write_data(tmp_path)
    further = ["--reference-bugs", "--steps", "2", "--mesh", "data=1"]
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(2):
            with pytest.raises(SystemExit) as ended:
                main(command(folder, "run", *further))
            assert ended.value.code == 0, capsys.readouterr().err
    settings = json.loads((folder / "run" / "run.json").read_text())
    assert settings["reference_bugs"] and settings["groups"] == 1
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["groups"] == 12 and all("bias" not in name for name in summary["trained_tensors"])
    assert "reference bugs was true, is now false" in refused(capsys, command(folder, "run", "--steps", "2"))
    for name in ("prompt", "reference_bugs"):
        settings.pop(name)
    (folder / "run" / "run.json").write_text(json.dumps(settings | {"template": "{query}"}))
    assert "holds a run with other settings" in refused(capsys, command(folder, "run", *further))


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="takes a single process"):
        FinetuneAsPublished()
    FinetuneConfig()
