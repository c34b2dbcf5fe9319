"""Options of the commands that only read and write files: prepare, merge, report."""

from dataclasses import dataclass

from ..outputs.manifests import is_row_file
from .schema import option
from .shared import (
    DATA,
    RUN,
    Common,
    Tabular,
)


@dataclass(frozen=True, kw_only=True)
class Prepare(Common):
    task: str = option(help="What to prepare.", choices=("imdb", "toy", "hh", "tldr", "cnn-dm"), argument=True)
    source: str | None = option(
        None,
        "The task's rows on disk instead of the hub: .jsonl, .jsonl.gz, .csv or .parquet. imdb: `text`, `label`; "
        "hh: `chosen`, `rejected`; tldr: `prompt` with `chosen`, `rejected` or with `label`; cnn-dm: `article`, "
        "`highlights`.",
        DATA,
        input="file",
    )
    tokenizer: str | None = option(
        None, "Tokenizer whose tokens the prefixes count (toy: its own).", DATA, input="model"
    )
    revision: str | None = option(None, "Revision of the hub's data set.", DATA)
    limit: int | None = option(None, "Use the first so many reviews (toy: invent so many for SFT).", DATA, at_least=4)
    train_prompts: int = option(2000, "Prompts for make-prefs.", DATA, at_least=1)
    test_prompts: int = option(500, "Prompts for evaluation, from other reviews, dialogues or posts.", DATA, at_least=1)
    min_prefix: int = option(2, "Shortest prompt, in tokens.", DATA, at_least=1)
    max_prefix: int = option(8, "Longest prompt, in tokens.", DATA, at_least=1)

    def problems(self) -> list[str]:
        found = []
        if self.task == "imdb" and not self.tokenizer:
            found.append("--tokenizer is required: prompts are prefixes of so many of its tokens")
        if self.task in ("hh", "tldr", "cnn-dm") and self.tokenizer:
            found.append(f"--tokenizer means nothing to {self.task}: its prompts are whole texts")
        if self.task == "toy" and (self.source or self.tokenizer or self.revision):
            found.append("--source, --tokenizer and --revision mean nothing to the toy world, which makes its own")
        if self.min_prefix > self.max_prefix:
            found.append(f"--min-prefix {self.min_prefix} is more than --max-prefix {self.max_prefix}")
        return found


@dataclass(frozen=True, kw_only=True)
class Merge(Tabular, Common):
    inputs: tuple[str, ...] = option(
        help="All shards of a row output, or the directory of one adapter.",
        argument=True,
        input="file",
        metavar="INPUT...",
    )
    out: str = option(
        help="File to write, or directory of the merged model.", panel=RUN, identity=False, metavar="PATH"
    )
    base: str | None = option(
        None, "Model that the adapter was trained on (default: the one that it names).", input="model"
    )
    revision: str | None = option(None, "Branch, tag or commit of the base, where it is a hub id.", RUN)
    trust_remote_code: bool = option(False, "Run the code that a hub model brings along.", RUN)
    save_dtype: str = option(
        "float32", "Precision of the merged model's weights.", RUN, choices=("float32", "bfloat16", "float16")
    )

    @property
    def is_rows(self) -> bool:
        return all(map(is_row_file, self.inputs))

    def problems(self) -> list[str]:
        if self.is_rows:
            given = {"--base": self.base, "--revision": self.revision, "--trust-remote-code": self.trust_remote_code}
            given["--save-dtype"] = self.save_dtype != "float32"
            return [f"{flag} means nothing to shards of rows" for flag, value in given.items() if value]
        if len(self.inputs) > 1:
            return ["either shards, which are .jsonl files, or one adapter's directory"]
        return []


@dataclass(frozen=True, kw_only=True)
class Report(Tabular, Common):
    inputs: tuple[str, ...] = option(
        help="Run directories; files of evaluations, judgements and completions.",
        argument=True,
        input="file",
        metavar="INPUT...",
    )
    title: str = option("Reward against KL", "Heading of the page.")
