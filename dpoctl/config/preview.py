"""Options of preview."""

from collections.abc import Iterator
from dataclasses import dataclass

from .conditions import When, all_of, not_given
from .sampling import Rows
from .schema import amended, option
from .shared import DATA, RUN, ChatTemplates, Tabular

PURPOSES = ("sft", "train-dpo", "train-rm", "train-ppo", "sample")


def _read_for(*purposes: str) -> When:
    """For these commands; --for may be left out, and is then found in the rows, so that the stage looks again."""
    shown = purposes[0] if len(purposes) == 1 else f"{', '.join(purposes[:-1])} or {purposes[-1]}"
    return When(lambda c: c.for_ in (None, *purposes), lambda c: f"with --for {c.for_}", f"with --for {shown}")


_TRAINING = _read_for(*PURPOSES[:4])
_WITH_ANSWERS = _read_for(*PURPOSES[:3])


@amended(
    template_date={"help": "The date for chat templates that write one (default: today)."},
    json={"help": "Print one JSON object on stdout instead of the text."},
)
@dataclass(frozen=True, kw_only=True)
class Preview(Tabular, Rows, ChatTemplates):
    data: str = option(help="Rows to look at.", panel=DATA, argument=True, input="file", metavar="DATA")
    model: str = option(help="Model whose tokenizer and chat template are used.", panel=DATA, input="model")
    for_: str | None = option(
        None,
        "Command that is to read the rows (default: what their fields are for).",
        DATA,
        choices=PURPOSES,
        flag="--for",
    )
    eval_data: str | None = option(
        None, "Held-out rows, whose prompts are looked for in DATA.", DATA, input="file", when=_WITH_ANSWERS
    )
    eval_prompts: str | None = option(
        None, "Prompts for evaluation, which are looked for in DATA.", DATA, input="file", when=_TRAINING
    )
    max_length: int | None = option(
        None,
        "Longest prompt + completion, in tokens (default: the command's).",
        DATA,
        at_least=2,
        when=_WITH_ANSWERS,
    )
    max_prompt_length: int | None = option(
        None, "Longest prompt, in tokens (default: the command's).", DATA, at_least=1
    )
    field: str | None = option(
        None,
        "Train on this side of the preference pairs.",
        DATA,
        choices=("chosen", "rejected"),
        when=_read_for("sft"),
    )
    answers: str = option(
        "all",
        "Which of a chat's answers to train on: all of the assistant's, or the last.",
        DATA,
        choices=("all", "last"),
        when=all_of(_read_for("sft"), not_given("field")),
    )
    overlong: str = option(
        "truncate",
        "What to do with texts over --max-length.",
        DATA,
        choices=("truncate", "drop", "split"),
        when=_read_for("sft"),
    )
    threshold: float | None = option(
        None,
        "Completions are desirable whose `label`, or else `score`, is at least this (default: the label is true).",
        DATA,
        when=_read_for("train-dpo"),
    )
    limit: int | None = option(None, "Read only the first N rows.", DATA, at_least=1)
    revision: str | None = option(None, "Branch, tag or commit of --model on the Hub.", DATA, metavar="REVISION")
    trust_remote_code: bool = option(False, "Run code that comes with the model from the Hub.", DATA)
    rows: int = option(3, "How many rows to show.", RUN, at_least=0, when=not_given("row"))
    row: int | None = option(None, "Show the row at this line of the file.", RUN, at_least=1)
    ids: bool = option(False, "Show the id of each token.", RUN, when=not_given("json"))

    def check_lengths(self) -> Iterator[str]:
        prompt, total = self.max_prompt_length, self.max_length
        if prompt is not None and total is not None and prompt >= total:
            yield f"--max-prompt-length {prompt} leaves no room within --max-length {total}"
