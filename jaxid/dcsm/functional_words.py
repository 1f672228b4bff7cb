"""Functional words of captions, found by a language model, or by rules without a network.

The model takes three steps. It is shown some captions at once, and says of each in a few words what distinguishes it
from the others. In its answers it marks functional words <LIKE THIS>, and prefers words that it marked before.
Finally it cleans the list of all marked words. Source: [DCSM] arXiv 2503.08723, the variant with a learned lookup.
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from jaxid.checks import check_finite
from jaxid.dcsm.placement import PUBLISHED, find
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, reading, write_text

Read = TypeVar("Read")

SIMPLIFY = (
    "Below are image captions as a JSON list. What distinguishes each of them from the others? Rewrite every caption "
    "as the shortest phrase that still says so, and leave out what the others say too. Put attributes before their "
    "object (a purple dog), negations before what is missing (a chicken but no butterfly), and a relation between its "
    "two objects (a bug above a bench). Answer with a JSON list of {count} texts alone, in the same order."
    "\n\nCaptions: {captions}"
)
MARK = (
    "Functional words are those that say how the things in a picture relate, differ in size, or are missing: "
    "positions, numbers, sizes, negations. Names of things, colours and verbs are not functional. Repeat the caption "
    "below word by word and put every functional word in angle brackets and capitals, <LIKE THIS>. If a word of this "
    "list says the same, put that word there instead: {known}. Answer with the caption alone.\n\nCaption: {caption}"
)
CLEAN = (
    "Below is a list of words that were marked in image captions as functional: words for positions, numbers, sizes "
    "and negations. Drop those that are none, and of several spellings of one word keep the usual one. Answer with a "
    "JSON list of strings alone.\n\n{words}"
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

_MARK = r"<([^<>]+)>"

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
        captions: reworded by the model, or as they were.
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
    together: int = 16,
    progress: bool = False,
) -> Found:
    """Functional words of captions according to a language model.

    Args:
        captions: the texts.
        ask: gives the answer to a prompt, such as `Endpoint(...)`.
        vocabulary: words to begin with.
        together: captions that the model sees at once, and tells from one another; neighbours in the order given.
        progress: show a progress bar, on terminals only.

    Raises:
        DataError: an answer is not what the step asks for; an `Endpoint` forgets it, so that the next run asks again.
    """
    from tqdm import tqdm

    words, marked, reworded = dict.fromkeys(word.lower() for word in vocabulary), dict[str, None](), list[str]()
    with tqdm(total=len(captions), unit="caption", disable=None if progress else True) as bar:
        for first in range(0, len(captions), together):
            shown = list(captions[first : first + together])
            prompt = SIMPLIFY.format(captions=json.dumps(shown, ensure_ascii=False), count=len(shown))
            step = f"step 1 (simplify, captions {first} to {first + len(shown) - 1})"
            for caption in _asked(ask, prompt, partial(_simplified, step=step, count=len(shown))):
                known = json.dumps([word.upper() for word in words | marked], ensure_ascii=False)
                prompt = MARK.format(caption=caption, known=known)
                step = f"step 2 (mark, caption {len(reworded)})"
                answer = _asked(ask, prompt, partial(_marked, step=step))
                marked |= {_line(word).lower(): None for word in re.findall(_MARK, answer) if word.strip()}
                reworded.append(_line(re.sub(_MARK, lambda match: match[1].lower(), answer)))
                bar.update()
    if marked:
        prompt = CLEAN.format(words=json.dumps(list(marked), ensure_ascii=False))
        cleaned = _asked(ask, prompt, _cleaned)
        order = {word: index for index, word in enumerate(marked)}
        words |= dict.fromkeys(sorted(cleaned, key=lambda word: order.get(word, len(order))))
    return Found(tuple(reworded), tuple(words))


def _asked(ask: Callable[[str], str], prompt: str, read: Callable[[str], Read]) -> Read:
    """What is read in the answer to a prompt; an answer that cannot be read is forgotten, so that it is asked again."""
    try:
        return read(ask(prompt))
    except DataError:
        if isinstance(ask, Endpoint):
            ask.forget(prompt)
        raise


def _simplified(answer: str, step: str, count: int) -> list[str]:
    """A caption for each that was shown."""
    texts = [_line(text) for text in _listed(answer, step)]
    if len(texts) != count or not all(texts):
        raise DataError(
            f"{step} gave {sum(map(bool, texts))} texts for {count} captions: {answer[:80]!r}. Show the model fewer "
            "captions at once."
        )
    return texts


def _marked(answer: str, step: str) -> str:
    """A caption with marks, in one line."""
    text = _line(answer).strip('"')
    if not re.sub("[<>]", "", text).strip() or not _is_unicode(text):
        raise DataError(f"{step} gave an empty answer: {answer[:80]!r}.")
    return text


def _cleaned(answer: str) -> list[str]:
    """The words of the clean list."""
    return [_line(word).lower() for word in _listed(answer, "step 3 (clean)") if word.strip()]


def _listed(answer: str, step: str) -> list[str]:
    """The JSON list of texts in an answer, which may be in a code block."""
    start, stop = answer.find("["), answer.rfind("]")
    try:
        texts = json.loads(answer[start : stop + 1]) if start >= 0 else None
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) and _is_unicode(text) for text in texts):
        raise DataError(f"{step} did not give a JSON list of texts: {answer[:80]!r}.")
    return texts


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
