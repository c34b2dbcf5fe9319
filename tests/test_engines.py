"""Engines: what is the same for all of them, the order of sampling and scoring, and what vLLM is asked."""

import json
import os
import shlex
import signal
import time
from dataclasses import dataclass, replace

import pytest

from dpoctl.cli.app import run
from dpoctl.config.engines import engine_arguments
from dpoctl.config.resolve import resolve
from dpoctl.config.sampling import Sample
from dpoctl.data.codec import Codec
from dpoctl.errors import InputError, Interrupted
from dpoctl.inference.engines import vllm_process
from dpoctl.inference.engines.adapters import adapter_plan
from dpoctl.inference.engines.engine import Sampled, completion_of, seed_of
from dpoctl.inference.engines.vllm_engine import VllmEngine
from dpoctl.inference.engines.vllm_process import environment, installed_version
from dpoctl.inference.generate import PromptTokens, Sampling, ends_at, generate
from dpoctl.inference.sampler import divide
from dpoctl.runtime import signals
from helpers.engines import fake_vllm, use_ahead
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


def test_an_engine_that_is_closed_before_scoring_gives_the_same_preferences(here, monkeypatch, tmp_path):
    assert (
        here_runs(f"{PREFS} --generation-batch-size 16 --completions-out {tmp_path}/c.jsonl --out {tmp_path}/a.jsonl")
        == 0
    )
    ahead = use_ahead(monkeypatch.setattr)
    assert here_runs(f"{PREFS} {AHEAD} --completions-out {tmp_path}/d.jsonl --out {tmp_path}/b.jsonl") == 0
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
    assert here_runs(line) == 0
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


# --- what vLLM is asked ---------------------------------------------------------------------------------------------


