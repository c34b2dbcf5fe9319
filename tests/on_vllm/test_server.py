"""--engine server against vLLM's own server: greedy and sampled tokens, end tokens, log-probs, kills, another model."""

import pytest
import torch

from dpoctl.inference.engines.server import ServerEngine
from dpoctl.inference.generate import PromptTokens, Sampling, generate
from dpoctl.models.load import load_policy
from dpoctl.models.logprobs import response_logps
from dpoctl.models.place import Place
from dpoctl.models.tokenizers import load_codec, load_tokenizer
from helpers.chain import lines_in, wait_until
from helpers.distributions import p_value, restricted
from helpers.engines import ServerOptions
from helpers.ranks import free_port
from helpers.tiny_models import tiny_model
from helpers.vllm_server import VllmServer

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    """A server of a small model with heads of a size that vLLM has for processors, and the world's tokenizer."""
    folder = world.folder / "llama"
    tokenizer = load_tokenizer(str(world.folder / "lm"))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tiny_model("llama", vocab=len(tokenizer), context=256, width=64, heads=2, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server = VllmServer(folder, "mini", free_port(), tmp_path_factory.mktemp("served") / "log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def engine(served):
    codec = load_codec(str(served.model))
    engine = ServerEngine(ServerOptions(served.url, timeout=120, retries=3), str(served.model), codec, 256)
    yield engine
    engine.close()


def prompts(n: int, stops) -> list[PromptTokens]:
    return [PromptTokens(f"p{i}", [5 + i, 60 + i, 7, 300 + i], frozenset(stops)) for i in range(n)]


def local(served, asked, sampling):
    policy = load_policy(str(served.model), Place(torch.device("cpu"), torch.float32))
    return policy, generate(policy.model, policy.tokenizer, asked, [0], sampling)


def test_greedy_tokens_and_ends_are_those_of_the_transformers_engine(served, engine):
    """The ends are those that are given: not the tokenizer's, and every third token, in turn."""
    for stops in ([0], range(1, 1500, 3), []):
        asked, sampling = prompts(12, stops), Sampling(temperature=0, max_new_tokens=24)
        _, expected = local(served, asked, sampling)
        assert engine.complete(asked, [0], sampling) == expected
    text = expected[0][0].text
    sampling = Sampling(temperature=0, max_new_tokens=24, stop=(text[len(text) // 2 :][:3], text[-2:]))
    _, expected = local(served, asked, sampling)
    assert any(row[0].finish == "stop" for row in expected)
    assert engine.complete(asked, [0], sampling) == expected


def test_settings_and_seeds(served, engine):
    import vllm

    assert engine.settings() == {
        "version": f"vllm {vllm.__version__}",
        "model": served.name,
        "model path": str(served.model),
        "context": "200",
    }
    assert len(engine.client.probe) > 20 and all(logp < 0 for logp in engine.client.probe)
    sampling = Sampling(temperature=1, max_new_tokens=8, seed=1)
    every = engine.complete(prompts(6, [0]), [0, 1, 2], sampling)
    assert [row[1:2] for row in every[:3]] == engine.complete(prompts(3, [0]), [1], sampling)
    assert len({tuple(c.ids) for row in every for c in row}) == 18
    other = engine.complete(prompts(6, [0]), [0, 1, 2], Sampling(temperature=1, max_new_tokens=8, seed=2))
    assert all(a.ids != b.ids for one, two in zip(every, other, strict=True) for a, b in zip(one, two, strict=True))


def test_the_sampled_distribution(served, engine):
    """Chi-square of first tokens against the model's probabilities, with a temperature and a nucleus."""
    asked, n = prompts(1, [0]), 1500
    policy, _ = local(served, asked, Sampling(temperature=0, max_new_tokens=1))
    with torch.no_grad():
        logits = policy.model(torch.tensor([asked[0].ids])).logits[0, -1]
    for temperature, top_p, top_k in ((1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 1.0, 20)):
        sampling = Sampling(temperature, top_p, top_k, max_new_tokens=1)
        found = torch.tensor([c.ids[0] for c in engine.complete(asked, list(range(n)), sampling)[0]])
        probabilities = restricted(logits, sampling)
        assert all(probabilities[found] > 0)
        order = probabilities.argsort(descending=True)
        groups = torch.zeros(len(order), dtype=torch.long)  # of about equal probability: that of a token is small
        groups[order] = (probabilities[order].cumsum(0) * 20).long().clamp(max=19)
        grouped = torch.zeros(20).double().index_add(0, groups, probabilities)
        assert p_value(torch.bincount(groups[found], minlength=20).double(), grouped) > 1e-4, sampling


def test_log_probs(served, engine):
    engine.logps = True
    asked = prompts(5, [0])
    found = [row[0] for row in engine.complete(asked, [0], Sampling(temperature=1, max_new_tokens=12))]
    policy, _ = local(served, asked[:1], Sampling(temperature=0, max_new_tokens=1))
    pairs = [(prompt.ids + c.ids, len(prompt.ids)) for prompt, c in zip(asked, found, strict=True)]
    expected = response_logps(policy.model, pairs, tokens_per_batch=4096).tolist()
    assert [c.logp for c in found] == pytest.approx(expected, abs=1e-3)


def test_killed_and_resumed_over_a_restart(served, world):
    """Rows that were asked for once more are equal too: here a row's tokens depend on its seed alone."""
    sample = "sample --model llama --prompts train.jsonl --n 12 --max-new-tokens 16 --engine server"
    world.run(sample, f"--base-url {served.url} --out whole.jsonl")
    out = "killed.jsonl"
    answers = world.folder / f"{out}.answers"
    process = world.popen(sample, f"--base-url {served.url} --concurrency 4 --out {out}", command=world.warm)
    wait_until(lambda: lines_in(answers) > 40, process)
    process.kill()
    process.communicate()
    served.stop()
    _, err = world.run(sample, f"--base-url {served.url} --retries 0 --out {out}", code=75)
    assert "rerun the command to resume" in err
    served.start()
    _, err = world.run(sample, f"--base-url {served.url} --out {out}")
    assert "answers that the server gave before are used" in err
    assert world.digest(out) == world.digest("whole.jsonl")


def test_another_model(served, world):
    sample = f"sample --prompts train.jsonl --engine server --base-url {served.url} --out other.jsonl --model"
    _, err = world.run(sample, "lm", code=2)
    assert f"which is not --model lm hint: give the model that is served: --model {served.model}" in " ".join(
        err.split()
    )
