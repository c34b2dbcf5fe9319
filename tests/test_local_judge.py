"""judge --backend transformers and vllm: a chat model in the command's process."""

import json
import math
from pathlib import Path

import pytest
import torch

from dpoctl.data.codec import Codec
from dpoctl.inference.engines.engine import Row
from dpoctl.inference.engines.local import LocalEngine
from dpoctl.inference.engines.vllm_engine import VllmEngine
from dpoctl.inference.generate import PromptTokens, Sampling
from dpoctl.models.load import load_policy
from dpoctl.models.tokenizers import load_tokenizer
from dpoctl.runtime.devices import Compute
from helpers.engines import VllmOptions, fake_vllm
from helpers.judging import candidates, manifest, rows_of, run
from helpers.tiny_judge import save_judge
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import byte_level_bpe

pytestmark = pytest.mark.usefixtures("warm_judge")

LOCAL = ["--backend", "transformers", "--model", "judge", "--cache-dir", "answers", "--max-tokens", "16"]


@pytest.fixture
def folder(tmp_path) -> Path:
    candidates(tmp_path, 4)
    save_judge(tmp_path / "judge", "Preferred:", " A")
    return tmp_path


def judged(folder: Path, *args: str, code: int = 0) -> str:
    return " ".join(run(folder, "a.jsonl", "b.jsonl", *LOCAL, "--out", "j.jsonl", *args, code=code)[1].split())


def test_a_local_model_judges_and_its_answers_are_cached(folder):
    """Its position bias makes a tie of each comparison; one text is too long for its context."""
    rows = rows_of(folder / "a.jsonl")
    rows[2]["completion"] = "word " * 600
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged(folder)
    rows = rows_of(folder / "j.jsonl")
    assert [row["verdict"] for row in rows] == ["a", "b"] * 2 + ["invalid"] * 2 + ["a", "b"]
    assert {row["raw"] for row in rows if row["prompt_id"] != "p2"} == {"Preferred: A"}
    assert {row["reason"] for row in rows if row["prompt_id"] == "p2"} == {"too long for the judge"}
    assert {row["judge"] for row in rows} == {"judge"}
    written = manifest(folder)
    cost = written["cost"]
    assert (cost["asked"], cost["from_cache"], cost["completion_tokens"]) == (6, 0, 18)
    assert cost["prompt_tokens"] > 6 * 200 and cost["flops"] > 0 and cost["device"]
    assert next(each for each in written["inputs"] if each["name"] == "model")["sha256"]
    for name in ("model", "base-url"):
        assert (name in written["identity"]) == (name == "model")
    said = judged(folder, "--overwrite")
    assert "6 answers came from the cache" in said and manifest(folder)["cost"]["asked"] == 0
    assert rows_of(folder / "j.jsonl") == rows
    # other weights are another judge
    save_judge(folder / "judge", "Preferred:", " B")
    assert "was started with a different --model (judge has changed)" in judged(folder, code=2)
    judged(folder, "--overwrite")
    assert [row["verdict"] for row in rows_of(folder / "j.jsonl")][:2] == ["b", "a"]
    assert manifest(folder)["cost"]["asked"] == 6


@pytest.mark.parametrize(
    ("answer", "more", "verdict", "reason"),
    [
        (("Preferred:", " A"), ["--max-tokens", "8"], "a", None),
        (("one", "two", "three", "four", "five", "six", "seven", "eight"), ["--max-tokens", "8"], "invalid", "cut"),
        (("I", " prefer", " A"), [], "invalid", "no line"),
        ((" ",), [], "invalid", "no answer"),
        (("<think>", "Preferred: B", "</think>", "Preferred:", " A"), [], "a", None),
        (("<think>", "Preferred:", " B"), [], "invalid", "unfinished thought"),
    ],
)
def test_what_a_local_judge_writes(tmp_path, answer, more, verdict, reason):
    candidates(tmp_path, 1)
    save_judge(tmp_path / "judge", *answer)
    judged(tmp_path, *more)
    row = rows_of(tmp_path / "j.jsonl")[0]
    assert row["verdict"] == verdict and (reason is None or row["reason"].startswith(reason)), row


def test_a_thought_that_the_template_begins_is_no_verdict(tmp_path):
    """The prompt ends with the tag, so that the answer holds the thought without it."""
    candidates(tmp_path, 1)
    save_judge(tmp_path / "judge", "Preferred:", " A")
    tokenizer = load_tokenizer(str(tmp_path / "judge"))
    template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    (tmp_path / "t.jinja").write_text(template)
    judged(tmp_path, "--chat-template", "t.jinja")
    row = rows_of(tmp_path / "j.jsonl")[0]
    assert (row["verdict"], row["reason"]) == ("invalid", "unfinished thought")
    assert row["raw"] == "<think>\nPreferred: A"