@dataclass
class Given:
    """Options of an engine."""

    engine_arg: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The file in which a stand-in for vLLM tells what it was asked."""
    path = fake_vllm(tmp_path / "packages")
    packages = str(tmp_path / "packages")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([packages, os.environ.get("PYTHONPATH", "")]))
    return path


@pytest.fixture
def saved(tmp_path):
    """(folder of a model, its codec)."""
    tokenizer = byte_level_bpe()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    tiny_model("gpt2", vocab=len(tokenizer), context=64, **ids).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m"), Codec(tokenizer)


PROMPTS = [PromptTokens("a", [7, 8], frozenset({0})), PromptTokens("b", [9], frozenset({3, 0}))]


def asked(told) -> list:
    return [json.loads(text) for text in told.read_text().splitlines()]


def test_what_vllm_is_asked(told, saved):
    folder, codec = saved
    engine = VllmEngine(Given(("enforce_eager=true",), max_model_len=32), folder, codec, 64)
    assert engine.context == 32
    engine.logps = True
    counted = []
    engine.on_finished = counted.append
    with engine:
        found = engine.complete(PROMPTS, [0, 2], Sampling(temperature=0.7, top_p=0.9, max_new_tokens=4, seed=5))
        engine.complete(PROMPTS[:1], [0], Sampling(temperature=0, top_p=0.9, top_k=3, max_new_tokens=4, stop=("x",)))
        log = engine.process.log
        assert log.exists()
    assert not log.exists()
    assert found[0][0].ids == [5, 5, 5, 0] and found[0][0].finish == "stop" and found[0][0].logp == -2.0
    assert sum(counted) == 5
    (_, start), (_, rows), (_, again), (_, greedy) = asked(told)
    assert {
        "model": folder,
        "tokenizer": folder,
        "dtype": "float32",
        "max_model_len": 32,
        "enforce_eager": True,
    }.items() <= (start.items())
    assert start["skip_tokenizer_init"] and not again["skip_tokenizer_init"]
    assert start["generation_config"] == "vllm"
    assert [ids for ids, _ in rows] == [[7, 8], [7, 8], [9], [9]]
    seeds = [seed_of(5, key, k) for key in ("a", "b") for k in (0, 2)]
    assert [given["seed"] for _, given in rows] == seeds
    shared = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "max_tokens": 4, "ignore_eos": True, "detokenize": False}
    assert all(shared.items() <= given.items() for _, given in rows)
    assert [given["stop_token_ids"] for _, given in rows] == [[0], [0], [0, 3], [0, 3]]
    assert all(given["logprobs"] == 0 for _, given in rows)
    assert greedy[0][1]["temperature"] == 0 and greedy[0][1]["seed"] is None and "top_k" not in greedy[0][1]
    assert greedy[0][1]["stop"] == ["x"] and greedy[0][1]["detokenize"]


def test_a_length_beyond_the_context_and_a_prompt_that_fills_it_are_refused(told, saved):
    folder, codec = saved
    with pytest.raises(InputError, match="--max-model-len 65: .* has a context of 64 tokens"):
        VllmEngine(Given(max_model_len=65), folder, codec, 64)
    engine = VllmEngine(Given(max_model_len=4), folder, codec, 64)
    with pytest.raises(InputError, match="leave no room in the model's context of 4"):
        engine.complete([PromptTokens("a", [7, 8, 9, 7], frozenset({0}))], [0], Sampling())
    with pytest.raises(InputError, match="--temperature 0.001: vLLM would sample at 0.01"):
        engine.complete(PROMPTS, [0], Sampling(temperature=0.001))
    assert not told.exists()  # it was not started


@pytest.mark.parametrize(
    ("fault", "said", "hint"),
    [
        ("refuse", "ValueError: Model architectures", "this vLLM lacks the architecture"),
        ("die", "its process ended by SIGKILL", "vLLM's log is"),
    ],
)
def test_what_vllm_refuses_is_told_with_a_hint(told, saved, monkeypatch, fault, said, hint):
    monkeypatch.setenv("FAKE_VLLM", fault)
    engine = VllmEngine(Given(), saved[0], saved[1], 64)
    with pytest.raises(InputError) as e, engine:
        engine.complete(PROMPTS, [0], Sampling())
    assert said in e.value.message and hint in e.value.hint
    log = e.value.hint.rpartition(" ")[2]
    assert os.path.exists(log)
    os.unlink(log)


def test_a_signal_stops_vllm_at_once_and_its_process_ends(told, saved, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "hang")
    monkeypatch.setattr(signals, "stop", signals.Stop())
    engine = VllmEngine(Given(), saved[0], saved[1], 64)
    plain = vllm_process.signals.at_boundary

    def at_boundary(done):
        if told.exists() and "pid" in told.read_text():
            signals.stop(signal.SIGTERM, None)
        plain(done)

    monkeypatch.setattr(signals, "at_boundary", at_boundary)
    start = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM after the batches before, which are kept"), engine:
        engine.complete(PROMPTS, [0], Sampling())
    assert time.monotonic() - start < 60
    (pid,) = [value for name, value in asked(told) if name == "pid"]
    assert not running(pid)


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_vllm_ends_with_a_command_that_is_killed(told, saved, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "hang")
    engine = VllmEngine(Given(), saved[0], saved[1], 64)
    command = os.fork()
    if not command:
        engine.complete(PROMPTS, [0], Sampling())
        os._exit(0)
    until(lambda: told.exists() and "pid" in told.read_text())
    (pid,) = [value for name, value in asked(told) if name == "pid"]
    assert running(pid)
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    until(lambda: not running(pid))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_missing_and_old_vllm_are_told(here, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: None)
    assert here_runs(f"sample {SAMPLED} --engine vllm --out {tmp_path}/o.jsonl") == 2
    assert "vLLM is not installed\nhint: pip install 'dpoctl[vllm]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("version", "refused"), [("0.29.1", True), ("0.30.0", False), ("1.0", False), ("0.1.dev1+g12", False)]
)
def test_old_versions_are_refused(monkeypatch, told, version, refused):
    monkeypatch.setattr(vllm_process, "version", lambda name: version)
    if not refused:
        assert installed_version() == version
        return
    with pytest.raises(InputError, match=rf"vLLM {version} is installed; 0.30 or later is needed"):
        installed_version()


def test_each_rank_takes_gpus_of_its_own(monkeypatch):
    monkeypatch.setattr(vllm_process.torch.cuda, "device_count", lambda: 4)
    for name in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "VLLM_LOGGING_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    assert environment(Given())["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment(Given(device="cuda:2", tensor_parallel_size=2))["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    found = environment(Given(tensor_parallel_size=2))
    assert found["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}.isdisjoint(found)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="GPUs 4 to 5 are needed, of rank 2, and 4 are visible"):
        environment(Given(tensor_parallel_size=2))
    assert "CUDA_VISIBLE_DEVICES" in environment(Given(device="cpu"))  # as it was


_FAILED = """\
(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=1) ERROR 11-26 10:00:00 [core.py:1] ValueError: Free memory on device cuda:0 (3.1/79.2 GiB) is \
less than desired GPU memory utilization (0.9, 71.3 GiB).
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}
"""


def test_the_first_cause_is_found_in_the_log():
    found = vllm_process._cause(_FAILED)
    assert found.startswith("ValueError: Free memory on device cuda:0")
    assert vllm_process._cause("INFO all is well\nno Error here") == ""
    refused = "ValidationError: 1 validation error for ModelConfig\n  Value error, Model X [type=value_error, input={}]"
    assert vllm_process._line(refused) == "ValidationError: 1 validation error for ModelConfig Value error, Model X"


def test_adapters_that_vllm_cannot_apply_are_refused(tmp_path, saved):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder, _ = saved
    for name, given, said in (
        ("plain", {}, ""),
        ("dora", {"use_dora": True}, "DoRA"),
        ("embeddings", {"modules_to_save": ["wte"]}, "whole modules"),
        ("pattern", {"rank_pattern": {"c_attn": 2}}, "different ranks"),
    ):
        config = peft.LoraConfig(r=12, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", **given)
        model = AutoModelForCausalLM.from_pretrained(folder)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
        if said:
            with pytest.raises(InputError, match=f"vLLM cannot apply this adapter: it has {said}"):
                adapter_plan(name, str(tmp_path / name))
        else:
            plan = adapter_plan(name, str(tmp_path / name))
            assert (plan.base.path, plan.rank) == (folder, 16)
    assert adapter_plan(folder, folder) is None
