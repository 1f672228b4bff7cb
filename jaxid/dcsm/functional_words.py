"""Functional words of captions, found by a language model, or by rules without a network.

Three steps of the model, one request each: every caption is simplified; its functional words are marked <LIKE THIS>;
the list of all marked words is cleaned. Source: [DCSM] arXiv 2503.08723, the variant with a learned lookup.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from jaxid.checks import check_finite
from jaxid.dcsm.placement import PUBLISHED, find
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, reading, write_text

SIMPLIFY = (
    "Rewrite the image caption below as one short plain sentence. Keep every object, every attribute, every relation "
    "between objects and every negation, and keep their words. Answer with the sentence alone.\n\nCaption: {caption}"
)
MARK = (
    "Functional words are those that say how the things in a picture relate, differ in size, or are missing: "
    "positions, sizes, negations. Names of things, colours and verbs of action are not functional. Repeat the caption "
    "below word by word and put every functional word in angle brackets and capitals, <LIKE THIS>. Answer with the "
    "caption alone.\n\nCaption: {caption}"
)
CLEAN = (
    "Below is a list of words that were marked in image captions as functional: words for positions, sizes and "
    "negations. Drop those that are none, and of several spellings of one word keep the usual one. Answer with a JSON "
    "list of strings alone.\n\n{words}"
)

RULES = (
    *PUBLISHED,
    *("to the left of", "to the right of", "in front of", "on top of", "next to", "in between", "on", "under", "over"),
    *("beneath", "underneath", "behind", "beside", "between", "inside", "outside", "near", "far from", "around"),
    *("top", "bottom", "large", "little", "tiny", "huge", "smaller", "bigger", "larger", "taller", "shorter"),
    *("never", "none", "nor", "neither", "except", "lacks", "missing", "nothing", "isn't", "aren't", "doesn't"),
)
"""Functional words of the rules; longer ones are matched first."""

_MOST_BYTES = 8 * 2**20
"""The longest answer that is accepted."""

_AGAIN = {408, 409, 429, 500, 502, 503, 504}
"""HTTP status codes after which a request is repeated."""


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file.

    Raises:
        DataError: if it cannot be read or holds none.
    """
    with reading(path, "lines of text", DataError):
        text = path.read_text(encoding="utf-8-sig")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{path} holds no lines.")
    return lines


class Found(NamedTuple):
    """Functional words of some captions.

    Attributes:
        captions: simplified by the model, or as they were.
        vocabulary: lower case, in the order in which they first appear; a given vocabulary comes first, spellings that
            only the model's clean list has come last.
    """

    captions: tuple[str, ...]
    vocabulary: tuple[str, ...]


def by_rules(captions: Sequence[str], vocabulary: Sequence[str] = ()) -> Found:
    """Functional words of captions by a list of words, without a network.

    Args:
        captions: the texts.
        vocabulary: words to begin with.
    """
    words = dict.fromkeys(word.lower() for word in vocabulary)
    for caption in captions:
        words |= {RULES[index]: None for index, _, _ in find(caption, RULES)}
    return Found(tuple(captions), tuple(words))


def by_model(
    captions: Sequence[str],
    ask: Callable[[str], str],
    vocabulary: Sequence[str] = (),
    *,
    progress: bool = False,
) -> Found:
    """Functional words of captions according to a language model.

    Args:
        captions: the texts.
        ask: gives the answer to a prompt, such as `Endpoint(...)`.
        vocabulary: words to begin with.
        progress: show a progress bar, on terminals only.

    Raises:
        DataError: an answer is not what the step asks for; an `Endpoint` forgets it, so that the next run asks again.
    """
    from tqdm import tqdm

    simple, marked = [], {}
    for index, caption in enumerate(tqdm(captions, unit="caption", disable=None if progress else True)):
        prompt = SIMPLIFY.format(caption=caption)
        simplified = _line(ask(prompt)).strip('"')
        if not simplified:
            _forget(ask, prompt)
            raise DataError(f"step 1 (simplify) gave an empty answer for caption {index}: {caption!r}.")
        simple.append(simplified)
        answer = ask(MARK.format(caption=simplified))
        marked |= {_line(word).lower(): None for word in re.findall(r"<([^<>]+)>", answer) if word.strip()}
    words = dict.fromkeys(word.lower() for word in vocabulary)
    if marked:
        prompt = CLEAN.format(words=json.dumps(list(marked), ensure_ascii=False))
        try:
            cleaned = _cleaned(ask(prompt))
        except DataError:
            _forget(ask, prompt)
            raise
        order = {word: index for index, word in enumerate(marked)}
        words |= dict.fromkeys(sorted(cleaned, key=lambda word: order.get(word, len(order))))
    return Found(tuple(simple), tuple(words))


def _forget(ask: Callable[[str], str], prompt: str) -> None:
    """Forgets cached answers, so that the next run asks again."""
    if isinstance(ask, Endpoint):
        ask.forget(prompt)


def _cleaned(answer: str) -> list[str]:
    """The JSON list in an answer, which may be in a code block."""
    start, stop = answer.find("["), answer.rfind("]")
    try:
        words = json.loads(answer[start : stop + 1]) if start >= 0 else None
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) and _is_unicode(word) for word in words):
        raise DataError(f"step 3 (clean) did not give a JSON list of words: {answer[:80]!r}.")
    return [_line(word).lower() for word in words if word.strip()]


def _line(text: str) -> str:
    """The text in one line, for files with one text per line."""
    return " ".join(text.split())


