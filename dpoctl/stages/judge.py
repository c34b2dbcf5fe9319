"""Which of two candidates is better, by a language model, a scorer or people: judgements, and a summary of A's wins."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import log
from ..artifacts import Work, cache_home, write_atomic
from ..config import Judge
from ..data.jsonl import read_jsonl
from ..data.rows import load_rows
from ..data.writer import WaveWriter
from ..errors import InputError, Interrupted
from ..judging import form, statistics
from ..judging.client import Client, CostReached, Pending
from ..judging.prompts import CRITERIA, load_criterion, parse_verdict
from ..judging.summary import key_of, outcomes, score_of, summaries_by, summarise

_WAVE = 64  # comparisons written together


@dataclass(frozen=True)
class Comparison:
    """Two candidates for a prompt; `orders` are those to ask in, AB or BA."""

    prompt_id: str
    k: int
    prompt: str
    a: str
    b: str
    orders: tuple[str, ...]
    temperature: float | None
    step: int | None = None  # the training step that the candidate was sampled at
    canary: bool = False

    @property
    def key(self) -> str:
        return f"{self.prompt_id} {self.k} {self.temperature} {self.step}" + (" canary" if self.canary else "")


def run(config: Judge, work: Work) -> None:
    comparisons = _comparisons(config)
    if config.backend == "human":
        _by_people(config, work, comparisons)
        return
    judge = {"openai": _ModelJudge, "scorer": _ScorerJudge}[config.backend](config)
    writer = WaveWriter(work)
    pending = 0
    with log.progress(
        "judge", len(comparisons), "comparisons", min(len(comparisons), writer.waves_done * _WAVE)
    ) as meter:
        for start in range(writer.waves_done * _WAVE, len(comparisons), _WAVE):
            wave = comparisons[start : start + _WAVE]
            judged = judge.rows(wave)
            missing = sum(len(c.orders) for c in wave) - len(judged)
            pending += missing
            if not pending:  # rows are written in order; what lies behind a gap stays in the cache
                writer.write_wave(judged, state={})
            meter.advance(len(wave), **judge.figures())
    if pending:
        raise Interrupted(
            f"{pending} judgements are pending: {judge.last_failure}; the rest is kept",
            hint="the same command again asks for these alone",
        )
    rows = [row for _, row in read_jsonl(_partial(work))]
    main, canary = ([r for r in rows if bool(r.get("canary")) is c] for c in (False, True))
    figures = {"summary": summarise(main)} | ({"canary": summarise(canary)} if canary else {})
    figures |= {f"by_{name}": found for name in ("temperature", "step") if (found := summaries_by(name, main))}
    figures |= _compared(config, main)
    cost = judge.cost()
    writer.finish(figures, cost)
    _show(config, figures)
    if "prompt_tokens" in cost:
        dollars = f", {cost['dollars']:.4f} dollars" if "dollars" in cost else ""
        known = f"; {cost['from_cache']} answers were known from before" if cost["from_cache"] else ""
        log.say(f"{cost['prompt_tokens']} tokens asked, {cost['completion_tokens']} answered{dollars}{known}")


def _partial(work: Work) -> Path:
    return work.out.with_name(work.out.name + ".partial")


# --- comparisons


def _comparisons(config: Judge) -> list[Comparison]:
    """What is to be judged, in A's order; what has no counterpart is counted and said."""
    first = load_rows(config.candidates[0], "completions", skip_bad=config.skip_bad_rows)
    found, without = [], 0
    other = {}
    if len(config.candidates) == 2:
        second = load_rows(config.candidates[1], "completions", skip_bad=config.skip_bad_rows)
        other = {key_of(r): r for r in second.rows}
        if len({(r["prompt_id"], r["k"]) for r in second.rows}) == len(second.rows):  # one temperature: for all of A's
            other |= {(r["prompt_id"], r["k"]): r for r in second.rows}
    for line, row in zip(first.lines, first.rows, strict=True):
        match = other.get(key_of(row)) or other.get((row["prompt_id"], row["k"]))
        text = (match and match["completion"]) if other else row.get("reference")
        if text is None:
            without += 1
            continue
        if other and match["prompt"] != row["prompt"]:
            raise InputError(
                f"{first.path}:{line}: prompt: not that of {config.candidates[1]} for prompt_id {row['prompt_id']}",
                hint="both files must be of the same prompts",
            )
        prompt, a, b = (_text(x) for x in (row["prompt"], row["completion"], text))
        when = row.get("temperature"), row.get("step")
        found.append(Comparison(row["prompt_id"], row["k"], prompt, a, b, _orders(config, row), *when))
        if len(found) == config.limit:
            break
    if not found:
        against = config.candidates[1] if other else "a `reference`"
        raise InputError(
            f"{first.path}: none of its rows has a counterpart in {against}", "rows pair by prompt_id and k"
        )
    if without:
        log.warn(f"{first.path}: {without} rows have no counterpart and are left out")
    if config.canary is not None:
        once = list({c.prompt_id: c for c in found}.values())
        found += [replace(c, a=config.canary, canary=True) for c in once]
    return found


