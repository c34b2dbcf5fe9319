"""The requests and answers of servers that take token ids and return them: vLLM's completions, SGLang's generate.

Every parameter that changes the distribution is sent, since a server may have defaults of its own (those of the model's
generation_config.json).
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .engine import Sampled

_BROKEN_OFF = ("abort", "error")  # the server gave up on the request: it can be made again


class BadAnswer(Exception):
    """A response that is no usable answer to its request; its message completes "an answer"."""


class BrokenOff(Exception):
    """The server ended the request without an answer."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for. `stops`: the ids that end it; `stop`: strings that do; top_k 0 keeps all tokens.

    `logps`: its log-probs are wanted.
    """

    ids: list[int]
    stops: list[int]
    max_tokens: int
    seed: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    logps: bool = False

    @property
    def has_logps(self) -> bool:
        """Whether log-probs are wanted, and a server's, those of the unchanged logits, are of what is sampled."""
        return self.logps and self.temperature == 1 and self.top_p == 1 and self.top_k == 0


@dataclass(frozen=True)
class _Fields:
    """The fields of an answer: token ids, how it ended, and what the server counted; None where it does not say."""

    ids: Any
    finish: Any
    prompt_ids: Any = None
    prompt_tokens: Any = None
    completion_tokens: Any = None
    logps: Any = None


class Protocol(ABC):
    """How one kind of server is asked, below `path`."""

    path: str

    @abstractmethod
    def body(self, request: Request, model: str, *, of_prompt: bool = False) -> dict[str, Any]:
        """The JSON of a request; with `of_prompt` for the log-probs of the prompt's tokens too."""

    @abstractmethod
    def prompt_logps(self, data: dict[str, Any]) -> list[float]:
        """The log-probs of the prompt's tokens but the first. Raises BadAnswer for a response without them."""

    @abstractmethod
    def _fields(self, data: dict[str, Any]) -> _Fields: ...

    def read(self, data: Any, request: Request, vocabulary: int) -> Sampled:
        """The answer in a response, checked against its request; its ids are below `vocabulary`.

        Raises BadAnswer, and BrokenOff where the server says that it gave up.
        """
        try:
            found = self._fields(data)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BadAnswer("without the fields of a completion") from None
        if found.finish in _BROKEN_OFF:
            raise BrokenOff(f"finish_reason {found.finish}")
        ids = _checked_ids(found, request, vocabulary)
        stopped = _stopped(found.finish, ids, request)
        return Sampled(ids, stopped, _checked_logps(found.logps, len(ids)))


class Completions(Protocol):
    """vLLM's /v1/completions with `return_token_ids`, and servers that do the same."""

    path = "/completions"

    def body(self, request: Request, model: str, *, of_prompt: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": model,
            "prompt": request.ids,
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": request.seed,
            "stop_token_ids": request.stops,
            "ignore_eos": True,  # the stop ids hold every end token; the server's tokenizer may have another one
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "stream": False,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.has_logps:
            body["logprobs"] = 0
        return body | ({"prompt_logprobs": 0} if of_prompt else {})

    def prompt_logps(self, data: dict[str, Any]) -> list[float]:
        try:
            choice = data["choices"][0]
            ids = choice["prompt_token_ids"]
            return [float(at[str(id)]["logprob"]) for at, id in zip(choice["prompt_logprobs"], ids, strict=True) if at]
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise BadAnswer("without the log-probs of the prompt") from None

    def _fields(self, data: dict[str, Any]) -> _Fields:
        choice = data["choices"][0]
        usage = data["usage"] if isinstance(data.get("usage"), dict) else {}
        return _Fields(
            choice.get("token_ids"),
            choice["finish_reason"],
            choice.get("prompt_token_ids"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
            (choice.get("logprobs") or {}).get("token_logprobs"),
        )


class Generate(Protocol):
    """SGLang's /generate."""

    path = "/generate"

    def body(self, request: Request, model: str, *, of_prompt: bool = False) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_new_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": request.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": request.seed,
            "stop_token_ids": request.stops,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        if request.stop:
            parameters["stop"] = list(request.stop)
        body: dict[str, Any] = {"input_ids": request.ids, "sampling_params": parameters, "stream": False}
        if request.has_logps or of_prompt:
            body["return_logprob"] = True
        return body | ({"logprob_start_len": 0} if of_prompt else {})

    def prompt_logps(self, data: dict[str, Any]) -> list[float]:
        try:
            return [float(entry[0]) for entry in data["meta_info"]["input_token_logprobs"] if entry[0] is not None]
        except (KeyError, IndexError, TypeError, ValueError):
            raise BadAnswer("without the log-probs of the prompt") from None

    def _fields(self, data: dict[str, Any]) -> _Fields:
        about = data["meta_info"]
        finish = about["finish_reason"]
        logps = about.get("output_token_logprobs")
        return _Fields(
            data.get("output_ids"),
            finish["type"] if isinstance(finish, dict) else finish,
            data.get("prompt_token_ids"),
            about.get("prompt_tokens"),
            about.get("completion_tokens"),
            [entry[0] for entry in logps] if logps else None,
        )


def _checked_ids(found: _Fields, request: Request, vocabulary: int) -> list[int]:
    ids = found.ids
    if not _are_ids(ids) or not ids:
        raise BadAnswer("without token ids")
    if found.prompt_ids is not None and found.prompt_ids != request.ids:
        raise BadAnswer("to a prompt of other token ids than it was sent")
    if found.prompt_tokens is not None and found.prompt_tokens != len(request.ids):
        raise BadAnswer(f"to a prompt of {found.prompt_tokens} tokens; {len(request.ids)} were sent")
    if found.completion_tokens is not None and found.completion_tokens != len(ids):
        raise BadAnswer(f"with {len(ids)} token ids; the server counts {found.completion_tokens}")
    if len(ids) > request.max_tokens:
        raise BadAnswer(f"with {len(ids)} token ids; at most {request.max_tokens} were asked for")
    if max(ids) >= vocabulary:
        raise BadAnswer(f"with token id {max(ids)}; the vocabulary has {vocabulary}")
    return ids


def _stopped(finish: Any, ids: list[int], request: Request) -> bool:
    """Whether an answer stopped at an end token or a stop string. Raises BadAnswer where ids and finish disagree."""
    ends: Collection[int] = set(request.stops)
    early = next((id for id in ids[:-1] if id in ends), None)
    if early is not None:
        raise BadAnswer(f"that goes on after end token {early}")
    if finish == "stop":
        if ids[-1] not in ends and not request.stop:
            raise BadAnswer(f"that stops at token {ids[-1]}, which does not end an answer")
        return True
    if finish != "length":
        raise BadAnswer(f"with an unknown finish_reason {finish!r}")
    if ids[-1] not in ends and len(ids) < request.max_tokens:
        raise BadAnswer(f"that was cut at {len(ids)} tokens; {request.max_tokens} were asked for")
    return ids[-1] in ends


def _checked_logps(logps: Any, n: int) -> list[float]:
    numbers = isinstance(logps, list) and all(isinstance(each, int | float) for each in logps)
    return [float(each) for each in logps] if numbers and len(logps) == n else []


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids)
