"""Engines: what is the same for all of them, shards, and the order of sampling and scoring."""

import json
import shlex
from dataclasses import replace

import pytest

from dpoctl.cli.app import run
from dpoctl.config.engines import engine_arguments
from dpoctl.config.resolve import resolve
from dpoctl.config.sampling import Sample
from dpoctl.errors import InputError, Interrupted
from dpoctl.inference import sampler
from dpoctl.inference.engines.engine import Sampled, completion_of, seed_of
from dpoctl.inference.generate import PromptTokens, Sampling, ends_at, generate
from dpoctl.inference.sampler import divide
from helpers.engines import use_ahead
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import byte_level_bpe

# --- what is the same for all engines -------------------------------------------------------------------------------


def test_a_completion_is_cut_where_the_local_sampler_stops():
    tokenizer = byte_level_bpe()
    model = tiny_model("llama", vocab=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    prompts = [PromptTokens(str(i), [7 + i, 9], frozenset({tokenizer.eos_token_id, 40})) for i in range(12)]
    for stop in ((), ("a", "e"), (" th",)):
        sampling = Sampling(max_new_tokens=24, stop=stop, seed=3)
        free = replace(sampling, stop=())
        endless = [prompt._replace(stops=frozenset()) for prompt in prompts]
        expected = generate(model, tokenizer, prompts, [0, 1], sampling)
        raw = generate(model, tokenizer, endless, [0, 1], free)  # an engine that does not stop by itself
        for prompt, wanted, given in zip(prompts, expected, raw, strict=True):
            found = [completion_of(tokenizer, prompt, Sampled(c.ids, False), sampling) for c in given]
            assert found == wanted
        assert {"stop", "length"} <= {c.finish for row in expected for c in row} or stop


def test_log_probs_of_an_engine_are_summed_over_the_tokens_that_are_kept():
    tokenizer = byte_level_bpe()
    prompt = PromptTokens("p", [7], frozenset({0}))
    sampled = Sampled([40, 41, 0, 42], True, [-1.0, -2.0, -4.0, -8.0])
    found = completion_of(tokenizer, prompt, sampled, Sampling())
    assert (found.ids, found.logp, found.finish) == ([40, 41, 0], -7.0, "stop")
    assert completion_of(tokenizer, prompt, Sampled([40], False), Sampling()).logp is None


def test_where_sampling_stops_is_found_in_the_ids():
    tokenizer = byte_level_bpe()
    prompt = PromptTokens("p", [7], frozenset({0}))
    ids = tokenizer("stop here, please")["input_ids"]
    n = ends_at(tokenizer, prompt, ids, ("here",))
    assert "here" in tokenizer.decode(ids[:n]) and "here" not in tokenizer.decode(ids[: n - 1])
    assert ends_at(tokenizer, prompt, [*ids, 0, *ids], ()) == len(ids) + 1
    assert ends_at(tokenizer, prompt, ids, ("never",)) is None


def test_a_row_has_a_seed_of_its_own():
    seeds = {seed_of(seed, key, k) for seed in range(4) for key in ("a", "b", "1", "11") for k in range(12)}
    assert len(seeds) == 4 * 4 * 12 and all(0 <= seed < 2**63 for seed in seeds)


def options(**given) -> Sample:
    return resolve(Sample, "sample", {"model": "m", "prompts": "p", "out": "o.jsonl"} | given, None)


@pytest.mark.parametrize("of", [1, 3, 8])
def test_shards_of_an_engine_are_even_and_cover_all(of):
    given = {"engine": "vllm", "engine_batch_size": 10, "temperature": [0.5, 1.0]}
    found = [divide(options(**given, shard=f"{i}/{of}"), 50, 3, (0.5, 1.0)) for i in range(1, of + 1)]
    covered = [
        (batch.temperature, i) for work in found for batch in work.batches for i in range(*batch.prompts.indices(50))
    ]
    assert covered == [(temperature, i) for temperature in (0.5, 1.0) for i in range(50)]
    sizes = [work.shard.count for work in found]
    assert max(sizes) - min(sizes) <= 1 and {work.shard.total for work in found} == {100}
    lengths = [batch.prompts.stop - batch.prompts.start for work in found for batch in work.batches]
    assert max(lengths) == 3  # 10 completions of 3 a prompt
    assert len(lengths) < 100 / 2


def test_arguments_of_vllm_are_values():
    given = ("a=1", "b=1e-3", "c=true", 'd={"x": [1]}', "e=fp8", "f-g=null", "h=a=b")
    assert engine_arguments(given) == {
        **{"a": 1, "b": 1e-3, "c": True, "d": {"x": [1]}, "e": "fp8", "f_g": None, "h": "a=b"}
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["enforce_eager"], "--engine-arg enforce_eager: expected KEY=VALUE"),
        (["a=1", "a=2"], "--engine-arg a: given twice"),
        (["tensor-parallel-size=2"], "use --tensor-parallel-size"),
        (["device=cpu"], "use --device"),
        (["generation_config=auto"], "is set by dpoctl"),
        (["a={"], "not a valid value"),
    ],
)
def test_arguments_that_cannot_be_are_refused(given, said):
    with pytest.raises(InputError) as e:
        options(engine="vllm", engine_arg=given)
    assert said in str(e.value)