def _orders(config: Judge, row: dict) -> tuple[str, ...]:
    if config.order == "both" and config.backend != "human":
        return ("AB", "BA")
    return (random.Random(f"order {config.seed} {row['prompt_id']} {row['k']}").choice(("AB", "BA")),)


def _text(value) -> str:
    return value if isinstance(value, str) else "\n".join(f"{m['role']}: {m['content']}" for m in value)


def _row(config: Judge, c: Comparison, order: str, verdict: str, judge: str, raw: str) -> dict:
    row = {
        "prompt_id": c.prompt_id,
        "k": c.k,
        "prompt": c.prompt,
        "a": c.a,
        "b": c.b,
        "order": order,
        "verdict": verdict,
    }
    row |= {"criterion": config.criterion, "temperature": c.temperature, "judge": judge, "raw": raw}
    return row | ({"canary": True} if c.canary else {}) | ({"step": c.step} if c.step is not None else {})


# --- who decides


class _ScorerJudge:
    """The higher score wins; the order means nothing to it."""

    def __init__(self, config: Judge):
        from ..models.scorers import load_scorer

        self.config = config
        self.scorer = load_scorer(config.scorer, text=config.score_text)
        self.last_failure = ""

    def rows(self, wave: list[Comparison]) -> list[dict]:
        texts = [{"prompt": c.prompt, "completion": side} for c in wave for side in (c.a, c.b)]
        scores = self.scorer.score(texts)
        rows = []
        for i, c in enumerate(wave):
            a, b = scores.keys[2 * i : 2 * i + 2]
            verdict = "a" if a > b else "b" if b > a else "tie"
            raw = f"{scores.values[2 * i]:.6g} {scores.values[2 * i + 1]:.6g}"
            rows += [_row(self.config, c, order, verdict, self.config.scorer, raw) for order in c.orders]
        return rows

    def figures(self) -> dict[str, str]:
        return {}

    def cost(self) -> dict:
        return {}


class _ModelJudge:
    """A language model behind a server, asked about every order in parallel."""

    def __init__(self, config: Judge):
        config = replace(config, cache_dir=config.cache_dir or str(cache_home() / "judge"))
        self.config, self.criterion = config, load_criterion(config.criterion, config.thing)
        self.client = Client(config)
        self.last_failure = ""

    def rows(self, wave: list[Comparison]) -> list[dict]:
        """Rows of what was judged; what failed for a passing reason is left out."""
        asked = [(c, order) for c in wave for order in c.orders]
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = [pool.submit(self._judge, c, order) for c, order in asked]
            try:
                rows = [future.result() for future in futures]
            except BaseException as e:
                self.client.stopped.set()  # those under way end their waiting
                for future in futures:
                    future.cancel()
                if isinstance(e, CostReached):
                    done = sum(
                        future.done() and not future.cancelled() and not future.exception() for future in futures
                    )
                    raise InputError(
                        f"--max-cost {self.config.max_cost:g} is reached: {self.client.spent:.4f} dollars for "
                        f"{self.client.asked + self.client.from_cache} answers; {len(futures) - done} of this wave and "
                        "what follows are left",
                        hint="the same command with a higher --max-cost continues; answers are kept",
                    ) from None
                raise
        return [row for row in rows if row is not None]

    def _judge(self, c: Comparison, order: str) -> dict | None:
        first, second = (c.a, c.b) if order == "AB" else (c.b, c.a)
        request = self.criterion.request(c.prompt, first, second, f"{self.config.seed} {c.key}")
        try:
            answer = self.client.ask(request)
        except Pending as e:
            self.last_failure = str(e)
            return None
        choice = parse_verdict(answer.text)
        verdict = "invalid" if choice is None else ("a" if (choice == "A") == (order == "AB") else "b")
        return _row(self.config, c, order, verdict, self.config.model, answer.text)

    def figures(self) -> dict[str, str]:
        shown = {"cached": str(self.client.from_cache), "retries": str(self.client.retries)}
        return shown | ({"dollars": f"{self.client.spent:.4f}"} if self.config.price_in else {})

    def cost(self) -> dict:
        """Of this call of the command: what was asked anew, what the cache knew, tokens, dollars."""
        client, tokens = self.client, self.client.tokens
        asked = {"asked": client.asked, "from_cache": client.from_cache, "retries": client.retries}
        spent = {"dollars": round(client.spent, 6)} if self.config.price_in else {}
        return asked | {"prompt_tokens": tokens["prompt"], "completion_tokens": tokens["completion"]} | spent


