"""RLAIF against a chat model on vLLM's own server: its verdicts make the pairs, at once and by way of judgements."""

from pathlib import Path

import pytest
import torch

from dpoctl.models.tokenizers import load_tokenizer
from helpers.chain import World
from helpers.ranks import free_port
from helpers.tiny_models import tiny_model
from helpers.vllm_server import VllmServer

pytestmark = pytest.mark.vllm

TEMPLATE = "{prompt}\n{a}\n{b}\n"  # the toy vocabulary would make thousands of tokens of a named criterion
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ANSWER = "Preferred: A"


def teach(model, tokenizer, rows: list[dict]) -> None:
    """Train a model to write ANSWER after any two completions of a prompt."""
    ends = [*tokenizer(ANSWER)["input_ids"], tokenizer.eos_token_id]
    asked = [f"{r['prompt']}\n{r['completion']}\n{other['completion']}\n" for r in rows for other in rows[:6]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(120):
        loss = torch.zeros(())
        for text in asked[step * 4 % len(asked) :][:4]:
            ids = torch.tensor([tokenizer(text)["input_ids"] + ends])
            labels = ids.clone()
            labels[0, : -len(ends)] = -100
            loss = loss + model(input_ids=ids, labels=labels).loss / 4
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.eval()


@pytest.fixture(scope="module")
def judge(world: World, tmp_path_factory):
    """A server of a chat model that answers ANSWER, beside samples.jsonl of the world's language model."""
    world.run("sample --model lm --prompts train.jsonl --n 3 --limit 8 --max-new-tokens 16 --out samples.jsonl")
    folder = world.folder / "judge"
    tokenizer = load_tokenizer(str(world.folder / "lm"))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = tiny_model("llama", vocab=len(tokenizer), context=256, width=64, heads=2, std=0.05, **ends)
    teach(model, tokenizer, world.rows("samples.jsonl"))
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    (world.folder / "template.txt").write_text(TEMPLATE)
    server = VllmServer(folder, "mini", free_port(), Path(tmp_path_factory.mktemp("judge")) / "log")
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
    assert {row["raw"] for row in judged} == {ANSWER}
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