class Endpoint:
    """An OpenAI-compatible chat endpoint; answers are cached on disk, so that nothing is asked twice.

    Messages name the endpoint's host alone, so that they show nothing secret that its URL may hold.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        cache: Path,
        *,
        key_variable: str | None = "OPENAI_API_KEY",
        attempts: int = 5,
        timeout: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Prepares requests without sending any.

        Args:
            base_url: such as "http://localhost:8000/v1"; without user name, password, query or fragment.
            model: the model's name there.
            cache: folder of the answers.
            key_variable: environment variable that holds the key; None for endpoints without one.
            attempts: requests before giving up on one answer.
            timeout: seconds that one request may take in all.
            sleep: waits between attempts.

        Raises:
            InputError: for an address that is none or holds a password, a missing or unusable key, or numbers that
                make no sense.
        """
        check_finite("the timeout", timeout)
        if attempts < 1 or timeout <= 0:
            raise InputError(f"{attempts} attempts of {timeout} seconds: at least one is needed, and some time.")
        self.host = _host(base_url)
        self.url, self.model, self.cache = f"{base_url.rstrip('/')}/chat/completions", model, cache
        self.attempts, self.timeout, self.sleep = attempts, timeout, sleep
        self._certificates = httpx.create_ssl_context()  # once, as reading them is slow
        self._key = os.environ.get(key_variable, "").strip() if key_variable else ""
        if key_variable and not self._key:
            raise InputError(f"the environment variable {key_variable} holds no key; set it, or name another one.")
        if not (self._key.isascii() and self._key.isprintable()):  # else the HTTP client's own error shows the key
            raise InputError(
                f"the key in {key_variable} has line breaks or other characters that no HTTP header may hold."
            )

    def __call__(self, prompt: str) -> str:
        """The answer to a prompt.

        Raises:
            DataError: the endpoint refuses, cannot be reached, or answers in another form.
        """
        path = self._path(prompt)
        with contextlib.suppress(DataError):  # a damaged answer is asked for again
            kept = read_json(path, DataError, missing={}).get("answer")
            if isinstance(kept, str):
                return kept
        answer = self._answer(self._sent(self._body(prompt)))
        write_text(path, json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))
        return answer

    def forget(self, prompt: str) -> None:
        """Removes the cached answer to a prompt, if any."""
        self._path(prompt).unlink(missing_ok=True)

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(json.dumps([self.url, self._body(prompt)], sort_keys=True).encode()).hexdigest()[:32]
        return self.cache / f"{name}.json"

    def _sent(self, body: dict[str, Any]) -> Any:
        """The endpoint's answer in JSON; requests that may succeed later are repeated."""
        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=_seconds_to_wait,
            retry=retry_if_exception(_worth_repeating),
            sleep=self.sleep,
            reraise=True,
        )
        try:
            return json.loads(retrying(lambda: _run(self._post(json.dumps(body).encode()))))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:  # their texts may hold parts of an address
            refused = isinstance(error, httpx.HTTPStatusError)
            reason = f"HTTP {error.response.status_code}" if refused else type(error).__name__
            hint = "; is the key right?" if reason in ("HTTP 401", "HTTP 403") else ""
            attempt = retrying.statistics["attempt_number"]
            raise DataError(
                f"{self.host} gave no answer ({reason}, attempt {attempt}{hint}); finished ones are kept."
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.host} does not answer in JSON.") from error

    async def _post(self, body: bytes) -> bytes:
        """The answer's bytes, bounded in number and time; redirects are not followed."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        found, begun = bytearray(), False
        try:
            # httpx bounds the wait for the next byte, not for the last one.
            async with (
                httpx.AsyncClient(timeout=None, verify=self._certificates) as client,
                asyncio.timeout(self.timeout),
                client.stream("POST", self.url, content=body, headers=headers) as response,
            ):
                begun = True
                response.raise_for_status()
                async for part in response.aiter_bytes():
                    found += part
                    if len(found) > _MOST_BYTES:
                        raise DataError(
                            f"{self.host} sends more than {_MOST_BYTES // 2**20} MB; is it a chat endpoint?"
                        )
        except TimeoutError:
            if not begun:
                raise
            raise DataError(f"{self.host} sends too slowly: no whole answer in {self.timeout:g} s.") from None
        return bytes(found)

    def _answer(self, response: Any) -> str:
        try:
            answer = response["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(f"{self.host} answers in another form than OpenAI's chat completions.") from error
        if not isinstance(answer, str) or not _is_unicode(answer):
            raise DataError(f"{self.host} gave an answer without text.")
        return answer


def _run(work: Coroutine[Any, Any, bytes]) -> bytes:
    """Waits for a coroutine, even where a loop is running already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _worth_repeating(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _AGAIN
    return isinstance(error, httpx.TransportError | TimeoutError)


def _host(url: str) -> str:
    """Scheme and host of a valid address.

    Raises:
        InputError: which does not show the address, as it may hold a password.
    """
    if not re.match(r"https?://", url, re.IGNORECASE):
        raise InputError("the base URL must begin with http:// or https://.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError("the base URL is not an address such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            f"the base URL at {host} holds a user name, a password, a query or a fragment; leave them out, and give "
            "the key in an environment variable."
        )
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}"


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON may hold lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _seconds_to_wait(state: RetryCallState) -> float:
    """Seconds that an answer asks to wait, given as a number or a date, 60 at most; else 1, 2, 4, ..."""
    error, default = state.outcome and state.outcome.exception(), wait_exponential()(state)
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, httpx.HTTPStatusError) else ""
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(asked).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return default
    return min(60.0, max(0.0, seconds)) if seconds == seconds else default