def _by_people(config: Judge, work: Work, comparisons: list[Comparison]) -> None:
    """Write the form, or read its answers back as judgements, one row a person and comparison."""
    items = [
        {
            "id": f"c{i}",
            "prompt": c.prompt,
            "A": c.a if c.orders[0] == "AB" else c.b,
            "B": c.b if c.orders[0] == "AB" else c.a,
        }
        for i, c in enumerate(comparisons)
    ]
    random.Random(f"form {config.seed}").shuffle(items)
    if not config.answers:
        thing, _, question = CRITERIA.get(config.criterion, ("prompt", "", "Which of the two is better?"))
        thing = config.thing or thing
        Path(config.form).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.form, form.page(items, question.replace("{thing}", thing), thing))
        log.say(
            f"{config.form}: {len(items)} blinded comparisons. Open it in a browser, answer by keyboard, export; then the "
            "same command with --answers FILE instead of --form"
        )
        return
    by_id = {f"c{i}": c for i, c in enumerate(comparisons)}
    rows: dict[str, list[dict]] = {}
    for path in config.answers:
        person, answers = form.read_answers(path, items)
        for item, choice in answers.items():
            c = by_id[item]
            order = c.orders[0]
            verdict = "tie" if choice == "tie" else "a" if (choice == "A") == (order == "AB") else "b"
            rows.setdefault(f"human:{person}", []).append(_row(config, c, order, verdict, f"human:{person}", choice))
    if not rows:
        raise InputError(f"{config.answers[0]}: holds no answers", hint="the form's Export button writes them")
    writer = WaveWriter(work)
    every = [row for own in rows.values() for row in own]
    writer.write_wave(every, state={})
    people = list(rows)
    agreements = {
        f"{one} and {other}": _agreement(rows[one], rows[other])
        for i, one in enumerate(people)
        for other in people[i + 1 :]
    }
    figures = {"summary": _pooled(rows), "people": {name: summarise(own) for name, own in rows.items()}}
    figures |= ({"agreement": agreements} if agreements else {}) | _compared(config, every)
    writer.finish(figures, {})
    _show(config, figures)


def _pooled(rows: dict[str, list[dict]]) -> dict:
    """One vote a comparison: what most people say, a tie where they are even."""
    votes: dict[tuple, list[dict]] = {}
    for own in rows.values():
        for row in own:
            votes.setdefault(key_of(row), []).append(row)
    merged = []
    for own in votes.values():
        balance = sum(score_of(row["verdict"]) - 0.5 for row in own)
        merged.append(own[0] | {"verdict": "a" if balance > 0 else "b" if balance < 0 else "tie"})
    return summarise(merged)


def _agreement(one: list[dict], other: list[dict]) -> dict | None:
    """Agreement over the comparisons that both judged; None where there is none."""
    first, second = outcomes(one), outcomes(other)
    common = [key for key in first if key in second and "invalid" not in (first[key], second[key])]
    if not common:
        return None
    raw, kappa = statistics.agreement([first[key] for key in common], [second[key] for key in common])
    return {"raw": raw, "kappa": kappa, "n": len(common)}


