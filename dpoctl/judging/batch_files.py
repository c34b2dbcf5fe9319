"""Batch files of the chat-completions protocol: JSONL of requests, and of their results.

One request a line, found again by its `custom_id`, here the digest by which its answer is cached. Results come in any
order, with answers and errors in one file or in two. OpenAI's batches have this format, and `vllm run-batch`:
https://platform.openai.com/docs/guides/batch and https://docs.vllm.ai/en/latest/examples/offline_inference/openai_batch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

from ..runtime.http import without_key
from ..runtime.server_errors import ServerError, read_error, status_of
from .replies import Answer, ErrorInside, NoChoice, read_answer

ENDPOINT: Final = "/v1/chat/completions"
MOST_REQUESTS = 50_000  # of a file
MOST_BYTES = 200_000_000
_BYTES_PER_TOKEN = 3  # few texts have less; a guess that is rather too high, since it is held against --max-cost


def request_line(digest: str, body: Mapping[str, Any]) -> str:
    """A request as a line of a batch file."""
    return json.dumps({"custom_id": digest, "method": "POST", "url": ENDPOINT, "body": body}) + "\n"


def parts(lines: Mapping[str, str], most: int, most_bytes: int = MOST_BYTES) -> Iterator[dict[str, str]]:
    """Lines by digest, divided into files of at most `most` requests and so many bytes."""
    part: dict[str, str] = {}
    size = 0
    for digest, line in lines.items():  # ASCII
        if part and (len(part) == most or size + len(line) > most_bytes):
            yield part
            part, size = {}, 0
        part[digest] = line
        size += len(line)
    if part:
        yield part


def tokens_at_most(line: str) -> int:
    """About the most prompt tokens that a request has."""
    messages = json.loads(line)["body"]["messages"]
    return sum(len(str(message["content"]).encode()) for message in messages) // _BYTES_PER_TOKEN + 16


class Result(NamedTuple):
    """A line of results: the request's digest, and the answer or the error. `no_choice`: a response without any."""

    digest: str
    answer: Answer | None = None
    error: ServerError | None = None
    no_choice: bool = False


class Results(NamedTuple):
    """The results of a file by digest; `damaged`: how many lines cannot be read, as of a file that is cut."""

    found: dict[str, Result]
    damaged: int


def read_results(text: str, key: str = "") -> Results:
    """The results in a file's text; `key` is that of the server, which may repeat it."""
    found: dict[str, Result] = {}
    damaged = 0
    for line in filter(str.strip, text.split("\n")):
        try:
            result = _result(json.loads(line), key)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
            continue
        if result.digest not in found or result.answer:
            found[result.digest] = result
    return Results(found, damaged)


def _result(line: dict[str, Any], key: str) -> Result:
    """Raises ValueError and the like for a line of another form."""
    digest, response, error = line["custom_id"], line.get("response") or {}, line.get("error")
    if not isinstance(digest, str):
        raise TypeError("custom_id: not a text")
    body, status = response.get("body"), response.get("status_code")
    if status in (None, 200) and body and not error:
        return _read(digest, body, key)
    said = error or body or "no response"
    status = status if isinstance(status, int) and status != 200 else status_of(_inner(said))
    told = read_error(status, said)
    return Result(digest, error=replace(told, message=without_key(told.message, key)))


def _read(digest: str, body: Any, key: str) -> Result:
    try:
        answer = read_answer(json.dumps(body))
    except ErrorInside as e:
        return Result(digest, error=replace(e.error, message=without_key(e.error.message, key)))
    except NoChoice as e:
        return Result(digest, error=ServerError(200, f"a response with {e}"), no_choice=True)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        return Result(digest, error=ServerError(500, f"a malformed response ({type(e).__name__})"))
    return Result(digest, replace(answer.changed(lambda text: without_key(text, key)), batch=True))


def _inner(error: Any) -> Any:
    return error.get("error", error) if isinstance(error, dict) else error
