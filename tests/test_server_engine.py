"""--engine server: token ids through servers that misbehave, every row once, and no other model or tokenizer unseen."""

import threading
import time
from types import SimpleNamespace

import pytest

from dpoctl.errors import InputError, Interrupted
from dpoctl.inference.engines import server as server_module
from dpoctl.inference.engines.server import ServerEngine
from dpoctl.inference.generate import PromptTokens, Sampling
from dpoctl.models.tokenizers import load_codec
from dpoctl.outputs.answers import Answers
from dpoctl.runtime import http, signals
from helpers.chain import lines_in, wait_until
from helpers.engines import ServerOptions
from helpers.generation_server import GenerationServer, greedy, parameters_of

KEY = "sk-canary-0123456789abcdef"
SAMPLING = Sampling(temperature=1.0, max_new_tokens=8, seed=3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits between retries are short."""
    monkeypatch.setattr(http, "_FIRST_WAIT_S", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("DPOCTL_API_KEY", raising=False)


@pytest.fixture(scope="module")
def lm(world):
    return world.folder / "lm"


@pytest.fixture(scope="module")
def codec(lm):
    return load_codec(str(lm))


@pytest.fixture
def opened(lm, codec):
    """Open an engine on a server; it is closed at the end."""
    engines = []

    def open_(server, **options):
        engines.append(ServerEngine(ServerOptions(server.url, **options), str(lm), codec, 96))
        return engines[-1]

    yield open_
    for engine in engines:
        engine.close()


def prompts(n: int) -> list[PromptTokens]:
    return [PromptTokens(f"p{i}", [5, 6 + i % 50, 7], frozenset([0])) for i in range(n)]


def ids_of(engine, n: int = 6, ks=(0, 1), sampling=SAMPLING) -> list[list[list[int]]]:
    return [[c.ids for c in row] for row in engine.complete(prompts(n), list(ks), sampling)]


# --- requests and answers


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_is_sent_and_what_comes_back(kind, lm, opened):
    with GenerationServer(lm, kind=kind) as server:
        engine = opened(server)
        assert engine.context == 96  # the smaller one of the model's and the server's
        found = engine.complete(prompts(3), [0, 2], Sampling(0.7, 0.9, 0, 8, (), 3))
        bodies = server.bodies
    given = {tuple(parameters_of(body)[0]): parameters_of(body)[1] for body in bodies}
    assert set(given) == {(5, 6, 7), (5, 7, 7), (5, 8, 7)}
    for each in given.values():
        sent = {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert (sent | {"presence_penalty": 0.0, "frequency_penalty": 0.0}).items() <= each.items()
        assert each["stop_token_ids"] == [0] and each["ignore_eos"] and each["max_tokens"] == 8
    seeds = {parameters_of(body)[1]["seed"] for body in bodies}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    for completion in (c for row in found for c in row):
        assert (completion.finish == "stop") == (completion.ids[-1] == 0) and 0 not in completion.ids[:-1]
        assert completion.finish == "stop" or len(completion.ids) == 8


def test_answers_do_not_depend_on_what_is_asked_beside(lm, opened):
    with GenerationServer(lm) as server:
        engine = opened(server)
        every = ids_of(engine, 6, (0, 1, 2))
        assert [row[2:] for row in every[:2]] == ids_of(engine, 2, (2,))
        assert len({tuple(ids) for row in every for ids in row}) == 18
        assert ids_of(engine, sampling=Sampling(1.0, max_new_tokens=8, seed=4)) != every
        wait_until(lambda: len(server.connections) <= 1)  # those of a batch are closed with it


def test_room_in_the_context(lm, opened):
    with GenerationServer(lm, context=9, sample=lambda server, ids, p: ([4] * p["max_tokens"], "length")) as server:
        engine = opened(server)
        assert engine.context == 9 and len(ids_of(engine, 1, (0,))[0][0]) == 6
        assert {len(body["prompt"]) for body in server.probes} == {8}
        with pytest.raises(InputError, match="no room"):
            engine.complete([PromptTokens("p", list(range(1, 10)), frozenset([0]))], [0], SAMPLING)


def test_equal_to_the_transformers_engine_at_temperature_0(world, lm, codec, opened):
    """The server picks the most likely tokens by plain forward passes; texts, ends and ids are equal."""
    from transformers import AutoModelForCausalLM

    rows = world.rows("test.jsonl")[:6]
    world.run("sample --model lm --prompts test.jsonl --limit 6 --temperature 0 --max-new-tokens 12 --out local.jsonl")
    with GenerationServer(lm, sample=greedy(AutoModelForCausalLM.from_pretrained(lm).eval())) as server:
        world.run(
            "sample --model lm --prompts test.jsonl --limit 6 --temperature 0 --max-new-tokens 12 --engine server "
            f"--base-url {server.url} --out served.jsonl"
        )
    assert len(rows) == 6 and world.rows("local.jsonl") == world.rows("served.jsonl")


# --- faults


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
def test_faults_change_no_answer(kind, lm, opened):
    faults = [(0.06, fault) for fault in ("500", "429", "closed", "garbage", "no ids")]
    with GenerationServer(lm, kind=kind) as server:
        calm = ids_of(opened(server), 60)
    with GenerationServer(lm, kind=kind, faults=[*faults, (0.02, "late")]) as server:
        assert ids_of(opened(server), 60) == calm
        assert set(server.served.values()) == {1} and len(server.served) >= 110
        assert {"500", "429", "closed", "garbage", "no ids"} <= set(server.kinds)


def _choice(change):
    def spoil(data):
        if data["choices"][0]["token_ids"] and len(data["choices"][0]["prompt_token_ids"]) == 3:  # not the probe's
            change(data["choices"][0], data["usage"])
        return data

    return spoil


def _grow(choice, usage):
    choice["token_ids"] = choice["token_ids"] * 9
    usage["completion_tokens"] = len(choice["token_ids"])


WRONG = {
    "without token ids": lambda choice, usage: choice.update(token_ids=None),
    "without the fields": lambda choice, usage: choice.pop("finish_reason"),
    "the server counts": lambda choice, usage: choice["token_ids"].insert(0, 9),
    "at most 8 were asked for": _grow,
    "other token ids than": lambda choice, usage: choice["prompt_token_ids"].append(3),
    "to a prompt of 5 tokens": lambda choice, usage: usage.update(prompt_tokens=5),
    "unknown finish_reason 'repetition'": lambda choice, usage: choice.update(finish_reason="repetition"),
    "does not end an answer": lambda choice, usage: (
        choice.update(token_ids=[9] * 8, finish_reason="stop") or usage.update(completion_tokens=8)
    ),
    "goes on after end token 0": lambda choice, usage: (
        choice.update(token_ids=[9, 0, 9, 0], finish_reason="stop") or usage.update(completion_tokens=4)
    ),
    "was cut at 2 tokens": lambda choice, usage: (
        choice.update(token_ids=[9, 9], finish_reason="length") or usage.update(completion_tokens=2)
    ),
    "the vocabulary has": lambda choice, usage: (
        choice.update(token_ids=[10**6] * 8, finish_reason="length") or usage.update(completion_tokens=8)
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_an_answer_that_is_none(said, lm, opened):
    with GenerationServer(lm, spoil=_choice(WRONG[said])) as server:
        engine = opened(server, retries=1)
        with pytest.raises(InputError, match=said) as error:
            ids_of(engine)
        assert "return_token_ids" in error.value.hint


def test_a_server_without_ids_is_refused_at_once(lm, opened):
    def spoil(data):
        data["choices"][0].pop("token_ids")
        return data

    with GenerationServer(lm, spoil=spoil) as server:
        with pytest.raises(InputError, match="without token ids"):
            opened(server)
        assert len(server.probes) == 1


@pytest.mark.parametrize(
    ("more", "options", "said", "hint"),
    [
        ({"status": 401}, {}, "401", "DPOCTL_API_KEY"),
        ({"status": 404}, {}, "404", "--base-url"),
        ({"status": 400}, {}, "400", "--max-model-len"),
        ({"others": ("other",)}, {}, "several models: model, other", "--served-model"),
        ({"others": ("other",)}, {"served_model": "mine"}, "not served", "it serves model, other"),
    ],
)
def test_what_no_retry_can_mend(more, options, said, hint, lm, opened):
    with GenerationServer(lm, **more) as server:
        with pytest.raises(InputError, match=said) as error:
            opened(server, **options)
        assert hint in error.value.hint and not server.probes


def test_one_of_several_models(lm, opened):
    with GenerationServer(lm, others=("other",)) as server:
        assert opened(server, served_model="model").settings()["model"] == "model"


@pytest.mark.parametrize("name", ["DPOCTL_API_KEY", "OPENAI_API_KEY"])
def test_the_key_is_sent_and_never_shown(name, lm, opened, monkeypatch):
    monkeypatch.setenv(name, KEY)
    with GenerationServer(lm, needs_key=KEY) as server:
        ids_of(opened(server), 2)
        server.needs_key = "another"
        with pytest.raises(InputError, match="401") as error:
            opened(server)
        assert server.keys == {f"Bearer {KEY}"} and KEY not in str(error.value) and "[the key]" in str(error.value)


def test_a_server_that_is_away(lm, opened):
    server = GenerationServer(lm)
    server.start()
    server.stop()
    with pytest.raises(Interrupted, match="does not answer"):
        opened(server, retries=1)
    with server:
        engine = opened(server, retries=1, concurrency=2)
        server.stop()
        start = time.monotonic()
        with pytest.raises(Interrupted, match="16 completions are pending"):
            ids_of(engine, 8)
        assert time.monotonic() - start < 3  # the others are not asked for one after another
        server.start()


# --- another model, another tokenizer


@pytest.mark.slow
def test_another_model_after_a_restart(lm, opened):
    for changes in ({"name": "second"}, {"root": "/second"}, {"weights": "second"}, {"version": "0.33"}):
        with GenerationServer(lm, delay_s=0.01, away_s=0.05, restarts={10: changes}) as server:
            engine = opened(server, retries=6)
            with pytest.raises(InputError, match="another model than at the start|does not exist"):
                ids_of(engine, 15)
            assert server.served.total() == 10  # the other model was asked for nothing but the probe
    with GenerationServer(lm) as server:
        calm = ids_of(opened(server), 15)
    with GenerationServer(lm, delay_s=0.01, away_s=0.05, restarts={10: {}}) as server:
        assert ids_of(opened(server, retries=6), 15) == calm and set(server.served.values()) == {1}


def test_another_model_between_two_requests(lm, opened):
    """No request was in flight as the server went away, so that no connection was seen to break."""
    with GenerationServer(lm) as server:
        engine = opened(server)
        ids_of(engine)
        server.away_s = 0
        server.restart(weights="second")
        with pytest.raises(InputError, match="nats per token"):
            ids_of(engine)


def test_a_server_of_other_weights_than_the_model(lm, codec, world, opened):
    with GenerationServer(lm, root=world.folder / "classifier") as server:
        with pytest.raises(InputError, match="which is not --model") as error:
            opened(server)
        assert f"--model {world.folder / 'classifier'}" in error.value.hint
        server.root = str(lm) + "/../lm"
        opened(server)


def test_a_model_that_cannot_be_compared(lm, opened, capsys):
    with GenerationServer(lm, root="org/model") as server:
        opened(server)
    assert "cannot see whether they are the same" in " ".join(capsys.readouterr().err.split())


def test_another_tokenizer(lm, tmp_path, opened, capsys):
    from transformers import AutoTokenizer

    from dpoctl.tasks import toy_models, toy_text

    toy_models.build_base_lm([r["text"] for r in toy_text.reviews(20, 5)], tmp_path / "other", 1, steps=1, batch=4)
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    with GenerationServer(lm, root=lm) as server:
        server.__dict__["tokenizer"] = other
        with pytest.raises(InputError, match="tokenizer is not that of --model"):
            opened(server)
        server.tokenizes = False
        opened(server)
    assert "is not checked" in capsys.readouterr().err


# --- answers are kept


def test_a_damaged_answer_is_asked_for_again(tmp_path):
    path = tmp_path / "o.jsonl.answers"
    answers = Answers(path, resuming=False)
    answers.server = {"settings": {}}
    for i in range(4):
        answers.keep(f"k{i}", {"ids": [i]})
    answers.close()
    good = path.read_bytes().splitlines(keepends=True)
    spoilt = [*good[:2], good[2].replace(b"[1]", b"[7]"), good[3], good[4][:-9]]
    path.write_bytes(b"".join(spoilt))
    again = Answers(path, resuming=True)
    assert [again.known(f"k{i}") for i in range(4)] == [{"ids": [0]}, None, {"ids": [2]}, None]
    again.keep("k3", {"ids": [3]})
    again.close()
    assert path.read_bytes() == b"".join([good[0], good[1], good[3], good[4]])
    path.write_bytes(b"".join(good[1:]))  # whose answers they are is lost
    assert len(Answers(path, resuming=True)) == 0 and not path.read_bytes()
    assert len(Answers(path, resuming=False)) == 0 and not path.exists()


def output(folder, resuming: bool):
    return SimpleNamespace(out=folder / "o.jsonl", resuming=resuming, answers=None, holds_claim=True)


def test_an_outage_loses_no_answer(lm, opened, tmp_path):
    with GenerationServer(lm) as server:
        calm = ids_of(opened(server), 40)
    with GenerationServer(lm, delay_s=0.01, away_s=60, restarts={30: {}}) as server:
        engine = opened(server, retries=2)
        engine.keep_answers(output(tmp_path, False))
        with pytest.raises(Interrupted, match="pending.*the other answers are kept"):
            ids_of(engine, 40)
        engine.close()
        kept = lines_in(tmp_path / "o.jsonl.answers") - 1
        assert 22 <= kept <= 30
        asked = server.served.total()
        server.start()
        engine = opened(server)
        engine.keep_answers(output(tmp_path, True))
        assert ids_of(engine, 40) == calm and server.served.total() - asked == 80 - kept
        server.weights = "second"
        with pytest.raises(InputError, match="another model"):
            opened(server).keep_answers(output(tmp_path, True))


def test_a_signal_while_the_server_is_away(lm, opened, monkeypatch):
    monkeypatch.setattr(http, "_FIRST_WAIT_S", 60)
    monkeypatch.setattr(signals.stop, "signal", "")
    server = GenerationServer(lm)
    server.start()
    server.stop()
    threading.Timer(0.3, setattr, (signals.stop, "signal", "SIGTERM")).start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        opened(server)
    assert time.monotonic() - start < 10


def test_a_signal_keeps_what_has_come(lm, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "_GRACE_S", 0.3)
    monkeypatch.setattr(signals.stop, "signal", "")
    with GenerationServer(lm, delay_s=0.05) as server:
        engine = opened(server, timeout=60)
        engine.keep_answers(output(tmp_path, False))
        server.bodies.clear()

        def stop():
            wait_until(lambda: server.served.total() > 10)
            server.delay_s = 30  # these are given up
            time.sleep(0.2)
            signals.stop.signal = "SIGTERM"

        threading.Thread(target=stop).start()
        start = time.monotonic()
        with pytest.raises(Interrupted, match="stopped by SIGTERM after .* answers of this batch"):
            ids_of(engine, 100)
        assert time.monotonic() - start < 10
        assert lines_in(tmp_path / "o.jsonl.answers") - 1 == server.served.total()