def test_a_verdict_from_the_probabilities_of_a_local_model(tmp_path):
    """The share of A of the two, by transformers' own logits after the same prompt."""
    candidates(tmp_path, 2)
    save_judge(tmp_path / "judge", "Preferred:", " A", rival=" B")
    judged(tmp_path, "--verdict", "logprobs")
    policy = load_policy(str(tmp_path / "judge"))
    a, b, label = policy.tokenizer.convert_tokens_to_ids([" A", " B", "Preferred:"])
    with torch.no_grad():
        logits = policy.model.double()(torch.tensor([[5, label]])).logits[0, -1, [a, b]]
    share = logits.softmax(-1)[0].item()
    assert 0.5 < share < 0.99
    rows = rows_of(tmp_path / "j.jsonl")
    assert [row["p"] for row in rows] == pytest.approx([share, 1 - share] * 2, abs=1e-5)
    assert [row["verdict"] for row in rows] == ["a", "b"] * 2
    cached = judged(tmp_path, "--verdict", "logprobs", "--overwrite")
    assert "4 answers came from the cache" in cached and rows_of(tmp_path / "j.jsonl") == rows


def test_what_is_refused(folder):
    assert "--backend vllm: vLLM is not installed hint: pip install 'dpoctl[vllm]'" in judged(
        folder, "--backend", "vllm", code=2
    )
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(folder / "text")
    tiny_model("llama", vocab=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "text")
    said = judged(folder, "--model", "text", code=2)
    assert "text: cannot be asked as a judge: messages, but the tokenizer has no chat template" in said
    assert "no such model directory" in judged(folder, "--model", "./jugde", code=2)
    for flag in ("--base-url http://x/v1", "--batch", "--price-in 1", "--concurrency 2", "--engine-arg a=1"):
        assert f"{flag.split()[0]} has no effect with --backend transformers" in judged(folder, *flag.split(), code=2)
    assert not (folder / "j.jsonl").exists()


def test_a_plan_reads_no_model(folder):
    out, _ = run(folder, "a.jsonl", "b.jsonl", *LOCAL, "--model", "org/none", "--out", "p.jsonl", "--dry-run", "--json")
    plan = json.loads(out)
    assert plan["judgements"] == 8 and plan["completion tokens, at most"] == 8 * 16 and "dollars" not in out


# --- the distribution of a token -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_alternatives_are_the_distribution_that_is_sampled(tmp_path, temperature):
    """Against transformers' own logits at each place, in float64."""
    tokenizer = byte_level_bpe()
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    tiny_model("gpt2", vocab=len(tokenizer), context=64, std=0.05, **ids).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    policy = load_policy(str(tmp_path / "m"))
    engine = LocalEngine(policy, Compute(torch.device("cpu"), torch.float32))
    engine.alternatives = 5
    prompts = [PromptTokens(f"p{i}", list(range(5, 9 + i)), frozenset({0})) for i in range(3)]
    found = engine.complete(prompts, [0, 1], Sampling(temperature=temperature, max_new_tokens=6))
    for prompt, completions in zip(prompts, found, strict=True):
        for completion in completions:
            whole = torch.tensor([prompt.ids + completion.ids])
            with torch.no_grad():
                logits = policy.model.double()(whole).logits[0, len(prompt.ids) - 1 : -1]
            logps = (logits / (temperature or 1.0)).log_softmax(-1)
            assert len(completion.alternatives) == len(completion.ids)
            for place, (listed, token) in enumerate(zip(completion.alternatives, completion.ids, strict=True)):
                top = logps[place].topk(5).indices.tolist()
                assert set(listed) == {*top, token}
                for id, logp in listed.items():
                    assert math.isclose(logp, logps[place, id].item(), abs_tol=1e-4)
            policy.model.float()


def test_alternatives_are_asked_of_vllm(tmp_path, monkeypatch):
    fake_vllm(tmp_path / "packages")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    save_judge(tmp_path / "judge", "x")
    engine = VllmEngine(VllmOptions(), str(tmp_path / "judge"), Codec(load_tokenizer(str(tmp_path / "judge"))), 64)
    engine.alternatives = 20
    row = Row(PromptTokens("p", [1], frozenset({0})), limit=3, seed=1)
    assert engine._parameters(row, Sampling())["logprobs"] == 20
