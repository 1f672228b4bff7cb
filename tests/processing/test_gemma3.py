"""Gemma 3's files as they are published: tokenizer, template, settings and configs mean what they mean elsewhere."""

import copy
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import fixtures
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import VOCABULARY
from families import gemma3 as cases
from fixtures import distance
from full_size import CONFIGS
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3ImageProcessorPil

from jaxid.checkpoints.loading import load
from jaxid.errors import CheckpointError, PromptError
from jaxid.families.base import Model
from jaxid.families.gemma3 import Gemma3Config, Gemma3Processor
from jaxid.interp.forward import forward

CASE = cases.EVERY[0]
QUESTIONS = ("Is the starfish to the left or right of the fish?", "  Where is the fish, below or in the hourglass?\n")

TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""As published: the first token comes from the template."""

PREPROCESSOR = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 896, "width": 896},
}
"""As published."""


def write_tokenizer(folder: Path) -> None:
    """As published: byte-pair pieces, a letter for spaces, bytes where they fail, line breaks as tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", *cases.SPECIAL]
    single_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    texts = ["user", "model", "left", "right", *(f" {word}" for word in VOCABULARY)] * 3
    # No piece reaches over a word's end, as in the published vocabulary, which says so by its merges alone.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=360, special_tokens=special + single_bytes, show_progress=False)
    )
    fields = json.loads(tokenizer.to_str())
    fields["pre_tokenizer"] = None
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.add_tokens([AddedToken(breaks, special=False, normalized=False) for breaks in ("\n", "\n\n", "\n\n\n")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    first = ("<bos>", cases.IDS["<bos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[first])
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    named = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "extra_special_tokens": marks,
        **named,
        **marks,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.cache
def published() -> Path:
    """The tiny model with files as the Hub has them; the template is the processor's."""
    folder = shutil.copytree(fixtures.folder(CASE), Path(fixtures.SCRATCH.name) / "gemma3-published")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    settings = PREPROCESSOR | {"size": {"height": 32, "width": 32}, "image_seq_length": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "processor_config.json").write_text('{"image_seq_length": 16, "processor_class": "Gemma3Processor"}')
    write_tokenizer(folder)
    return folder


@functools.cache
def saved() -> Path:
    """The same as transformers writes it today: settings of all parts in one file."""
    folder = shutil.copytree(fixtures.folder(CASE), Path(fixtures.SCRATCH.name) / "gemma3-saved")
    for name in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    AutoProcessor.from_pretrained(published()).save_pretrained(folder)
    return folder


@functools.cache
def loaded(folder: Path) -> Model:
    return load(folder)


FOLDERS = pytest.mark.parametrize("make", [published, saved], ids=lambda make: make.__name__)


@FOLDERS
@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_prompts_are_hugging_faces(make: Any, several: bool) -> None:
    pictures = fixtures.pictures()
    groups = [pictures, pictures[::-1]] if several else [[picture] for picture in pictures]
    theirs = AutoProcessor.from_pretrained(make())
    talks = [
        [{"role": "user", "content": [*({"type": "image", "image": picture} for picture in group), text(question)]}]
        for group, question in zip(groups, QUESTIONS, strict=True)
    ]
    expected = theirs.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "padding_side": "right", "return_tensors": "np"},
    )
    prompts = loaded(make()).prepare(groups, QUESTIONS)
    inputs, length = prompts.inputs, expected["input_ids"].shape[1]
    np.testing.assert_array_equal(inputs.token_ids[:, :length], expected["input_ids"])
    np.testing.assert_array_equal(inputs.valid[:, :length], expected["attention_mask"].astype(bool))
    np.testing.assert_array_equal(np.asarray(inputs.image_rows)[:, :length] >= 0, expected["token_type_ids"] == 1)
    np.testing.assert_allclose(np.asarray(inputs.pixels), expected["pixel_values"], atol=1e-6)
    assert (inputs.token_ids[:, 0] == cases.IDS["<bos>"]).all() and not (
        inputs.token_ids[:, 1] == cases.IDS["<bos>"]
    ).any()


def text(question: str) -> dict[str, str]:
    return {"type": "text", "text": question}


def test_words_are_found_after_the_picture() -> None:
    """The space before a word belongs to its first piece, and its last piece is where it is edited."""
    model, (picture, _) = loaded(published()), fixtures.pictures()
    prompts = model.prepare(picture, QUESTIONS)
    tokenizer, ids = model.processor.tokenizer, np.asarray(prompts.inputs.token_ids)
    for row, words in enumerate((("Is", "starfish", "fish"), ("Where", "below", "hourglass"))):
        for word in words:
            alone = model.prepare(picture, QUESTIONS[row])
            places = alone.word_tokens(word)[0]
            pieces = [tokenizer.decode([int(piece)]) for piece in ids[row, places]]
            assert "".join(pieces).strip() == word and len(pieces) == len(set(places.tolist()))
            assert alone.word(word) == places[-1] > alone.text_start()
    hourglass = model.prepare(picture, QUESTIONS[1]).word_tokens("hourglass")
    assert hourglass.shape[1] > 2  # of several pieces
    # A picture is between marks and line breaks; the line break of "user" and two more are one token.
    three, two = tokenizer.convert_tokens_to_ids(["\n\n\n", "\n\n"])
    start = int(np.flatnonzero(np.asarray(prompts.inputs.image_rows)[0] >= 0)[0])
    marks = [three, cases.IDS["<start_of_image>"]], [cases.IDS["<end_of_image>"], two]
    assert ids[0, start - 2 : start].tolist() == marks[0] and ids[0, start + 16 : start + 18].tolist() == marks[1]
    assert model.prepare(picture, QUESTIONS[0], chat=False).texts[0].endswith(f"\n\n{QUESTIONS[0]}")
    with pytest.raises(PromptError, match="contains the image token '<start_of_image>'"):
        model.prepare(picture, "What is <start_of_image>?")


def test_answers_begin_after_the_line_break() -> None:
    model = loaded(published())
    pieces = model.processor.tokenizer.convert_ids_to_tokens(model.processor.answer_ids(["left", "right"]).tolist())
    assert pieces == ["left", "right"]


def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    folder = shutil.copytree(published(), tmp_path / "model")
    ids = [cases.IDS["<eos>"], cases.IDS["<end_of_turn>"]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert load(folder).processor.stop_ids == tuple(ids)


def test_published_settings(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    config = Gemma3Config.from_hf(copy.deepcopy(CONFIGS["gemma-4b"]))
    processor = copy.copy(fixtures.model(CASE).processor)
    processor.config, processor.image_processor = config, Gemma3Processor.load_image_processor(tmp_path, config)
    assert isinstance(processor.image_processor, Gemma3ImageProcessorPil)
    encoded = processor.encode([np.full((30, 60, 3), 255, np.uint8)], [[0]])
    assert encoded.pixels.shape == (1, 3, 896, 896) and len(encoded.tokens[0].rows) == config.image_tokens == 256
    np.testing.assert_allclose(encoded.pixels, 1.0, atol=1e-6)


# --- configs and weights --------------------------------------------------------------------------------------------

OLD = {
    "rope_theta": 900.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window_pattern": 2,
}
"""The spelling of published files; `layer_types` and `rope_parameters` took their place."""


def test_old_and_new_spellings_are_one_model(tmp_path: Path) -> None:
    folder = shutil.copytree(fixtures.folder(CASE), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    text_config = fields["text_config"]
    for name in ("layer_types", "rope_parameters", "_sliding_window_pattern"):
        text_config.pop(name, None)
    text_config.pop("hidden_activation")  # the usual one
    text_config |= OLD
    for name in ("image", "boi", "eoi"):
        fields[f"{name}_token_id"] = fields.pop(f"{name}_token_index")
    (folder / "config.json").write_text(json.dumps(fields))
    old, prompts = load(folder), fixtures.prompts(CASE)
    assert old.config == fixtures.model(CASE).config
    theirs = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = theirs(**CASE.arguments(prompts)).logits.numpy()[np.arange(2), prompts.last()]
    assert distance(forward(old, prompts).logits, logits) < 1e-5


def test_embeddings_are_scaled_in_the_weights_precision() -> None:
    """The scale, 32 ** 0.5, is rounded to bfloat16 before it multiplies."""
    model, ids = fixtures.model(CASE, "bfloat16"), np.arange(48)[None]
    theirs = fixtures.reference(CASE).get_input_embeddings()
    rounded = copy.deepcopy(theirs).to(torch.bfloat16)
    with torch.no_grad():
        expected = rounded(torch.tensor(ids)).float().numpy()
    ours = np.asarray(model.network().decoder.embed(jnp.asarray(ids, jnp.int32)), np.float32)
    np.testing.assert_array_equal(ours, expected)
    assert (ours != np.asarray(theirs.weight.detach().to(torch.bfloat16).float() * 32**0.5)).any()


def test_weights_of_the_decoder_are_tied_where_the_file_is_silent() -> None:
    fields = copy.deepcopy(CONFIGS["gemma-4b"])
    assert Gemma3Config.from_hf(fields).text_config.tie_word_embeddings
    assert not Gemma3Config.from_hf(fields | {"tie_word_embeddings": False}).text_config.tie_word_embeddings


@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        (None, {"mm_tokens_per_image": 200}, "mm_tokens_per_image 200 .* 64 x 64"),
        (None, {"mm_tokens_per_image": 65 * 65}, "mm_tokens_per_image 4225 .* 64 x 64"),
        (None, {"mm_tokens_per_image": 30 * 30}, "mm_tokens_per_image 900 .* 64 x 64"),  # 64 // 2 are 32
        (None, {"mm_tokens_per_image": 0}, "mm_tokens_per_image 0"),
        (None, {"audio_config": {}}, "the top level.*audio_config"),
        ("vision_config", {"model_type": "clip_vision_model"}, "'clip_vision_model' is not 'siglip_vision_model'"),
        ("text_config", {"model_type": "llama"}, "'llama' is not 'gemma3_text'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(part: str | None, fields: dict[str, Any], named: str) -> None:
    whole = copy.deepcopy(CONFIGS["gemma-4b"])
    (whole[part] if part else whole).update(fields)
    with pytest.raises(CheckpointError, match=named):
        Gemma3Config.from_hf(whole)


def test_marks_that_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    folder = shutil.copytree(published(), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"boi_token_index": 99999}))
    with pytest.raises(CheckpointError, match="boi_token_index 99999"):
        load(folder)


def test_works_without_pytorch(tmp_path: Path) -> None:
    question, picture = "Where is the fish?", np.random.default_rng(3).integers(0, 256, (20, 60, 3), np.uint8)
    made = fixtures.prepared_without_torch(saved(), picture, question, tmp_path / "made.npz")
    expected = loaded(saved()).prepare(picture, question).inputs
    np.testing.assert_array_equal(made["pixels"], expected.pixels)
    np.testing.assert_array_equal(made["ids"], expected.token_ids)
