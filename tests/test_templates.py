"""Chat templates: the same text as Hugging Face's; text-only ones; broken ones; those that never end."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from processors import PLAIN, with_template

from jaxid.checkpoints.loading import load
from jaxid.errors import CheckpointError, PromptError
from jaxid.prompts.processor import Processor

ASKED = "Is the star to the left or right of the fish?"

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
{% set system_message = false %}{% endif %}{% for message in loop_messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
{% if loop.index0 == 0 and system_message != false %}\
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

CHATML = """{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEXT_ONLY = {
    "llama2": LLAMA2,
    "chatml": CHATML,
    "vicuna": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "added": "{% for m in messages %}{{ m['content'] + '!' }}{% endfor %}",
    "joined": "{% for m in messages %}{{ 'Q: ' ~ m['content'] ~ ' A:' }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return fixtures.model(PLAIN).processor


def theirs(processor: Processor, template: str, content: Any, *, chat: bool = True) -> str:
    """What transformers makes of a message of the user."""
    messages = [{"role": "user", "content": content}]
    return processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=chat
    )


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_templates_of_text_alone(processor: Processor, name: str, pictures: int) -> None:
    """The pictures' placeholders begin the string that such a template wants, a line each."""
    text, start = with_template(processor, TEXT_ONLY[name]).render(ASKED, pictures=["<image>"] * pictures)
    # JSON can hold the list of parts as well, as long as no picture has to be placed.
    parts = [{"type": "text", "text": ASKED}] if name == "json" and not pictures else None
    assert text == theirs(processor, TEXT_ONLY[name], parts or "<image>\n" * pictures + ASKED)
    assert text[start : start + len(ASKED)] == ASKED and text[:start].count("<image>") == pictures


def test_a_text_only_template_gives_the_same_picture_tokens(processor: Processor) -> None:
    """A template that adds to a string, and one of parts that writes the same text: the same prompt."""
    parts = (
        "{% for m in messages %}Is {% for p in m.content %}{{ '<image>\\n' if p.type == 'image' else p.text }}"
        "{% endfor %}?{% endfor %}"
    )
    string = "{% for m in messages %}{{ 'Is ' + m['content'] + '?' }}{% endfor %}"
    one, two = (
        with_template(processor, template).prepare(fixtures.pictures(), "the star left") for template in (parts, string)
    )
    assert one.texts == two.texts
    np.testing.assert_array_equal(one.inputs.token_ids, two.inputs.token_ids)
    np.testing.assert_array_equal(one.inputs.image_rows, two.inputs.image_rows)
    np.testing.assert_array_equal(one.words([("star", "left")] * 2), two.words([("star", "left")] * 2))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{%- for m in messages -%}\n  {% if m.role == 'user' %}\n    {%- for p in m.content if p.type =="
        " 'image' %}\n<image>{% else %}none{% endfor %}\n  {{ m.content[-1].text }}\n{% endif %}{% endfor %}\n\n",
        "{% macro shown(p) %}{{ '<image>' if p.type == 'image' else p.text | string }} {% endmacro %}"
        "{% set ns = namespace(n=0) %}{% for p in messages[0].content %}{% set ns.n = ns.n + 1 %}"
        "{{ shown(p) }}{% if ns.n > 5 %}{% break %}{% endif %}{% endfor %}{{ 2 ** 5 * 3 }}{{ '%d' % 3 }}",
        "{{ tools is none }}{{ '-' * 5 }}{{ dict(a=1) | tojson(indent=2) }}<image>"
        "{{ messages | map(attribute='content') | first | map(attribute='text') | select('string') | join('') }}",
    ],
)
def test_rendering_is_hugging_faces(processor: Processor, template: str, chat: bool) -> None:
    content = [{"type": "image"}, {"type": "text", "text": ASKED}]
    text, start = with_template(processor, template).render(ASKED, pictures=["<image>"], chat=chat)
    expected = theirs(processor, template, content, chat=chat)
    assert text == (expected if chat else expected[: start + len(ASKED)])


def test_json_that_escapes_the_question(processor: Processor) -> None:
    with pytest.raises(PromptError, match="changes the question"):
        with_template(processor, TEXT_ONLY["json"]).render('Is the "star" left?')


