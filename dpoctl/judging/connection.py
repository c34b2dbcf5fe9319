"""The connection to a judge's server through the package openai: its key, and what a failed request means."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..config.judge_options import JudgeOptions
from ..config.schema import flag_named
from ..errors import InputError
from ..runtime.http import retry_after_s, without_key
from ..runtime.server_errors import ServerError, error_in
from .replies import ErrorInside, NoChoice


@dataclass(frozen=True)
class Failure:
    """A request without an answer: the server's `error`, or None where it sent nothing that can be read."""

    reason: str
    error: ServerError | None = None
    wait_s: float = 0.0  # what the server asks to wait
    without_choice: bool = False


class Connection:
    """`client` is that of the package openai, which retries nothing. No file and no message contains the key."""

    def __init__(self, config: JudgeOptions):
        """Raises InputError where the package is not installed, and where OpenAI's server has no key.

        The key comes from OPENAI_API_KEY.
        """
        try:
            import openai
        except ImportError:
            hint = "pip install 'dpoctl[judge]'"
            raise InputError("a judge on a server: the package openai is not installed", hint) from None
        self.config, self.openai = config, openai
        self.key = os.environ.get("OPENAI_API_KEY", "")
        if not self.key and not config.judge_base_url:
            flag = flag_named(config, "judge_base_url")
            raise InputError("OPENAI_API_KEY is not set", hint=f"or give {flag} of a server that needs no key")
        self.client = openai.OpenAI(
            api_key=self.key or "none", base_url=config.judge_base_url, timeout=config.judge_timeout, max_retries=0
        )

    def attempt(self, call: Callable[[], Any], timeout_s: float | None = None) -> Any:
        """What `call` returns, or the Failure of a request that it makes; `timeout_s`, where it has one of its own."""
        openai = self.openai
        malformed = (openai.APIError, ValueError, TypeError, AttributeError, KeyError, IndexError)
        try:
            return call()
        except ErrorInside as e:
            error = replace(e.error, message=self.without_key(e.error.message))
            return Failure(f"an error in a response of status 200: {error}", error)
        except NoChoice as e:
            return Failure(f"a response with {e}", without_choice=True)
        except openai.APIStatusError as e:
            error = error_in(e.status_code, e.response.text, self.key, type(e).__name__)
            return Failure(f"status {error}", error, retry_after_s(e.response.headers))
        except openai.APITimeoutError:
            flag = flag_named(self.config, "judge_timeout")
            within = f"{flag} {self.config.judge_timeout:g} s" if timeout_s is None else f"{timeout_s:g} s"
            return Failure(f"no response within {within}")
        except openai.APIConnectionError as e:
            return Failure(f"{type(e).__name__} ({self.without_key(str(e.__cause__ or e))[:160]})")
        except malformed as e:  # not JSON, or without the fields that are needed
            return Failure(f"a malformed response ({type(e).__name__}: {self.without_key(str(e))[:160]})")

    def without_key(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return without_key(text, self.key)


def server_of(config: JudgeOptions) -> str:
    """The server's name in the keys of the cache."""
    return config.judge_base_url or "openai"
