"""Functional words by rules, and by a language model behind a stub server over loopback."""

import asyncio
import contextlib
import email.utils
import http.server
import json
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxid.cli import main
from jaxid.dcsm import functional_words
from jaxid.dcsm.functional_words import RULES, Endpoint, by_model, by_rules
from jaxid.dcsm.placement import PUBLISHED, find
from jaxid.errors import DataError, InputError


class Stub(http.server.ThreadingHTTPServer):
    """Answers as told: statuses first, then by the step that a prompt belongs to."""

    statuses: list[int]
    prompts: list[str]
    keys: list[str | None]
    simple: str = ""
    clean: str = '```json\n["Behind", "no"]\n```'
    retry_after: str = "7"
    redirect: str | None = None
    cut: int = 0  # answers that end too early
    stream: bytes = b""  # sent again and again, if there is one
    pause: float = 0.0  # between times
    head_pause: float = 0.0  # between the bytes of a head that does not end, if not zero

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is printed about readers that have gone."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers.get("Authorization"))
        with contextlib.suppress(OSError):  # the reader has gone
            while self.server.head_pause:
                self.wfile.write(b"a" if self.close_connection else b"HTTP/1.1 200 OK\r\nA: ")
                self.close_connection = True
                time.sleep(self.server.head_pause)
        if self.server.statuses:
            self.send_response(self.server.statuses.pop(0))
            self.send_header("Retry-After", self.server.retry_after)
            self.end_headers()
            return
        if self.server.redirect is not None:
            self.send_response(302)
            self.send_header("Location", self.server.redirect)
            self.end_headers()
            return
        if self.server.cut:
            self.server.cut -= 1
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b"{")
            return
        if self.server.stream:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader has gone
                while self.server.stream:
                    self.wfile.write(self.server.stream)
                    time.sleep(self.server.pause)
            return
        assert body["temperature"] == 0
        prompt = body["messages"][0]["content"]
        self.server.prompts.append(prompt)
        caption = prompt.rsplit("Caption: ", 1)[-1]
        if "distinguishes" in prompt:
            answer = self.server.simple or prompt.rsplit("Captions: ", 1)[-1].lower()
        elif prompt.startswith("Rewrite"):
            answer = f'"{caption.lower()}"'
        elif "angle brackets" in prompt:
            answer = caption.replace("behind", "<BEHIND>").replace("no ", "<NO> ").replace("red", "<RED>")
        else:
            answer = self.server.clean
        found = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(found)

    def do_GET(self) -> None:
        self.server.keys.append(self.headers.get("Authorization"))
        self.send_response(404)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@contextlib.contextmanager