# --- sampling first, scoring after the engine is closed -------------------------------------------------------------

SAMPLED = "--model sft --prompts train.jsonl --max-new-tokens 12"
PREFS = f"make-prefs {SAMPLED} --scorer classifier --completions 4"
AHEAD = "--engine vllm --engine-batch-size 16"


def here_runs(line: str) -> int:
    return run(shlex.split(line))


def scorers_opened(monkeypatch, ahead) -> list[bool]:
    """Whether the engine is closed, for each scorer that is opened."""
    opened, plain = [], sampler.load_scorer

    def load_scorer(*args):
        opened.append(ahead.opened[-1].closed)
        return plain(*args)

    monkeypatch.setattr(sampler, "load_scorer", load_scorer)
    return opened


def test_an_engine_that_is_closed_before_scoring_gives_the_same_preferences(here, monkeypatch, tmp_path):
    assert (
        here_runs(f"{PREFS} --generation-batch-size 16 --completions-out {tmp_path}/c.jsonl --out {tmp_path}/a.jsonl")
        == 0
    )
    ahead = use_ahead(monkeypatch.setattr)
    scorers = scorers_opened(monkeypatch, ahead)
    assert here_runs(f"{PREFS} {AHEAD} --completions-out {tmp_path}/d.jsonl --out {tmp_path}/b.jsonl") == 0
    assert scorers == [False, True]  # the first to see that it can be used
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()
    assert [engine.closed for engine in ahead.opened] == [True] and ahead.opened[0].calls == 6
    assert not list(tmp_path.glob("*.samples.*"))
    manifest = json.loads((tmp_path / "b.jsonl.manifest.json").read_text())
    assert manifest["identity"]["engine"] == "vllm" and manifest["identity"]["engine version"] == "ahead 1"


def interrupted_at(monkeypatch, module: str, name: str, call: int):
    """Make a function raise Interrupted at a call, as a signal does."""
    import importlib

    owner, _, attribute = name.rpartition(".")
    target = importlib.import_module(module)
    target = getattr(target, owner) if owner else target
    plain, calls = getattr(target, attribute), []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Interrupted("stopped by the test")
        return plain(*args, **kwargs)

    monkeypatch.setattr(target, attribute, function)


@pytest.mark.parametrize(("stopped", "sampled_again"), [("sampling", 4), ("scoring", 0), ("finish", 0)])
def test_a_stopped_command_samples_nothing_twice(here, monkeypatch, tmp_path, stopped, sampled_again):
    assert here_runs(f"{PREFS} --generation-batch-size 16 --out {tmp_path}/a.jsonl") == 0
    ahead = use_ahead(monkeypatch.setattr)
    line = f"{PREFS} {AHEAD} --out {tmp_path}/b.jsonl"
    with monkeypatch.context() as patch:
        if stopped == "sampling":
            interrupted_at(patch, "helpers.engines", "Ahead.complete", 3)
        elif stopped == "scoring":
            interrupted_at(patch, "dpoctl.inference.scorers", "ClassifierScorer._score", 3)
        else:
            interrupted_at(patch, "dpoctl.outputs.row_writer", "RowWriter.finish", 1)
        assert here_runs(line) == 75
    assert all(engine.closed for engine in ahead.opened)
    before = sum(engine.calls for engine in ahead.opened)
    scorers = scorers_opened(monkeypatch, ahead)
    assert here_runs(line) == 0
    assert scorers == ([False, True] if sampled_again else [True])
    assert sum(engine.calls for engine in ahead.opened) - before == sampled_again
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert not list(tmp_path.glob("b.jsonl.samples.*"))


