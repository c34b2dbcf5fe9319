"""RLAIF against a chat model on vLLM's own server: its verdicts make the pairs, at once and by way of judgements."""

from pathlib import Path

import pytest

from helpers.chain import World
from helpers.ranks import free_port
from helpers.tiny_judge import save_judge
from helpers.vllm_server import VllmServer

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def judge(world: World, tmp_path_factory):
    """A server of a chat model that always prefers A, beside samples.jsonl of the world's language model."""
    world.run("sample --model lm --prompts train.jsonl --n 3 --limit 8 --max-new-tokens 16 --out samples.jsonl")
    save_judge(world.folder / "judge", "Preferred:", " A")
    (world.folder / "template.txt").write_text("{prompt}\n{a}\n{b}\n")
    log = Path(tmp_path_factory.mktemp("judge")) / "log"
    server = VllmServer(world.folder / "judge", "mini", free_port(), log, context=1024)
    server.start()
    yield server
    server.stop()


def test_preferences_by_a_served_chat_model(judge, world):
    """The judge always prefers the one that it is shown first: in a random order that decides each pair, in both orders
    every pair is a tie."""
    server = f"--judge-model mini --judge-base-url {judge.url} --judge-max-tokens 24"
    make = f"make-prefs --samples samples.jsonl --judge openai --criterion template.txt {server}"
    world.run(make, "--order random --out one.jsonl")
    made = world.rows("one.jsonl")
    flags = server.replace("--judge-", "--")
    world.run("judge --within samples.jsonl --criterion template.txt --order random", flags, "--out judged.jsonl")
    judged = world.rows("judged.jsonl")
    assert {row["raw"] for row in judged} == {"Preferred: A"}
    assert len(made) == len(judged) > 15
    first = {(r["prompt_id"], *((r["a"], r["b"]) if r["order"] == "AB" else (r["b"], r["a"]))) for r in judged}
    assert {(r["prompt_id"], r["chosen"], r["rejected"]) for r in made} == first
    assert all(row["chosen_ids"] for row in made)
    world.run("make-prefs --samples samples.jsonl --judgements judged.jsonl --out votes.jsonl")
    assert {(r["prompt_id"], r["chosen"], r["rejected"]) for r in world.rows("votes.jsonl")} == first
    world.run(make, "--order both --out two.jsonl")
    assert world.rows("two.jsonl") == [] and world.manifest("two.jsonl")["metrics"]["ties"] == len(made)
    train = "train-dpo --model lm --data one.jsonl --batch-size 8 --lr 1e-3 --max-steps 3 --max-length 96"
    world.run(train, "--max-prompt-length 16 --out dpo")
    evaluated = "evaluate --model dpo --ref lm --prompts test.jsonl --scorer classifier --max-new-tokens 8"
    world.run(evaluated, "--out eval.jsonl")
    assert world.rows("eval.jsonl")[0]["kl_exact"] > 0