def serving() -> Iterator[Stub]:
    server = Stub(("127.0.0.1", 0), Handler)
    server.statuses, server.prompts, server.keys = [], [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # seconds between looks for the end
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as server:
        yield server


def endpoint(stub: Stub, cache: Path, **options: Any) -> Endpoint:
    return Endpoint(f"http://127.0.0.1:{stub.server_port}/v1/", "tiny", cache, **options)


CAPTIONS = ("A red cat behind a dog", "no birds")


def test_three_steps_and_no_second_request(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret")
    ask = endpoint(stub, tmp_path, key_variable="SECRET_KEY")
    found = by_model(CAPTIONS, ask, ("above",))
    assert found.captions == ("a red cat behind a dog", "no birds")
    assert found.vocabulary == ("above", "behind", "no")
    assert len(stub.prompts) == 4 and stub.prompts[-1].endswith(json.dumps(["red", "behind", "no"]))
    assert stub.prompts[0].endswith(json.dumps(CAPTIONS)) and "list of 2 texts" in stub.prompts[0]
    assert '["ABOVE"]' in stub.prompts[1] and '["ABOVE", "RED", "BEHIND"]' in stub.prompts[2]
    assert set(stub.keys) == {"Bearer sk-very-secret"}
    assert by_model(CAPTIONS, ask, ("above",)) == found and len(stub.prompts) == 4
    assert all("secret" not in path.read_text() for path in tmp_path.iterdir())


def test_captions_are_told_from_those_shown_with_them(stub: Stub, tmp_path: Path) -> None:
    captions = [f"cat {number}" for number in range(5)]
    ask = endpoint(stub, tmp_path, key_variable=None)
    assert by_model(captions, ask, together=2).captions == tuple(captions)
    shown = [json.loads(prompt.rsplit("Captions: ", 1)[1]) for prompt in stub.prompts if "distinguishes" in prompt]
    assert shown == [captions[:2], captions[2:4], captions[4:]]


def test_a_known_word_takes_the_place_of_another(tmp_path: Path) -> None:
    """A caption is what the model made of it, with known words where it marked others."""
    answers = iter(
        ['```json\n["man close to a puppy", "two cats"]\n```', "Man <NEAR> a puppy", '"<TWO> cats"', '["near", "two"]']
    )
    found = by_model(["A man sits close to a puppy.", "Here are two cats"], lambda prompt: next(answers), ("near",))
    assert found.captions == ("Man near a puppy", "two cats") and found.vocabulary == ("near", "two")
    assert [find(caption, found.vocabulary)[0][0] for caption in found.captions] == [0, 1]


@pytest.mark.parametrize("simple", ["sorry", '["one"]', '["one", " "]', '["a", "b", "c"]', '{"0": "a"}', '["a", 5]'])
def test_every_caption_gets_a_text(stub: Stub, tmp_path: Path, simple: str) -> None:
    stub.simple = simple
    ask = endpoint(stub, tmp_path, key_variable=None)
    with pytest.raises(DataError, match=r"step 1 \(simplify, captions 0 to 1\)"):
        by_model(CAPTIONS, ask)
    assert not list(tmp_path.iterdir())
    stub.simple = ""
    assert by_model(CAPTIONS, ask).captions == ("a red cat behind a dog", "no birds")


def test_the_command_resumes_where_it_failed(stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says what failed; what was answered before is not asked again; without a server nothing is lost."""
    (tmp_path / "captions.txt").write_text("\n".join(["A red cat behind a dog", "No birds", "a dog"]))
    arguments = ["dcsm", "words", str(tmp_path / "captions.txt"), "--out", str(tmp_path / "out"), "--llm", "tiny"]
    arguments += ["--base-url", f"http://127.0.0.1:{stub.server_port}/v1", "--key-variable", "", "--together", "2"]

    def failed() -> str:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    stub.clean = "sorry"
    assert "step 3 (clean) did not give a JSON list" in failed()
    asked, stub.statuses = len(stub.prompts), [400]
    assert "gave no answer (HTTP 400" in failed() and asked == 2 + 3 + 1
    assert not (tmp_path / "out" / "words.txt").exists()
    stub.clean = '["behind", "no"]'
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert len(stub.prompts) == asked + 1  # the clean list alone
    assert "12 functional words" in capsys.readouterr().out
    assert (tmp_path / "out" / "captions.txt").read_text() == "a red cat behind a dog\nno birds\na dog\n"
    assert (tmp_path / "out" / "marked.txt").read_text() == "a red cat <BEHIND> a dog\n<NO> birds\na dog\n"
    assert (tmp_path / "out" / "words.txt").read_text().split() == [*PUBLISHED, "behind"]


def test_an_empty_mark_is_named() -> None:
    answers = iter(['["a", "b"]', "a", " <> "])
    with pytest.raises(DataError, match=r"step 2 \(mark, caption 1\) gave an empty answer"):
        by_model(CAPTIONS, lambda prompt: next(answers))


def test_it_tries_again_and_gives_up(stub: Stub, tmp_path: Path) -> None:
    waits: list[float] = []
    stub.statuses = [429, 500]
    ask = endpoint(stub, tmp_path, key_variable=None, sleep=waits.append)
    assert ask("Rewrite it. Caption: Yes") == '"yes"' and waits == [7.0, 7.0] and stub.keys[-1] is None
    stub.statuses = [503] * 9
    with pytest.raises(DataError, match="HTTP 503, attempt 5"):
        ask("another")
    stub.statuses = [401]
    with pytest.raises(DataError, match=r"HTTP 401, attempt 1; is the key right\?"):
        ask("another")


def test_no_server_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds no key"):
        Endpoint("http://127.0.0.1:9/v1", "tiny", tmp_path)
    with pytest.raises(InputError, match="must begin with http"):
        Endpoint("127.0.0.1", "tiny", tmp_path, key_variable=None)
    with pytest.raises(DataError, match="gave no answer"):
        Endpoint("http://127.0.0.1:9/v1", "tiny", tmp_path, key_variable=None, attempts=1)("hello")


@pytest.mark.parametrize("clean", ["sorry", '{"a": 1}', "[1, 2]", "[broken"])
def test_an_answer_of_another_form_is_named(stub: Stub, tmp_path: Path, clean: str) -> None:
    stub.clean = clean
    with pytest.raises(DataError, match="step 3"):
        by_model(CAPTIONS, endpoint(stub, tmp_path, key_variable=None))


def test_rules_find_longer_words_first() -> None:
    found = by_rules(["A cat to the left of a dog", "the dog isn't on top of it", "one cat on a mat"], ("no",))
    assert found.vocabulary == ("no", "to the left of", "isn't", "on top of", "on")
    assert functional_words.RULES[: len(functional_words.PUBLISHED)] == functional_words.PUBLISHED
    assert len(set(functional_words.RULES)) == len(functional_words.RULES)


def test_the_key_stays_with_its_endpoint(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-very-secret\n")
    with serving() as elsewhere:
        stub.redirect = f"http://localhost:{elsewhere.server_port}/"
        with pytest.raises(DataError, match="HTTP 302"):
            endpoint(stub, tmp_path, key_variable="SECRET_KEY")("hello")
        assert stub.keys == ["Bearer sk-very-secret"] and elsewhere.keys == []
    monkeypatch.setenv("SECRET_KEY", "sk-very\nsecret")
    with pytest.raises(InputError, match="line breaks") as caught:
        endpoint(stub, tmp_path, key_variable="SECRET_KEY")
    assert "sk-very" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("asked", "least", "most"), [("-1", 0, 0), ("0", 0, 0), ("900", 60, 60), ("soon", 1, 1), (20, 10, 20)]
)
def test_it_waits_as_long_as_asked(stub: Stub, tmp_path: Path, asked: str | int, least: float, most: float) -> None:
    stub.retry_after = asked if isinstance(asked, str) else email.utils.formatdate(time.time() + asked, usegmt=True)
    stub.statuses, waits = [429], []
    endpoint(stub, tmp_path, key_variable=None, sleep=waits.append)("Rewrite it. Caption: Yes")
    assert len(waits) == 1 and least <= waits[0] <= most


def test_an_answer_cut_short_is_asked_again(stub: Stub, tmp_path: Path) -> None:
    stub.cut, waits = 2, []
    ask = endpoint(stub, tmp_path, key_variable=None, sleep=waits.append)
    assert ask("Rewrite it. Caption: Yes") == '"yes"' and waits == [1.0, 2.0]


def test_a_bad_answer_is_not_kept(stub: Stub, tmp_path: Path) -> None:
    ask = endpoint(stub, tmp_path, key_variable=None)
    stub.clean = "sorry"
    with pytest.raises(DataError, match="step 3"):
        by_model(CAPTIONS, ask)
    stub.clean = '["no", "beyond", "behind"]'
    assert by_model(CAPTIONS, ask, ("Above",)).vocabulary == ("above", "behind", "no", "beyond")
    assert len(stub.prompts) == 4 + 3  # the good answer of step 1 was kept; another vocabulary marks anew


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from((*RULES, "knot", "topic", "bigfoot", "onyx", "leftover", "naïve")), max_size=8, unique=True
    ),
    st.sampled_from([" ", ", ", "; ", " (", ") ", "\n"]),
    st.booleans(),
)
def test_offsets_are_those_of_whole_words(parts: list[str], between: str, loud: bool) -> None:
    starts = [sum(len(part) + len(between) for part in parts[:number]) for number in range(len(parts))]
    caption = between.join(part.upper() if loud else part for part in parts)
    known = [(part, start) for part, start in zip(parts, starts, strict=True) if part in RULES]
    assert find(caption, RULES) == [(RULES.index(part), start, start + len(part)) for part, start in known]


def test_answers_are_bounded_in_size_and_time(stub: Stub, tmp_path: Path) -> None:
    ask = endpoint(stub, tmp_path, key_variable=None, timeout=0.5)
    stub.stream, stub.pause = b" ", 0.05  # each byte comes in time
    started = time.monotonic()
    with pytest.raises(DataError, match="sends too slowly"):
        ask("hello")
    stub.stream, stub.pause = b" " * 2**20, 0.0
    with pytest.raises(DataError, match="sends more than 8 MB"):
        endpoint(stub, tmp_path, key_variable=None)("hello")
    assert time.monotonic() - started < 20
    stub.stream = b""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clean", ["[" * 100_000, '["\\ud800"]', "\ud800"], ids=["deep", "half", "half, bare"])
def test_answers_that_no_file_can_hold(stub: Stub, tmp_path: Path, clean: str) -> None:
    stub.clean = clean
    with pytest.raises(DataError):
        by_model(CAPTIONS, endpoint(stub, tmp_path, key_variable=None))


def test_redirects_are_not_followed(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    for target in (f"file://{tmp_path / 'secret'}", "ftp://127.0.0.1/secret", f"http://127.0.0.1:{stub.server_port}/"):
        stub.redirect = target
        with pytest.raises(DataError, match="HTTP 302"):
            endpoint(stub, tmp_path / "cache", key_variable=None)("hello")


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:9/v1",
        "http://hunter2@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?key=hunter2",
        "http://127.0.0.1:9/v1#hunter2",
        "http://user:hunter2@127.0.0.1:port/v1",
        "ftp://user:hunter2@127.0.0.1/v1",
        "user:hunter2@127.0.0.1/v1",
        "http://[hunter2",
    ],
)
def test_secrets_in_addresses_are_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        Endpoint(url, "tiny", tmp_path, key_variable=None)
    assert "hunter2" not in str(caught.value)


def test_failures_name_the_host_alone(tmp_path: Path) -> None:
    ask = Endpoint("http://127.0.0.1:9/hunter2/v1", "tiny", tmp_path, key_variable=None, attempts=1)
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9 gave no answer") as caught:
        ask("hello")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"answer": 5}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_answer_is_asked_for_again(stub: Stub, tmp_path: Path, damage: bytes) -> None:
    ask = endpoint(stub, tmp_path, key_variable=None)
    found = by_model(CAPTIONS, ask)
    kept = sorted(tmp_path.iterdir())
    kept[0].write_bytes(damage)
    assert by_model(CAPTIONS, ask) == found and len(stub.prompts) == 5
    assert sorted(tmp_path.iterdir()) == kept and "answer" in json.loads(kept[0].read_text())


def test_it_answers_where_a_loop_is_running(stub: Stub, tmp_path: Path) -> None:
    async def notebook() -> str:
        return endpoint(stub, tmp_path, key_variable=None)("Rewrite it. Caption: Yes")

    assert asyncio.run(notebook()) == '"yes"'


def test_heads_of_answers_are_bounded_in_time_too(stub: Stub, tmp_path: Path) -> None:
    stub.head_pause, started = 0.1, time.monotonic()  # each byte comes in time
    with pytest.raises(DataError, match="TimeoutError, attempt 1"):
        endpoint(stub, tmp_path, key_variable=None, timeout=0.5, attempts=1)("hello")
    stub.head_pause = 0.0
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("wrong", [{"timeout": float("nan")}, {"timeout": 0.0}, {"attempts": 0}])
def test_numbers_that_make_no_sense(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Endpoint("http://127.0.0.1:9/v1", "tiny", tmp_path, key_variable=None, **wrong)