def test_best_of_n_and_evaluate_sample_first_too(here, monkeypatch, tmp_path):
    best = f"sample {SAMPLED} --best-of 4 --scorer classifier"
    evaluate = (
        "evaluate --model sft --model lm --ref lm --prompts test.jsonl --scorer classifier --n 2 --max-new-tokens 12"
    )
    assert here_runs(f"{best} --generation-batch-size 16 --out {tmp_path}/a.jsonl") == 0
    assert here_runs(f"{evaluate} --generation-batch-size 16 --out {tmp_path}/e.jsonl") == 0
    ahead = use_ahead(monkeypatch.setattr)
    assert here_runs(f"{best} {AHEAD} --out {tmp_path}/b.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    with monkeypatch.context() as patch:  # while the second model is sampled
        interrupted_at(patch, "helpers.engines", "Ahead.complete", 3)
        assert here_runs(f"{evaluate} {AHEAD} --out {tmp_path}/f.jsonl") == 75
    before = len(ahead.opened)
    assert here_runs(f"{evaluate} {AHEAD} --out {tmp_path}/f.jsonl") == 0
    assert len(ahead.opened) == before + 1 and all(engine.closed for engine in ahead.opened)
    assert (tmp_path / "e.jsonl").read_bytes() == (tmp_path / "f.jsonl").read_bytes()
    assert not list(tmp_path.glob("*.samples.*"))


def test_an_engine_that_samples_another_distribution_is_told(here, monkeypatch, tmp_path, capsys):
    line = "evaluate --model sft --ref lm --prompts test.jsonl --scorer classifier --n 4 --max-new-tokens 12"
    ahead = use_ahead(monkeypatch.setattr)
    assert here_runs(f"{line} {AHEAD} --out {tmp_path}/a.jsonl") == 0
    assert "more than chance" not in " ".join(capsys.readouterr().err.split())
    complete = ahead.complete
    monkeypatch.setattr(ahead, "complete", lambda self, p, ks, s: complete(self, p, ks, replace(s, temperature=2.0)))
    assert here_runs(f"{line} {AHEAD} --out {tmp_path}/b.jsonl") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "sft by --engine vllm: log-ratios and exact KLs differ" in said and "more than chance" in said


def test_a_scorer_that_cannot_be_used_is_refused_before_anything_is_sampled(here, monkeypatch, tmp_path, capsys):
    (tmp_path / "s.py").write_text("def score(rows):\n    return 1 / 0\nbroken = 1 / 0\n")
    ahead = use_ahead(monkeypatch.setattr)
    line = f"make-prefs {SAMPLED} --scorer python:{tmp_path}/s.py:score {AHEAD} --out {tmp_path}/b.jsonl"
    assert here_runs(line) == 2
    assert "line 3: ZeroDivisionError" in capsys.readouterr().err
    assert [engine.calls for engine in ahead.opened] == [0]
    assert {path.name for path in tmp_path.iterdir()} == {"s.py"}


def test_another_version_or_engine_is_refused_and_its_shards_are_not_merged(here, monkeypatch, tmp_path, capsys):
    ahead = use_ahead(monkeypatch.setattr)
    line = f"sample {SAMPLED} --n 2 {AHEAD}"
    with monkeypatch.context() as patch:
        interrupted_at(patch, "helpers.engines", "Ahead.complete", 2)
        assert here_runs(f"{line} --out {tmp_path}/a.jsonl") == 75
    assert here_runs(f"{line} --shard 1/2 --out {tmp_path}/1.jsonl") == 0
    monkeypatch.setattr(ahead, "version", "2")
    capsys.readouterr()
    assert here_runs(f"{line} --out {tmp_path}/a.jsonl") == 2
    assert "was started with engine version ahead 1, now it is ahead 2" in " ".join(capsys.readouterr().err.split())
    assert here_runs(f"sample {SAMPLED} --n 2 --out {tmp_path}/a.jsonl") == 2
    assert "was started with --engine vllm, now it is transformers" in " ".join(capsys.readouterr().err.split())
    assert here_runs(f"{line} --shard 2/2 --out {tmp_path}/2.jsonl") == 0
    assert here_runs(f"merge {tmp_path}/1.jsonl {tmp_path}/2.jsonl --out {tmp_path}/m.jsonl") == 2
    assert "the engine's version was ahead 2 and ahead 1" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(ahead, "version", "1")  # finished batches stay as they are
    assert here_runs(f"{line} --out {tmp_path}/a.jsonl") == 0
    assert here_runs(f"{line} --shard 2/2 --out {tmp_path}/2.jsonl --overwrite") == 0
    assert here_runs(f"merge {tmp_path}/1.jsonl {tmp_path}/2.jsonl --out {tmp_path}/m.jsonl") == 0
    rows = [json.loads(text) for text in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(r["prompt_id"], r["k"]) for r in rows] == [
        (json.loads(text)["prompt_id"], k) for text in open("train.jsonl").read().splitlines() for k in range(2)
    ]
