"""Which of two candidates is better, by a language model, a scorer or people: judgements, and a summary of A's wins."""

from typing import Any

from .. import log
from ..config.judging import Judge
from ..data.jsonl import read_jsonl
from ..errors import InputError
from ..judging import check_pairs, comparisons, grading, people, power, tournament
from ..judging.asking import Asking, judgements, say_cost
from ..judging.check_results import metrics_of_check
from ..judging.comparisons import Comparison
from ..judging.costs import cost_lines, tokens_of
from ..judging.judges import open_judge
from ..judging.prompts import CRITERIA, Criterion
from ..judging.questions import question_of
from ..judging.results import compared, examine_others, metrics_with
from ..outputs.claims import Output
from ..outputs.row_writer import RowWriter
from ..outputs.shards import shard_range, slices
from ..reports import judgements as told

_BATCH = 64  # comparisons written together, both orders of each

Batches = list[list[Comparison]]


def run(config: Judge, output: Output) -> None:
    criterion = question_of(config)  # refused before anything is loaded or paid for
    judge_now = {"identity": output.identity, "inputs": output.described}
    examine_others(config.compare, config.against, config.is_tournament, judge_now)
    every, counts = _load(config, output)
    if config.form:
        _write_form(config, output, every, criterion)
        return
    places = slices(len(every), _BATCH)
    shard = shard_range(config.shard, places)
    batches = [every[place] for place in places[shard.batches]]
    earlier = tournament.earlier_rows(config) if batches and shard.batches.start == 0 else []
    judge_by = _by_people if config.backend == "human" else _by_judge
    writer, cost = judge_by(config, output, batches, earlier)
    rows = [row for _, row in read_jsonl(output.out.with_name(output.out.name + ".partial"))]
    metrics = metrics_of_check(rows, config.backend, config.seed) if config.check else metrics_with(counts, rows)
    if config.shard is None and not config.check:  # of shards, merge compares the joined rows
        metrics = compared(metrics, rows, output.options)
    writer.finish(counts | metrics, cost | tournament.asked_since(config), shard.record({}))
    told.show(output.options, config.out, metrics)
    if cost:
        log.say(say_cost(cost))


def _load(config: Judge, output: Output | None = None) -> tuple[list[Comparison], dict[str, Any]]:
    """(what is judged, counts of the rows that are and are not)."""
    if config.check:
        return check_pairs.load(config)
    if config.is_tournament:
        return tournament.load(config, output.described if output else ())
    return grading.load(config) if config.scale else comparisons.load(config)


def _by_judge(config: Judge, output: Output, batches: Batches, earlier: list[dict]) -> tuple[RowWriter, dict[str, Any]]:
    """Write every judgement, batch by batch, the first after the earlier ones that are taken over.

    Raises Interrupted where some are pending, InputError at --max-cost.
    """
    writer = RowWriter(output)
    judge = open_judge(config.backend, config, writer.state, output)
    asking = Asking(judge, config, sum(map(judgements, batches)))
    asking.ahead([c for batch in batches[writer.batches_done :] for c in batch])
    done = sum(map(len, batches[: writer.batches_done]))
    with log.progress("judge", sum(map(len, batches)), "samples" if config.scale else "comparisons", done) as meter:
        for batch in batches[writer.batches_done :]:
            rows = asking.rows(batch)
            if rows is not None:
                writer.write_batch(rows if writer.batches_done else earlier + rows, state=judge.state())
            if not asking.is_down:
                meter.advance(len(batch), **judge.metrics())
    asking.finish()
    return writer, judge.cost()


# --- people


def _write_form(config: Judge, output: Output, every: list[Comparison], criterion: Criterion) -> None:
    if not criterion.question:
        raise InputError(
            f"--criterion {config.criterion}: a template and a rubric of several criteria are for models; people are "
            "asked one question",
            hint=f"one of {', '.join(CRITERIA)}, or a rubric of one criterion",
        )
    items = people.items(every, config.seed)
    shares = people.shares(items, config.annotators or 1, config.overlap, config.seed)
    written = people.write_forms(str(config.form), items, shares, criterion)
    output.plan_path.unlink(missing_ok=True)  # --out is started only with the answers
    for path, count in written:
        log.say(f"{path}: {count} blinded comparisons")
    log.say(
        "Open a form in a browser, on a computer or a phone, answer and export the answers; then rerun the command "
        "with --answers FILE, once per person, instead of --form"
    )


def _by_people(
    config: Judge, output: Output, batches: Batches, earlier: list[dict]
) -> tuple[RowWriter, dict[str, Any]]:
    """Write the exported answers as judgements, one row per person and comparison, after the earlier ones."""
    every = [c for batch in batches for c in batch]
    criterion = next(iter(question_of(config).names), config.criterion)
    rows = people.judgements(config.answers, every, config.seed, criterion)
    writer = RowWriter(output)
    writer.write_batch(earlier + rows, state={})
    return writer, {}


def plan(config: Judge) -> dict[str, Any]:
    criterion = question_of(config)
    every, counts = _load(config)
    batches = slices(len(every), _BATCH)
    asked = [c for place in batches[shard_range(config.shard, batches).batches] for c in every[place]]
    shown: dict[str, Any] = {"samples" if config.scale else "comparisons": len(asked), "judgements": judgements(asked)}
    shown |= {"criteria of each": criterion.rows_each} if criterion.rows_each > 1 else {}
    if config.check:
        shown |= {name: counts[name] for name in check_pairs.KINDS if name in counts}
    elif not (config.within or config.scale):
        compared = tournament.one_pair([c for c in asked if not c.canary])
        shown |= power.lines(len(compared), len({c.prompt_id for c in compared}))
    if config.backend in ("openai", "vllm", "transformers"):
        shown |= cost_lines(config, shown["judgements"], tokens_of(criterion, asked))
    return shown | (_memory_lines(config) if config.backend == "scorer" else {})


def _memory_lines(config: Judge) -> dict[str, Any]:
    from ..judging.planning import Plan

    return Plan(config).memory_lines()
