"""Options of judge."""

from dataclasses import dataclass, fields

from .sampling import Sharded
from .schema import NAME_OR_FILE, flag_of, option, spec_of
from .shared import (
    DATA,
    JUDGE,
    PEOPLE,
    SCORING,
    SERVER,
    Common,
    Tabular,
)


@dataclass(frozen=True, kw_only=True)
class Judge(Tabular, Sharded, Common):
    candidates: tuple[str, ...] = option(
        help="A.jsonl, and B.jsonl or nothing: then A is judged against its rows' `reference`.",
        argument=True,
        input="file",
        metavar="A.jsonl [B.jsonl]",
    )
    backend: str = option(
        "openai",
        "Who decides: a chat-completions server (OpenAI, vLLM, transformers serve, llama.cpp), a SCORER, or people.",
        JUDGE,
        choices=("openai", "scorer", "human"),
    )
    criterion: str = option(
        "helpful",
        "summary-s, summary-c (concise: the paper's main one), helpful, sentiment, or a text file of your own: a request with "
        "{prompt}, {a}, {b} and, on lines around these, {fence}, which ends in 'Preferred: A' or 'Preferred: B'.",
        JUDGE,
        input=NAME_OR_FILE,
    )
    prompt_noun: str | None = option(None, "What the prompt is, in the question: 'news article' for cnn-dm.", JUDGE)
    order: str = option(
        "both",
        "Ask in both orders (a win counts where both agree), or in a random one.",
        JUDGE,
        choices=("both", "random"),
    )
    limit: int | None = option(None, "Judge the first so many comparisons.", DATA, at_least=1)
    skip_bad_rows: bool = option(False, "Count and skip rows that are not as they should be.", DATA)
    canary: str | None = option(
        None, "Also judge this constant text in A's place: a judge that lets it win is not to be trusted.", JUDGE
    )
    compare: str | None = option(
        None,
        "Judgements of another policy on the same prompts: paired bootstrap of the difference.",
        JUDGE,
        input="file",
    )
    scorer: str | None = option(None, "backend scorer: the higher score wins.", SCORING, input="scorer")
    score_text: str = option(
        "joined",
        "backend scorer: score prompt and completion joined, or the completion alone.",
        SCORING,
        choices=("joined", "completion"),
    )
    device: str = option(
        "auto", "cpu, cuda, cuda:1, mps; auto takes the GPU where there is one.", SCORING, identity=False
    )
    model: str | None = option(
        None,
        "backend openai, and required there: the judge, for example gpt-5.2, gpt-5-mini or a served model's name (the paper's "
        "gpt-4-0314 is long retired).",
        SERVER,
    )
    base_url: str | None = option(
        None,
        "backend openai: address of another server than OpenAI's, such as http://localhost:8000/v1.",
        SERVER,
        metavar="URL",
    )
    concurrency: int = option(8, "backend openai: requests under way at once.", SERVER, at_least=1, identity=False)
    timeout: float = option(60.0, "backend openai: seconds to wait for an answer.", SERVER, above=0, identity=False)
    retries: int = option(
        6,
        "backend openai: repetitions after a passing failure, with growing pauses or those that the server asks for.",
        SERVER,
        at_least=0,
        identity=False,
    )
    max_tokens: int = option(
        1024,
        "backend openai: longest answer of the judge, in tokens, its hidden reasoning counted.",
        SERVER,
        at_least=8,
    )
    judge_temperature: float | None = option(
        None,
        "backend openai: temperature of the judge (default: 0 at --base-url; at OpenAI the model's own, since reasoning "
        "models take no other).",
        SERVER,
        at_least=0,
    )
    price_in: float | None = option(
        None, "backend openai: US dollars per million tokens asked.", SERVER, at_least=0, identity=False
    )
    price_out: float | None = option(
        None, "backend openai: US dollars per million tokens answered.", SERVER, at_least=0, identity=False
    )
    max_cost: float | None = option(
        None,
        "backend openai: stop before the answers cost more dollars than this, earlier calls of the command counted.",
        SERVER,
        above=0,
        identity=False,
    )
    cache_dir: str | None = option(
        None,
        "backend openai: where answers are kept (default: the user's cache folder).",
        SERVER,
        identity=False,
        metavar="DIR",
    )
    form: str | None = option(
        None, "backend human: write the blinded form here.", PEOPLE, identity=False, metavar="FILE"
    )
    answers: tuple[str, ...] = option(
        (), "backend human: exported answers; may be given several times, one a person.", PEOPLE, input="file"
    )
    against: str | None = option(
        None, "Judgements of another judge on the same comparisons: agreement and Cohen's kappa.", JUDGE, input="file"
    )

    def problems(self) -> list[str]:
        found = self.shard_problems()
        if len(self.candidates) > 2:
            found.append(f"one or two candidates files, not {len(self.candidates)}")
        needs = {
            "openai": (("--model", self.model),),
            "scorer": (("--scorer", self.scorer),),
            "human": (("--form or --answers", self.form or self.answers),),
        }
        found += [f"{flag} is required with --backend {self.backend}" for flag, v in needs[self.backend] if not v]
        belongs = {SERVER: "openai", SCORING: "scorer", PEOPLE: "human"}
        for f in fields(self):
            backend = belongs.get(spec_of(f).panel, self.backend)
            if backend != self.backend and getattr(self, f.name) != f.default:
                found.append(f"{flag_of(f)} means nothing to --backend {self.backend}")
        if (self.price_in is None) != (self.price_out is None):
            found.append("--price-in and --price-out go together")
        if self.max_cost and self.price_in is None:
            found.append("--max-cost needs --price-in and --price-out, dollars per million tokens")
        if self.form and self.json:
            found.append("--json has no effect with --form, which makes no judgements")
        if self.form and self.answers:
            found.append("--form writes the form and --answers reads what people said: one at a time")
        if self.canary is not None and self.backend == "human":
            found.append("--canary means nothing to --backend human")
        if self.shard and self.backend == "human":
            found.append("--shard means nothing to --backend human: people share a form by its items")
        return found