def _compared(config: Judge, rows: list[dict]) -> dict:
    """Against another policy's judgements (--compare), and against another judge's (--against)."""
    figures: dict = {}
    if config.compare:
        own, other = (_by_prompt(r) for r in (rows, _judgements(config.compare)))
        try:
            figures["compare"] = statistics.paired_difference(own, other, config.seed)
        except ValueError:
            raise InputError(
                f"{config.compare}: judges none of these prompts", "both must judge the same prompts"
            ) from None
    if config.against:
        figures["against"] = _agreement(rows, _judgements(config.against))
        if figures["against"] is None:
            raise InputError(f"{config.against}: judges none of these comparisons", "they match by prompt_id and k")
    return figures


def _judgements(path: str) -> list[dict]:
    rows = []
    for line, row in read_jsonl(path):
        missing = [name for name in ("prompt_id", "k", "verdict") if name not in row]
        if missing:
            raise InputError(f"{path}:{line}: field '{missing[0]}': expected a judgement's, got nothing")
        if not row.get("canary"):
            rows.append(row)
    return rows


def _by_prompt(rows: list[dict]) -> dict[str, float]:
    """Mean score of a by prompt, invalid comparisons left out."""
    scores: dict[str, list[float]] = {}
    for (prompt, *_), outcome in outcomes(rows).items():
        if outcome != "invalid":
            scores.setdefault(prompt, []).append(score_of(outcome))
    return {prompt: sum(own) / len(own) for prompt, own in scores.items()}


# --- the summary


def _show(config: Judge, figures: dict) -> None:
    names = [Path(p).name for p in config.candidates] + ["reference"]
    table = Table(title=f"{names[0]} (A) against {names[1]} (B), criterion {config.criterion}", title_justify="left")
    for name in ("", "win rate", "95 %", "win / tie / loss", "flips", "invalid", "words A / B", "at equal length"):
        table.add_column(name, justify="left" if not name else "right")
    shown = {"A over B": figures["summary"]} | ({"canary over B": figures["canary"]} if "canary" in figures else {})
    shown |= figures.get("people", {})
    shown |= {f"  {n} {s[n]:g}": s for n in ("temperature", "step") for s in figures.get(f"by_{n}", [])}
    for name, s in shown.items():
        table.add_row(
            name,
            _rate(s["win_rate"]),
            "–" if not s["interval"] else f"{s['interval'][0]:.3f} to {s['interval'][1]:.3f}",
            f"{s['wins']} / {s['ties']} / {s['losses']}",
            _rate(s["flips"]),
            _rate(s["invalid"]),
            f"{s['length_a']:.1f} / {s['length_b']:.1f}",
            _rate(s["length_controlled"]),
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if "compare" in figures:
        c = figures["compare"]
        log.say(
            f"against {config.compare}: {c['difference']:+.3f} ({c['low']:+.3f} to {c['high']:+.3f}), p {c['p']:.3f}, "
            f"{c['n']} prompts"
        )
    for name, a in (figures.get("agreement") or {}).items():
        if a:
            log.say(f"agreement of {name}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")
    if figures.get("against"):
        a = figures["against"]
        log.say(f"agreement with {config.against}: {a['raw']:.3f}, kappa {a['kappa']:.3f} over {a['n']} comparisons")


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def plan(config: Judge) -> dict:
    comparisons = _comparisons(config)
    shown: dict = {"comparisons": len(comparisons), "judgements": sum(len(c.orders) for c in comparisons)}
    if config.backend == "openai":
        criterion = load_criterion(config.criterion, config.thing)
        words = sum(len(criterion.request(c.prompt, c.a, c.b, c.key).split()) * len(c.orders) for c in comparisons)
        tokens = round(words * 1.4)
        shown |= {"tokens asked, about": tokens, "tokens answered, at most": shown["judgements"] * config.max_tokens}
        if config.price_in is not None and config.price_out is not None:
            most = tokens * config.price_in + shown["tokens answered, at most"] * config.price_out
            shown["dollars, at most about"] = f"{most / 1e6:.2f}"
    return shown