BROKEN = {
    "syntax": ("{% for %}", "Expected an expression"),
    "unclosed": ("{% for m in messages %}", "Unexpected end of template"),
    "function": ("{{ shout(messages) }}", "'shout' is undefined"),
    "filter": ("{{ messages | shout }}", "No filter named 'shout'"),
    "attribute": ("{{ messages[5].a.b }}", "has no element 5"),
    "raises": ("{{ raise_exception('a system\\nmessage is required') }}", "a system"),
    "role": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}",
        "no system message",
    ),
    "divides": ("{{ 1 // 0 }}", "by zero"),
    "import": ("{% include 'other' %}", "no loader"),
    "deep": ("{{" + 4000 * "(" + 4000 * ")" + "}}", "recursion"),
    "recursive": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}

ENDLESS = {
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "nested": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "same": "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "repeated": "{{ 'x' * 10**12 }}",
    "doubled": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% endfor %}",
    "power": "{{ 7 ** (10 ** 10) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "padded": "{{ 'x' | center(10**11) }}{{ 'x'.rjust(10**11) }}",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_templates(processor: Processor, name: str) -> None:
    template, named = BROKEN[name]
    with pytest.raises(PromptError, match=named) as raised:
        with_template(processor, template).prepare(fixtures.pictures()[0], ASKED)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_never_end(processor: Processor, name: str) -> None:
    endless = with_template(processor, ENDLESS[name])
    found: list[str] = []

    def prepare() -> None:
        try:
            endless.prepare(None, "star")
        except PromptError as error:
            found.append(str(error))

    thread = threading.Thread(target=prepare, daemon=True)  # no signals there
    thread.start()
    thread.join(60)
    assert found and "more than 100000 steps" in found[0]


def test_many_pictures_and_long_questions_are_within_the_budget(processor: Processor) -> None:
    text, _ = processor.render("star " * 100_000, pictures=["<image>"] * 300)
    assert text.count("<image>") == 300 and text.count("star") == 100_000


@pytest.mark.parametrize("name", ["syntax", "function", "raises", "nested", "repeated"])
@pytest.mark.parametrize("file", ["chat_template.jinja", "chat_template.json"])
def test_bad_templates_are_found_at_load(tmp_path: Path, name: str, file: str) -> None:
    template = ENDLESS[name] if name in ENDLESS else BROKEN[name][0]
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(PLAIN), folder)
    (folder / file).write_text(template if file.endswith("jinja") else json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=f"{file}: the chat template cannot be rendered") as raised:
        load(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.json", "[]"),
        ("chat_template.json", "null"),
        ("chat_template.json", "{}"),
        ("chat_template.json", '{"chat_template": 3}'),
        ("chat_template.json", "[" * 100_000),
        ("chat_template.jinja", b"\xff\xfe\x00"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", b"\x00\xff"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("special_tokens_map.json", "null"),
        ("special_tokens_map.json", "[1]"),
        ("special_tokens_map.json", "[" * 100_000),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "null"),
        ("tokenizer.json", b"\xff"),
        ("generation_config.json", "[]"),
        ("generation_config.json", "null"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
        ("generation_config.json", '{"eos_token_id": -5}'),
        ("generation_config.json", '{"eos_token_id": 1.5}'),
        ("generation_config.json", '{"eos_token_id": true}'),
        ("generation_config.json", '{"eos_token_id": [2, 99999999999999999999]}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
    ],
)
def test_damaged_files_of_a_processor(tmp_path: Path, file: str, content: str | bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(PLAIN), folder)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=r"model") as raised:
        load(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("key", ["model", "vocab", "unk_token", "pre_tokenizer", "added_tokens", "type", "special"])
def test_a_flipped_key_of_the_tokenizer(tmp_path: Path, key: str) -> None:
    """Loads and works as before, or is refused in one line."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(PLAIN), folder)
    text = (folder / "tokenizer.json").read_text()
    assert f'"{key}"' in text
    (folder / "tokenizer.json").write_text(text.replace(f'"{key}"', f'"{key[:-1]}~"', 1))
    try:
        load(folder).prepare(fixtures.pictures()[0], "Is the star left?")
    except (CheckpointError, PromptError) as error:
        assert "\n" not in str(error) and "token" in str(error)


def test_a_template_of_several_names(tmp_path: Path) -> None:
    """transformers' older form, a list of named templates: the default one is taken."""
    folder = tmp_path / "model"
    shutil.copytree(fixtures.folder(PLAIN), folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "{{ no }}"}, {"name": "default", "template": template}]
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"chat_template": named}))
    assert load(folder).prepare(None, "star").texts == fixtures.model(PLAIN).prepare(None, "star").texts
