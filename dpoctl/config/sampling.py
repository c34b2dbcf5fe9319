"""Options of the commands that sample or score: make-prefs, sample, score, evaluate."""

import re
from dataclasses import dataclass

from .schema import option
from .shared import (
    DATA,
    GEN,
    RUN,
    SIEBERT,
    Common,
    Device,
    Tabular,
)


@dataclass(frozen=True, kw_only=True)
class Generation:
    temperature: float = option(1.0, "Sampling temperature; 0 is greedy.", GEN, at_least=0)
    top_p: float = option(1.0, "Keep the smallest set of tokens with this probability.", GEN, above=0, at_most=1)
    top_k: int = option(0, "Keep the k most probable tokens; 0 keeps all.", GEN, at_least=0)
    max_new_tokens: int = option(64, "Longest completion, in tokens.", GEN, at_least=1)
    generation_batch_size: int = option(
        256, "Completions generated side by side. Rounding, so the bytes, depend on it.", GEN, at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A row work that jobs of their own, or the ranks of torchrun, can share; `dpoctl merge` joins what they write."""

    out: str = option(help="JSONL file to write.", panel=RUN, identity=False, metavar="FILE")
    shard: str | None = option(
        None,
        "Do only part i of n of the work, as i/n with i from 1 to n; dpoctl merge joins the parts.",
        RUN,
        metavar="I/N",
    )
    rank_timeout: float = option(
        60.0, "Under torchrun: minutes without progress of another rank's shard after which waiting for it ends.", RUN,
        above=0, identity=False,
    )  # fmt: skip

    def shard_problems(self) -> list[str]:
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", "1/1" if self.shard is None else self.shard)
        if found and int(found[1]) <= int(found[2]):
            return []
        return [f"--shard {self.shard}: expected i/n with i from 1 to n, such as 1/4"]


@dataclass(frozen=True, kw_only=True)
class MakePrefs(Sharded, Generation, Device, Common):
    model: str = option(help="The SFT model that is sampled.", input="model")
    prompts: str = option(help="Prompt rows.", input="file")
    scorer: str = option(SIEBERT, "Scorer of the completions.", input="scorer")
    score_text: str = option(
        "joined", "Score prompt and completion joined, or the completion alone.", choices=("joined", "completion")
    )
    completions: int = option(4, "Samples per prompt.", at_least=2)
    pairs: str = option("all", "Which pairs of a prompt's samples to keep.", choices=("all", "best-worst", "random"))
    min_margin: float = option(0.0, "Drop pairs whose scores differ by less.", at_least=0)
    completions_out: str | None = option(
        None, "Also keep the samples with their scores, in this .jsonl file.", identity=False, metavar="FILE"
    )
    limit: int | None = option(None, "Use the first so many prompts.", DATA, at_least=1)
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)

    def problems(self) -> list[str]:
        found = self.shard_problems()
        if self.temperature == 0:
            found.append("--temperature 0 makes the samples of a prompt equal: no pairs")
        if self.completions_out and self.completions_out == self.out:
            found.append("--completions-out and --out name the same file")
        return found


@dataclass(frozen=True, kw_only=True)
class Sample(Sharded, Generation, Device, Common):
    model: str = option(help="Model to sample from.", input="model")
    prompts: str = option(help="Prompt rows.", input="file")
    temperature: tuple[float, ...] = option(
        (1.0,), "Sampling temperature, 0 is greedy; several, with commas, go to one file.", GEN, at_least=0, commas=True
    )
    few_shot: str | None = option(
        None, "Rows with prompt and completion that stand, as examples, before every prompt.", DATA, input="file"
    )
    n: int = option(1, "Completions per prompt.", at_least=1)
    best_of: int | None = option(
        None, "Sample so many of each prompt and keep the one that --scorer likes best.", GEN, at_least=2
    )
    scorer: str | None = option(None, "What --best-of chooses by.", GEN, input="scorer")
    stop: tuple[str, ...] = option((), "A text that ends a completion; may be given several times.", GEN)
    max_prompt_length: int | None = option(
        None, "Longest prompt, in tokens, examples counted; longer ones keep their end.", DATA, at_least=1
    )
    limit: int | None = option(None, "Use the first so many prompts.", DATA, at_least=1)
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)

    def problems(self) -> list[str]:
        found = self.shard_problems()
        if (self.best_of is None) != (self.scorer is None):
            found.append("--best-of and --scorer go together: how many are sampled, and what chooses")
        if self.best_of and self.n != 1:
            found.append("--best-of keeps one completion a prompt: --n has no place beside it")
        if len(set(self.temperature)) < len(self.temperature) or not self.temperature:
            found.append("--temperature names one temperature twice, or none")
        if self.best_of and 0 in self.temperature:
            found.append("--temperature 0 makes the samples of a prompt equal: nothing to choose")
        return found


@dataclass(frozen=True, kw_only=True)
class Score(Sharded, Device, Common):
    data: str = option(help="Rows with text: completions, texts.", input="file")
    scorer: str = option(help="Scorer of the rows.", input="scorer")
    score_text: str = option(
        "joined", "Score prompt and completion joined, or the completion alone.", choices=("joined", "completion")
    )
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)

    def problems(self) -> list[str]:
        return self.shard_problems()


@dataclass(frozen=True, kw_only=True)
class Evaluate(Tabular, Sharded, Generation, Device, Common):
    model: tuple[str, ...] = option((), "Model to evaluate; may be given several times.", input="model")
    completions: tuple[str, ...] = option(
        (), "A completions file to evaluate instead (no KL); may be repeated.", input="file"
    )
    ref: str | None = option(None, "Reference of the KL and of the perplexity.", input="model")
    prompts: str | None = option(None, "Prompts for the models, unseen in training.", input="file")
    scorer: str = option(SIEBERT, "Scorer of the completions.", input="scorer")
    score_text: str = option(
        "joined", "Score prompt and completion joined, or the completion alone.", choices=("joined", "completion")
    )
    lm: str | None = option(None, "A further language model for the perplexity.", input="model")
    selection_scorer: str | None = option(
        None,
        "Reward by which best-of-n chooses: adds that curve, valued by --scorer, for each --completions file.",
        input="scorer",
    )
    optimum: bool = option(
        False, "Add the exact KL-constrained optimum, from --completions that are plain samples of the reference."
    )
    n: int = option(1, "Completions per prompt.", at_least=1)
    limit: int | None = option(None, "Use the first so many prompts.", DATA, at_least=1)
    tokens_per_batch: int = option(8192, "Tokens in one forward pass.", RUN, at_least=1, identity=False)
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)

    def problems(self) -> list[str]:
        found = self.shard_problems()
        if not self.model and not self.completions:
            found.append("--model or --completions is required: what is to be evaluated")
        if self.model and not (self.prompts and self.ref):
            found.append("--prompts and --ref are required with --model")
        if (self.selection_scorer or self.optimum) and not self.completions:
            found.append(
                "--selection-scorer and --optimum read --completions: several samples of the reference a prompt"
            )
        return found
