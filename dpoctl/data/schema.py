"""The schema of each kind of row file, as a check of one row that returns the row in its normal form.

A field that is null counts as absent (`datasets` writes null where a row lacks a column). Unknown fields are kept.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from .fields import (
    BadRow,
    check_answer,
    check_finish,
    check_ids,
    check_k,
    check_messages,
    check_number,
    check_prompt_id,
    check_string,
    check_text,
    missing,
    says_something,
)
from .jsonl import named
from .shapes import ASSISTANT, HUMAN

Check = Callable[[int, dict], dict]  # (0-based row number, row) -> the row in its normal form; raises BadRow

_TEXT_SHAPES = "a string ('text', 'prompt' and 'completion', or 'messages')"
_UNPAIRED = (
    "pair a good and a bad answer to one prompt, as 'chosen' and 'rejected'; train-dpo --loss kto --unpaired "
    "(or --loss bco) trains on single completions with a label"
)
VERDICTS = ("a", "b", "tie", "invalid")
_EVALUATION_METRICS = (
    "step",
    "temperature",
    "reward",
    "reward_se",
    "kl",
    "kl_se",
    "kl_exact",
    "kl_exact_se",
    "n",
    "length",
    "length_se",
    "ended",
    "perplexity_ref",
    "perplexity_lm",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "repetition",
)


def check_of(kind: str) -> Check:
    """The check for a file of `kind`: text, prompts, completions, samples, judgements, preferences, known (pairs of
    which the better answer is known), unpaired or evaluations.

    Each file needs a check of its own: that of prompts and completions remembers earlier rows.
    """
    return _CHECKS[kind]()


def shape_of(row: dict) -> str | None:
    """What a text row is trained on: `text`, `completion` (with its prompt) or `messages`; None where it has none."""
    if row.get("text") is not None:
        return "text"
    if row.get("completion") is not None:
        return "completion"
    return "messages" if row.get("messages") is not None else None


# --- the kinds -------------------------------------------------------------------------------------------------------


def _text_row(number: int, row: dict) -> dict:
    """`text`, `prompt` and `completion`, or `messages`; a list of messages in `text` becomes `messages`."""
    check_finish(row, "finish")
    if isinstance(row.get("text"), list):
        row = {"messages": row["text"], **{key: row[key] for key in row if key not in ("text", "messages")}}
    shape = shape_of(row)
    if shape == "text":
        check_string(row["text"], "text")
    elif shape == "messages":
        if not isinstance(row["messages"], list):
            raise BadRow("messages", "a list of messages", named(row["messages"]))
        _split_dialogue(check_messages(row["messages"], "messages"), "messages")
    elif row.get("chosen") is not None:
        field = "completion" if row.get("prompt") is not None else "text"
        hint = f"these look like preferences: sft takes --field chosen, other commands --columns {field}=chosen"
        raise BadRow("text", _TEXT_SHAPES, "nothing", hint)
    elif shape is None and row.get("prompt") is None:
        raise missing(row, "text", _TEXT_SHAPES)
    else:
        check_text(row, "prompt")
        check_answer(row, "completion", "completion_ids", "finish")
        check_ids(row, "prompt_ids")
    return row


class Repeated(Exception):
    """A prompt that an earlier row of the file has: one of the two is enough."""


class _PromptRow:
    """`prompt`; a `prompt_id`, by default the row number; perhaps `prompt_ids` and `reference`.

    Preferences are prompts too: they are split as for training. Raises Repeated for a row with the prompt and the
    prompt_id of another, and for one without a prompt_id whose prompt another row has.
    """

    def __init__(self) -> None:
        self.prompt_of: dict[str, bytes] = {}  # by prompt_id, as a digest
        self.seen: set[bytes] = set()

    def __call__(self, number: int, row: dict) -> dict:
        if row.get("chosen") is not None and row.get("rejected") is not None:
            row = _split_preference(row)
        elif row.get("prompt") is None and row.get("chosen") is not None:
            row = {**row, "prompt": _split_dialogue(_checked_messages(row["chosen"], "chosen"), "chosen")[0]}
        check_text(row, "prompt")
        has_id = row.get("prompt_id") is not None
        check_prompt_id(row, str(number))
        check_ids(row, "prompt_ids")
        if row.get("reference") is not None:
            check_text(row, "reference")
        parts = json.dumps([row["prompt"], row.get("tools"), row.get("chat_template_kwargs")], sort_keys=True)
        asked = hashlib.blake2b(parts.encode(), digest_size=16).digest()
        before = self.prompt_of.get(row["prompt_id"])
        if before == asked or (not has_id and asked in self.seen):
            raise Repeated
        # A row's random numbers depend on its prompt_id: two prompts with the same one would get the same samples.
        if before is not None:
            raise BadRow("prompt_id", "one prompt for each", f"another one for {row['prompt_id']!r}")
        self.prompt_of[row["prompt_id"]] = asked
        self.seen.add(asked)
        # The ids of answers belong to the tokenizer of the row, which may not be that of what is sampled now.
        return {name: value for name, value in row.items() if name not in ("chosen_ids", "rejected_ids")}


class _CompletionRow:
    """`prompt`, `completion` and `k`, which by default counts up within the prompt_id; perhaps a score."""

    def __init__(self) -> None:
        self.prompt_of: dict[str, str | list] = {}  # by prompt_id
        self.ks: dict[tuple, set[int]] = {}  # by prompt_id, temperature and training step, which have k = 0 each

    def __call__(self, number: int, row: dict) -> dict:
        check_text(row, "prompt")
        check_prompt_id(row, str(number))
        check_answer(row, "completion", "completion_ids", "finish")
        check_ids(row, "prompt_ids")
        check_k(row, "k")
        for name in ("score", "temperature", "step"):
            check_number(row, name)
        prompt_id = row["prompt_id"]
        ks = self.ks.setdefault((prompt_id, row.get("temperature"), row.get("step")), set())
        if row.get("k") is None:
            row["k"] = len(ks)
        if row["k"] in ks:
            raise BadRow("k", "one row for each prompt_id and k", f"k {row['k']} of {prompt_id!r} a second time")
        if self.prompt_of.setdefault(prompt_id, row["prompt"]) != row["prompt"]:
            raise BadRow("prompt", "one prompt for each prompt_id", f"another one for {prompt_id!r}")
        ks.add(row["k"])
        return row


def _sample_row(number: int, row: dict) -> dict:
    """`prompt` and `completion`; perhaps a prompt_id, a score, and a k that other rows may have too."""
    check_text(row, "prompt")
    check_prompt_id(row)
    check_answer(row, "completion", "completion_ids", "finish")
    check_ids(row, "prompt_ids")
    check_k(row, "k")
    for name in ("score", "temperature", "step"):
        check_number(row, name)
    return row


def _judgement_row(number: int, row: dict) -> dict:
    """`prompt_id`, `k`, `prompt`, the candidates `a` and `b` as text, the `verdict`; perhaps `judge`, `b_k` and `p`."""
    for name in ("prompt_id", "k", "prompt", "a", "b", "verdict"):
        if row.get(name) is None:
            raise BadRow(name, "what every row of dpoctl judge has", "nothing")
    check_prompt_id(row)
    for name in ("k", "b_k"):
        check_k(row, name)
    for name in ("prompt", "a", "b"):
        check_string(row[name], name, empty=name != "prompt")
    if row["verdict"] not in VERDICTS:
        raise BadRow("verdict", f"one of {', '.join(VERDICTS)}", named(row["verdict"]))
    if row.get("judge") is not None:
        check_string(row["judge"], "judge")
    for name in ("temperature", "step", "p"):
        check_number(row, name)
    if row.get("p") is not None and not 0 <= row["p"] <= 1:
        raise BadRow("p", "a probability from 0 to 1", named(row["p"]))
    return row


def _known_row(number: int, row: dict) -> dict:
    """`prompt`, the answers `a` and `b`, and which of them is `preferred`: a, b or tie."""
    check_prompt_id(row)
    for name in ("prompt", "a", "b"):
        check_text(row, name)
    preferred = row.get("preferred")
    if not isinstance(preferred, str) or preferred.strip().lower() not in ("a", "b", "tie"):
        got = "nothing" if preferred is None else named(preferred)
        raise BadRow("preferred", "which answer is better: a, b or tie", got)
    return row | {"preferred": preferred.strip().lower()}


def _preference_row(number: int, row: dict) -> dict:
    """`prompt`, `chosen` and `rejected`; full dialogues in `chosen` and `rejected` are split into the three."""
    check_prompt_id(row)
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            if row.get("completion") is not None and row.get("label") is not None:
                raise BadRow(name, "a pair of answers", "one 'completion' with a 'label'", _UNPAIRED)
            raise missing(row, name, "a string or a list of messages")
    row = _split_preference(row)
    check_text(row, "prompt")
    check_ids(row, "prompt_ids")
    for name in ("chosen", "rejected"):
        check_answer(row, name, f"{name}_ids", f"{name}_finish")
        check_number(row, f"{name}_score")
        check_k(row, f"{name}_k")
    for name in ("margin", "chosen_share", "weight"):
        check_number(row, name)
    if (row.get("weight") or 0) < 0:
        raise BadRow("weight", "a number of 0 or more", named(row["weight"]))
    return row


def _unpaired_row(number: int, row: dict) -> dict:
    """`prompt`, `completion` and a `label`, or with --threshold a `score`."""
    check_prompt_id(row)
    if row.get("chosen") is not None and row.get("completion") is None:
        raise BadRow(
            "completion",
            "a completion with a 'label'",
            "a pair",
            "these are pairs: leave --unpaired out, or choose a loss of pairs",
        )
    check_text(row, "prompt")
    check_answer(row, "completion", "completion_ids", "finish")
    check_ids(row, "prompt_ids")
    if not isinstance(row.get("label"), bool):
        check_number(row, "label")
    for name in ("score", "weight"):
        check_number(row, name)
    if (row.get("weight") or 0) < 0:
        raise BadRow("weight", "a number of 0 or more", named(row["weight"]))
    return row


def _evaluation_row(number: int, row: dict) -> dict:
    """`model` and the metrics of `dpoctl evaluate`."""
    if row.get("model") is None:
        raise missing(row, "model", "a string")
    for name in ("model", "method", "scorer", "lm"):
        if row.get(name) is not None and not isinstance(row[name], str):
            raise BadRow(name, "a string", named(row[name]))
    if not isinstance(row.get("options") or {}, dict):
        raise BadRow("options", "an object", named(row["options"]))
    for name in _EVALUATION_METRICS:
        check_number(row, name)
    return row


_CHECKS: dict[str, Callable[[], Check]] = {
    "text": lambda: _text_row,
    "prompts": _PromptRow,
    "completions": _CompletionRow,
    "samples": lambda: _sample_row,
    "judgements": lambda: _judgement_row,
    "preferences": lambda: _preference_row,
    "known": lambda: _known_row,
    "unpaired": lambda: _unpaired_row,
    "evaluations": lambda: _evaluation_row,
}


# --- full dialogues --------------------------------------------------------------------------------------------------


def _checked_messages(value: Any, field: str) -> Any:
    return check_messages(value, field) if isinstance(value, list) else value


def _split_dialogue(value: str | list[dict], field: str) -> tuple[str | list[dict], str | list[dict]]:
    """(the dialogue before its last answer, that answer): a string splits at its last turn."""
    if isinstance(value, list):
        if not value or value[-1]["role"] != "assistant":
            got = f"one of role '{value[-1]['role']}'" if value else "none"
            raise BadRow(field, "a last message of the assistant", got)
        if not any(map(says_something, value[:-1])):
            raise BadRow(field, "a message with text before the answer", "none")
        if not says_something(value[-1]):
            raise BadRow(field, "text in the last message", "an empty string")
        return value[:-1], value[-1:]
    prompt, turn, answer = check_string(value, field).rpartition(ASSISTANT)
    if turn and HUMAN in answer:
        raise BadRow(field, "a dialogue that ends with an answer", f"a {HUMAN!r} turn after the last one")
    if not turn:
        hint = "give the prompt as a field of its own: 'prompt', 'chosen', 'rejected'"
        raise BadRow(field, f"a dialogue with an {ASSISTANT!r} turn, as there is no 'prompt'", named(value), hint)
    return prompt + turn, answer


def _split_preference(row: dict) -> dict:
    """The row with prompt, chosen and rejected, where chosen and rejected hold the full dialogue.

    They do where there is no prompt, where they are messages whose first is not the assistant's, and where they are
    texts of the HH format that begin with the prompt: the prompt then only repeats what they hold.
    """
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for name in ("chosen", "rejected"):
        _checked_messages(row[name], name)
        if type(row[name]) is not type(chosen):
            raise BadRow(name, "the same form as 'chosen' (a string or a list of messages)", named(row[name]))
    if prompt is not None and not _repeats_prompt(chosen, rejected, prompt):
        return row
    if prompt is None and isinstance(chosen, str) and ASSISTANT not in chosen:
        others = [name for name in row if not name.startswith(("chosen", "rejected"))]
        if "prompt" in row or any(isinstance(row[name], str | list) for name in others):
            raise missing(row, "prompt", "a string or a list of messages")
    before, chosen = _split_dialogue(chosen, "chosen")
    other, rejected = _split_dialogue(rejected, "rejected")
    if before != other:
        raise BadRow("rejected", "the same dialogue as 'chosen' up to the last answer", "another")
    if isinstance(before, list) and prompt is not None and not _is_part(prompt, before):
        raise BadRow("prompt", "the messages that 'chosen' begins with", named(prompt))
    return {**row, "prompt": before, "chosen": chosen, "rejected": rejected}


def _repeats_prompt(chosen: str | list, rejected: str | list, prompt: str | list) -> bool:
    if isinstance(chosen, list):
        return chosen[0]["role"] != "assistant"
    if not isinstance(prompt, str) or not isinstance(rejected, str) or not prompt.rstrip().endswith(ASSISTANT.strip()):
        return False
    return chosen.startswith(prompt) and rejected.startswith(prompt)


def _is_part(prompt: str | list, dialogue: list[dict]) -> bool:
    """Whether a prompt beside a dialogue is that dialogue, or the text of one of its messages, apart from blanks."""
    if isinstance(prompt, list):
        if not all(isinstance(message, dict) for message in prompt):
            return False
        return [_plain(message.get("content")) for message in prompt] == [_plain(m.get("content")) for m in dialogue]
    if not isinstance(prompt, str):
        return False
    return _plain(prompt) in ("", *(_plain(message.get("content")) for message in dialogue))


def _plain(text: str | None) -> str:
    return " ".join((text or "").split())
