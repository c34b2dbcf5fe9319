"""Options of the commands that only read and write files: prepare, merge, report."""

from collections.abc import Iterator
from dataclasses import dataclass

from ..outputs.manifests import is_row_file
from .conditions import When, all_of, any_of, given, not_given, one_of
from .schema import amended, option
from .shared import DATA, RUN, SAVE_DTYPES, Common, Tabular

_PREFIXES = one_of("task", "imdb", "toy")
_FROM_HUB = all_of(one_of("task", "imdb", "hh", "tldr", "cnn-dm"), not_given("source"))
_TRAINING = one_of("task", "imdb", "toy", "hh", "tldr")
_RANDOM = any_of(_PREFIXES, all_of(one_of("task", "hh", "tldr"), given("source")))


@dataclass(frozen=True, kw_only=True)
class Prepare(Common):
    task: str = option(
        help="What to prepare.", panel=DATA, choices=("imdb", "toy", "hh", "tldr", "cnn-dm"), argument=True
    )
    source: str | None = option(
        None,
        "The task's rows on disk instead of the Hub: .jsonl, .jsonl.gz, .csv or .parquet. imdb: `text`, `label`; "
        "hh: `chosen`, `rejected`; tldr: `prompt` with `chosen`, `rejected` or with `label`; cnn-dm: `article`, "
        "`highlights`.",
        DATA,
        input="file",
        when=one_of("task", "imdb", "hh", "tldr", "cnn-dm"),
    )
    tokenizer: str | None = option(
        None, "Tokenizer that prompt lengths are counted with.", DATA, input="model", when=one_of("task", "imdb")
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the data set on the Hub.", DATA, metavar="REVISION", when=_FROM_HUB
    )
    limit: int | None = option(
        None, "Use only the first N reviews, dialogues or posts (toy: make N reviews for SFT).", DATA, at_least=4
    )
    train_prompts: int = option(2000, "Prompts for make-prefs.", DATA, at_least=1, when=_TRAINING)
    test_prompts: int = option(500, "Prompts for evaluation, from other reviews, dialogues or posts.", DATA, at_least=1)
    min_prefix: int = option(2, "Shortest prompt, in tokens.", DATA, at_least=1, when=_PREFIXES)
    max_prefix: int = option(8, "Longest prompt, in tokens.", DATA, at_least=1, when=_PREFIXES)
    seed: int = option(0, "Random seed.", RUN, at_least=0, when=_RANDOM)

    def check_tokenizer(self) -> Iterator[str]:
        if self.task == "imdb" and not self.tokenizer:
            yield "--tokenizer is required: prompt lengths are counted in its tokens"

    def check_prefix(self) -> Iterator[str]:
        if _PREFIXES.holds(self) and self.min_prefix > self.max_prefix:
            yield f"--min-prefix {self.min_prefix} is more than --max-prefix {self.max_prefix}"


_ADAPTER = When(lambda c: not c.is_rows, lambda c: "with shards of rows", "with an adapter")
_SHARDS = When(lambda c: c.is_rows, lambda c: "with an adapter", "with shards of rows")


@amended(json={"when": any_of(_SHARDS, given("dry_run"))})
@dataclass(frozen=True, kw_only=True)
class Merge(Tabular, Common):
    inputs: tuple[str, ...] = option(
        help="All shards of a row output, or the directory of one adapter.",
        panel=DATA,
        argument=True,
        input="file",
        metavar="INPUT...",
    )
    out: str = option(
        help="File to write, or directory of the merged model.", panel=RUN, identity=False, metavar="PATH"
    )
    base: str | None = option(
        None,
        "Model that the adapter was trained on (default: the one that it names).",
        DATA,
        input="model",
        when=_ADAPTER,
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the base on the Hub.", DATA, metavar="REVISION", when=_ADAPTER
    )
    trust_remote_code: bool = option(False, "Run code that comes with the base from the Hub.", DATA, when=_ADAPTER)
    save_dtype: str = option(
        "float32", "Precision of the merged model's weights.", RUN, choices=SAVE_DTYPES, when=_ADAPTER
    )

    @property
    def is_rows(self) -> bool:
        return all(map(is_row_file, self.inputs))

    def check_inputs(self) -> Iterator[str]:
        if not self.is_rows and len(self.inputs) > 1:
            yield "expected shards, which are .jsonl files, or the directory of one adapter"


@dataclass(frozen=True, kw_only=True)
class Report(Tabular, Common):
    inputs: tuple[str, ...] = option(
        help="Run directories; files of evaluations, judgements and completions.",
        panel=DATA,
        argument=True,
        input="file",
        metavar="INPUT...",
    )
    title: str = option("Reward against KL", "Heading of the page.", RUN)
