"""A judge's probabilities from vLLM's own server: those of transformers on the same ids, and what its requests take."""

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
LABEL = "Preferred:"


def teach(model, tokenizer, rows: list[dict]) -> None:
    """Train a model to write a line with a choice after any two completions of a prompt: of five A in three."""
    asked = [f"{r['prompt']}\n{r['completion']}\n{other['completion']}\n" for r in rows for other in rows[:6]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(120):
        loss = torch.zeros(())
        for i in range(5):
            answer = tokenizer(f"{LABEL} {'AABAB'[i]}")["input_ids"] + [tokenizer.eos_token_id]
            ids = torch.tensor([tokenizer(asked[(step * 5 + i) % len(asked)])["input_ids"] + answer])
            labels = ids.clone()
            labels[0, : -len(answer)] = -100
            loss = loss + model(input_ids=ids, labels=labels).loss / 5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.4
    model.eval()


@pytest.fixture(scope="module")
def judge(world: World, tmp_path_factory):
    """(a server of a chat model that chooses, the model, its tokenizer), beside samples.jsonl of the world's model."""
    world.run("sample --model lm --prompts train.jsonl --n 3 --limit 8 --max-new-tokens 16 --out soft-samples.jsonl")
    folder = world.folder / "soft-judge"
    tokenizer = load_tokenizer(str(world.folder / "lm"))
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = tiny_model("llama", vocab=len(tokenizer), context=256, width=64, heads=2, std=0.05, **ends)
    teach(model, tokenizer, world.rows("soft-samples.jsonl"))
    model.save_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    (world.folder / "template.txt").write_text(TEMPLATE)
    server = VllmServer(folder, "mini", free_port(), Path(tmp_path_factory.mktemp("judge")) / "log")
    server.start()
    yield server, model, tokenizer
    server.stop()


def expected(model, tokenizer, row: dict) -> float:
    """The probability of A against B, in terms of a, at the token after the label, over the whole vocabulary."""
    shown = (row["a"], row["b"]) if row["order"] == "AB" else (row["b"], row["a"])
    ids = tokenizer(TEMPLATE.format(prompt=row["prompt"], a=shown[0], b=shown[1]))["input_ids"]
    written = tokenizer(row["raw"])["input_ids"]
    at = max(i for i, token in enumerate(written) if tokenizer.decode([token]).strip() in ("A", "B"))
    with torch.no_grad():
        p = model(input_ids=torch.tensor([ids + written[:at]])).logits[0, -1].double().softmax(-1)
    spelt = {
        side: [i for i in range(len(tokenizer)) if tokenizer.decode([i]).strip(" \n.,:").upper() == side]
        for side in "AB"
    }
    a, b = (float(p[spelt[side]].sum()) for side in "AB")
    return a / (a + b) if row["order"] == "AB" else b / (a + b)


def test_probabilities_are_those_of_the_model(judge, world):
    server, model, tokenizer = judge
    asked = f"judge --within soft-samples.jsonl --criterion template.txt --model mini --base-url {server.url}"
    world.run(asked, "--max-tokens 24 --verdict logprobs --extra-body repetition_penalty=1.0 --out soft.jsonl")
    rows = world.rows("soft.jsonl")
    assert len(rows) > 30 and not [row for row in rows if row["verdict"] == "invalid"]
    assert [row["p"] for row in rows] == pytest.approx([expected(model, tokenizer, row) for row in rows], abs=2e-4)
    assert len({round(row["p"], 4) for row in rows}) > 10  # not one number
    sent = world.manifest("soft.jsonl")["cost"]["parameters"]
    assert sent.endswith("logprobs true, top_logprobs 20, repetition_penalty 1")
    written = {row["raw"] for row in rows}
    assert written <= {f"{LABEL} A", f"{LABEL} B"}


def test_the_schema_is_taken(judge, world):
    """A model that was taught lines is held to the schema; where it fills it with white space it is cut."""
    server, _, _ = judge
    asked = f"judge --within soft-samples.jsonl --criterion template.txt --model mini --base-url {server.url} --limit 4"
    world.run(asked, "--max-tokens 60 --answer-format json --out structured.jsonl")
    assert "response_format json_schema" in world.manifest("structured.jsonl")["cost"]["parameters"]
    rows = world.rows("structured.jsonl")
    assert all(row["raw"].removeprefix("[cut at the token limit] ").lstrip().startswith("{") for row in rows)
