"""vLLM as an engine, with a stand-in that tells what it was asked: arguments, errors, its process and its end."""

import json
import os
import signal
import tempfile
import time

import pytest

from dpoctl.cli.app import run
from dpoctl.data.codec import Codec
from dpoctl.errors import InputError, Interrupted
from dpoctl.inference.engines import vllm_process
from dpoctl.inference.engines.adapters import adapter_plan
from dpoctl.inference.engines.engine import seed_of
from dpoctl.inference.engines.vllm_engine import VllmEngine
from dpoctl.inference.engines.vllm_process import environment, installed_version
from dpoctl.inference.generate import PromptTokens, Sampling
from dpoctl.runtime import signals
from helpers.chain import wait_until
from helpers.engines import VllmOptions, fake_vllm
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import byte_level_bpe


@pytest.fixture
def told(tmp_path, monkeypatch):
    """The file in which a stand-in for vLLM tells what it was asked."""
    path = fake_vllm(tmp_path / "packages")
    packages = str(tmp_path / "packages")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # of vLLM's log, which a killed command leaves
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
    engine = VllmEngine(VllmOptions(("enforce_eager=true",), max_model_len=32), folder, codec, 64)
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
        VllmEngine(VllmOptions(max_model_len=65), folder, codec, 64)
    engine = VllmEngine(VllmOptions(max_model_len=4), folder, codec, 64)
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
    engine = VllmEngine(VllmOptions(), saved[0], saved[1], 64)
    with pytest.raises(InputError) as e, engine:
        engine.complete(PROMPTS, [0], Sampling())
    assert said in e.value.message and hint in e.value.hint
    log = e.value.hint.rpartition(" ")[2]
    assert os.path.exists(log)
    os.unlink(log)


def test_a_signal_stops_vllm_at_once_and_its_process_ends(told, saved, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "hang")
    monkeypatch.setattr(signals, "stop", signals.Stop())
    engine = VllmEngine(VllmOptions(), saved[0], saved[1], 64)
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
    engine = VllmEngine(VllmOptions(), saved[0], saved[1], 64)
    command = os.fork()
    if not command:
        engine.complete(PROMPTS, [0], Sampling())
        os._exit(0)
    wait_until(lambda: told.exists() and "pid" in told.read_text())
    (pid,) = [value for name, value in asked(told) if name == "pid"]
    assert running(pid)
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    wait_until(lambda: not running(pid))


def test_missing_vllm_is_told(saved, monkeypatch, capsys, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt_id": "a", "prompt": "The film"}\n')
    monkeypatch.setattr(vllm_process.importlib.util, "find_spec", lambda name: None)
    line = f"sample --model {saved[0]} --prompts {tmp_path}/p.jsonl --engine vllm --out {tmp_path}/out/o.jsonl"
    assert run(line.split()) == 2
    assert "vLLM is not installed\nhint: pip install 'dpoctl[vllm]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert environment(VllmOptions())["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment(VllmOptions(device="cuda:2", tensor_parallel_size=2))["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    found = environment(VllmOptions(tensor_parallel_size=2))
    assert found["CUDA_VISIBLE_DEVICES"] == "3,1"
    assert {"LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"}.isdisjoint(found)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="GPUs 4 to 5 are needed, of rank 2, and 4 are visible"):
        environment(VllmOptions(tensor_parallel_size=2))
    assert "CUDA_VISIBLE_DEVICES" in environment(VllmOptions(device="cpu"))  # as it was


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
