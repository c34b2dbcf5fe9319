"""Which of two candidates is better, by a language model, a scorer or people: judgements, and a summary of A's wins."""

from pathlib import Path

from .. import log
from ..config.judging import Judge
from ..data.jsonl import read_jsonl
from ..errors import InputError, Interrupted
from ..judging import comparisons, form, people
from ..judging.client import CostReached
from ..judging.judges import JUDGES
from ..judging.prompts import CRITERIA, Criterion, load_criterion
from ..judging.results import compared
from ..judging.summary import metrics_of
from ..judging.table import show
from ..outputs.claims import Output
from ..outputs.files import write_atomic
from ..outputs.row_writer import RowWriter
from ..outputs.shards import cut, share_of

_BATCH = 64  # comparisons written together, both orders of each


def run(config: Judge, output: Output) -> None:
    criterion = load_criterion(config.criterion, config.prompt_noun)  # refused before anything is loaded or paid
    asked, counts = comparisons.load(config)
    if config.form:
        _write_form(config, output, people.items(config, asked), criterion)
        return
    batches = cut(len(asked), _BATCH)
    share = share_of(config.shard, batches)
    mine = [asked[place] for place in batches[share.batches]]
    writer, cost = (_by_people if config.backend == "human" else _by_judge)(config, output, mine)
    rows = [row for _, row in read_jsonl(output.out.with_name(output.out.name + ".partial"))]
    metrics = metrics_of(rows)
    if config.shard is None:  # what stands beside the whole is for merge to say
        metrics = compared(metrics, rows, output.options)
    writer.finish(counts | metrics, cost, share.record({}))
    show(output.options, config.out, metrics)
    if cost:
        dollars = f", {cost['dollars']:.4f} dollars" if "dollars" in cost else ""
        known = f"; {cost['from_cache']} answers were known from before" if cost["from_cache"] else ""
        log.say(f"{cost['prompt_tokens']} tokens asked, {cost['completion_tokens']} answered{dollars}{known}")


def _by_judge(config: Judge, output: Output, batches: list[list[comparisons.Comparison]]) -> tuple[RowWriter, dict]:
    """Write every judgement, wave by wave. Raises Interrupted where some are pending, InputError at --max-cost."""
    writer = RowWriter(output)
    judge = JUDGES[config.backend](config, writer.state)
    pending = 0
    done = sum(map(len, batches[: writer.batches_done]))
    with log.progress("judge", sum(map(len, batches)), "comparisons", done) as meter:
        for i, batch in enumerate(batches[writer.batches_done :], start=writer.batches_done):
            try:
                rows = judge.rows(batch)
            except CostReached:
                raise _cost_reached(config, judge.cost(), _judgements(batches)) from None
            if not rows:  # the server is down: to try everything else as patiently would take hours
                pending += _judgements(batches[i:])
                break
            pending += _judgements([batch]) - len(rows)
            if not pending:  # rows are written in order; what lies behind a gap stays in the cache
                writer.write_batch(rows, state=judge.state())
            meter.advance(len(batch), **judge.metrics())
    if pending:
        raise Interrupted(
            f"{pending} judgements are pending: {judge.last_failure}; the rest is kept",
            hint="the same command again asks for these alone",
        )
    return writer, judge.cost()


def _judgements(batches: list[list[comparisons.Comparison]]) -> int:
    return sum(len(c.orders) for batch in batches for c in batch)


def _cost_reached(config: Judge, cost: dict, total: int) -> InputError:
    answers = cost["asked"] + cost["from_cache"]
    return InputError(
        f"--max-cost {config.max_cost:g} is reached: {cost['dollars']:.4f} dollars for {answers} answers, "
        f"{total - answers} are left",
        hint="the same command with a higher --max-cost continues; answers are kept",
    )


# --- people


def _write_form(config: Judge, output: Output, items: list[dict], criterion: Criterion) -> None:
    if not criterion.question:
        raise InputError(
            f"--criterion {config.criterion}: a template is for models; people are asked a question",
            hint=f"one of {', '.join(CRITERIA)}",
        )
    Path(config.form).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(config.form, form.page(items, criterion.question, criterion.prompt_noun))
    output.plan_path.unlink(missing_ok=True)  # --out is begun when answers are read
    log.say(
        f"{config.form}: {len(items)} blinded comparisons. Open it in a browser, answer by keyboard, export; then the "
        "same command with --answers FILE instead of --form"
    )


def _by_people(config: Judge, output: Output, batches: list[list[comparisons.Comparison]]) -> tuple[RowWriter, dict]:
    """Write the answers of the exported files as judgements, one row a person and comparison."""
    asked = [c for batch in batches for c in batch]
    rows = [row for own in people.judgements(config, asked).values() for row in own]
    writer = RowWriter(output)
    writer.write_batch(rows, state={})
    return writer, {}


def plan(config: Judge) -> dict:
    criterion = load_criterion(config.criterion, config.prompt_noun)
    every, _ = comparisons.load(config)
    batches = cut(len(every), _BATCH)
    asked = [c for place in batches[share_of(config.shard, batches).batches] for c in every[place]]
    shown: dict = {"comparisons": len(asked), "judgements": _judgements([asked])}
    if config.backend == "openai":
        words = sum(len(criterion.request(c.prompt, c.a, c.b, c.key).split()) * len(c.orders) for c in asked)
        tokens = round(words * 1.4)
        shown |= {"tokens asked, about": tokens, "tokens answered, at most": shown["judgements"] * config.max_tokens}
        if config.price_in is not None:
            most = tokens * config.price_in + shown["tokens answered, at most"] * config.price_out
            shown["dollars, at most about"] = f"{most / 1e6:.2f}"
    return shown
