"""Which of two candidates is better, by a language model, a scorer or people: judgements, and a summary of A's wins."""

from pathlib import Path
from typing import Any

from .. import log
from ..config.judging import Judge
from ..data.jsonl import read_jsonl
from ..errors import InputError
from ..judging import check_pairs, comparisons, form, people, power
from ..judging.asking import Asking, judgements, say_cost
from ..judging.check_results import metrics_of_check
from ..judging.comparisons import Comparison
from ..judging.costs import cost_lines, tokens_of
from ..judging.judges import open_judge
from ..judging.prompts import CRITERIA, Criterion, load_criterion
from ..judging.results import compared
from ..judging.summary import metrics_of
from ..outputs.claims import Output
from ..outputs.files import write_atomic
from ..outputs.row_writer import RowWriter
from ..outputs.shards import shard_range, slices
from ..reports import judgements as told

_BATCH = 64  # comparisons written together, both orders of each

Batches = list[list[Comparison]]


def run(config: Judge, output: Output) -> None:
    criterion = load_criterion(config.criterion, config.prompt_noun)  # refused before anything is loaded or paid for
    every, counts = _load(config)
    if config.form:
        _write_form(config.form, config, output, people.items(every, config.seed), criterion)
        return
    places = slices(len(every), _BATCH)
    shard = shard_range(config.shard, places)
    batches = [every[place] for place in places[shard.batches]]
    writer, cost = (
        _by_people(config, output, batches) if config.backend == "human" else _by_judge(config, output, batches)
    )
    rows = [row for _, row in read_jsonl(output.out.with_name(output.out.name + ".partial"))]
    metrics = metrics_of_check(rows, config.backend, config.seed) if config.check else metrics_of(rows)
    if config.shard is None and not config.check:  # of shards, merge compares the joined rows
        metrics = compared(metrics, rows, output.options)
    writer.finish(counts | metrics, cost, shard.record({}))
    told.show(output.options, config.out, metrics)
    if cost:
        log.say(say_cost(cost))


def _load(config: Judge) -> tuple[list[Comparison], dict[str, int]]:
    """(what is judged, counts of the rows that are and are not)."""
    return check_pairs.load(config) if config.check else comparisons.load(config)


def _by_judge(config: Judge, output: Output, batches: Batches) -> tuple[RowWriter, dict[str, Any]]:
    """Write every judgement, batch by batch. Raises Interrupted where some are pending, InputError at --max-cost."""
    writer = RowWriter(output)
    judge = open_judge(config.backend, config, writer.state, output)
    asking = Asking(judge, config, sum(map(judgements, batches)))
    done = sum(map(len, batches[: writer.batches_done]))
    with log.progress("judge", sum(map(len, batches)), "comparisons", done) as meter:
        for batch in batches[writer.batches_done :]:
            rows = asking.rows(batch)
            if rows is not None:
                writer.write_batch(rows, state=judge.state())
            if not asking.is_down:
                meter.advance(len(batch), **judge.metrics())
    asking.finish()
    return writer, judge.cost()


# --- people


def _write_form(path: str, config: Judge, output: Output, items: list[dict], criterion: Criterion) -> None:
    if not criterion.question:
        raise InputError(
            f"--criterion {config.criterion}: a template is for models; people are asked a question",
            hint=f"one of {', '.join(CRITERIA)}",
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, form.page(items, criterion.question, criterion.prompt_noun))
    output.plan_path.unlink(missing_ok=True)  # --out is started only with the answers
    log.say(
        f"{path}: {len(items)} blinded comparisons. Open it in a browser, answer by keyboard and export the answers; "
        "then rerun the command with --answers FILE instead of --form"
    )


def _by_people(config: Judge, output: Output, batches: Batches) -> tuple[RowWriter, dict[str, Any]]:
    """Write the exported answers as judgements, one row per person and comparison."""
    every = [c for batch in batches for c in batch]
    rows = people.judgements(config.answers, every, config.seed, config.criterion)
    writer = RowWriter(output)
    writer.write_batch(rows, state={})
    return writer, {}


def plan(config: Judge) -> dict[str, Any]:
    criterion = load_criterion(config.criterion, config.prompt_noun)
    every, counts = _load(config)
    batches = slices(len(every), _BATCH)
    asked = [c for place in batches[shard_range(config.shard, batches).batches] for c in every[place]]
    shown: dict[str, Any] = {"comparisons": len(asked), "judgements": judgements(asked)}
    if config.check:
        shown |= {name: counts[name] for name in check_pairs.KINDS if name in counts}
    elif not config.within:
        compared = [c for c in asked if not c.canary]
        shown |= power.lines(len(compared), len({c.prompt_id for c in compared}))
    if config.backend == "openai":
        shown |= cost_lines(config, shown["judgements"], tokens_of(criterion, asked))
    return shown | (_memory_lines(config) if config.backend == "scorer" else {})


def _memory_lines(config: Judge) -> dict[str, Any]:
    from ..judging.planning import Plan

    return Plan(config).memory_lines()
