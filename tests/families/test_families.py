"""Eight families in miniature through every command, against plain transformers on the same ids in float64.

`make test` runs two of them; `make test-families` runs all.
"""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from families import reference, zoo
from families.chain import BETA, Chain, assistant
from families.reference import Sequence

SHARE = ("gemma", "qwen2.5")
# A log-prob in float32 over a vocabulary of some 400 ids has an error of about 1e-6; a completion has 12 of them, and
# metrics.jsonl keeps 6 digits of a sum below 100.
LOGP = 1e-4


@pytest.fixture(
    scope="module",
    params=[name if name in SHARE else pytest.param(name, marks=pytest.mark.families) for name in zoo.FAMILIES],
)
def chain(request, tmp_path_factory):
    """A family's experiments, in the working directory."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Chain(request.param, folder)


def sequences_of(rows: list[dict], field: str = "completion") -> list[Sequence]:
    """The ids that rows carry."""
    return [(row["prompt_ids"] + row[f"{field}_ids"], len(row["prompt_ids"])) for row in rows]


# --- sft


def answers(chain: Chain) -> list[Sequence]:
    """Everything that sft.jsonl trains: each answer with what comes before it."""
    found = []
    for row in chain.rows("sft.jsonl"):
        if "text" in row:
            found.append(([*chain.tokenizer(row["text"])["input_ids"], chain.tokenizer.eos_token_id], 1))
            continue
        messages = row.get("messages") or [row["prompt"], assistant(row["completion"])]
        if isinstance(messages[0], list):
            messages = [*messages[0], messages[1]]
        if isinstance(messages[0], str):
            found.append(answer(chain, messages[0], row["completion"]))
            continue
        turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        found += [answer(chain, messages[:n], messages[n]["content"]) for n in turns]
    return found


def answer(chain: Chain, prompt, text: str) -> Sequence:
    """Prompt and answer, as the family's template writes them up to the end of the answer."""
    if chain.name == "thinking" and not isinstance(prompt, str):  # the prompt has opened the thought
        before = reference.prompt_ids(chain.tokenizer, prompt)
        ids = chain.tokenizer(text.removeprefix("<think>\n"), add_special_tokens=False)["input_ids"]
        return [*before, *ids, chain.tokenizer.convert_tokens_to_ids("<|im_end|>")], len(before)
    return reference.answer_ids(chain.tokenizer, prompt, text, zoo.stops(chain.name, prompt))


def test_sft_trains_every_answer_up_to_its_end(chain):
    logged, expected = chain.update("sft"), answers(chain)
    tokens = sum(len(ids) - start for ids, start in expected)
    assert chain.manifest("sft")["trained_tokens"] == tokens
    model = reference.load(chain.folder / "base")
    loss = -reference.summed_logps(model, expected).sum().item() / tokens
    assert logged["loss"] == pytest.approx(loss, rel=3e-6)


def test_a_run_says_how_its_answers_end(chain):
    prompts = [row["prompt"] for row in chain.rows("prompts.jsonl")]
    assert trained_ends(chain, "sft") == set().union(*(zoo.stops(chain.name, prompt) for prompt in prompts))


# --- samples


def trained_ends(chain: Chain, run: str) -> set[int]:
    """The end tokens that a run directory has saved."""
    saved = GenerationConfig.from_pretrained(chain.make(run)).eos_token_id
    return set(saved if isinstance(saved, list) else [saved])


def check_samples(chain: Chain, rows: list[dict], run: str, longest: int = 12) -> None:
    """Ids of the prompt, then of a text that ends where sampling stops, or at the limit."""
    ends = trained_ends(chain, run)
    for row in rows:
        prompt, ids, stops = row["prompt"], row["completion_ids"], ends | zoo.stops(chain.name, row["prompt"])
        assert row["prompt_ids"] == reference.prompt_ids(chain.tokenizer, prompt)
        ended = ids[-1] in stops
        assert row["finish"] == ("stop" if ended else "length") and (ended or len(ids) == longest)
        said = ids[:-1] if ended else ids
        assert not stops & set(said)
        before = chain.tokenizer.decode(row["prompt_ids"])
        whole = chain.tokenizer.decode(row["prompt_ids"] + said)
        assert not whole.startswith(before) or whole == before + row["completion"]


def test_samples_are_their_ids(chain):
    rows = chain.made("samples.jsonl")
    assert len(rows) == 14
    check_samples(chain, rows, "dpo")
    chain.make("prefs.jsonl")
    rows = chain.rows("completions.jsonl")
    check_samples(chain, rows, "sft")
    ends = {row["completion_ids"][-1] for row in rows if row["finish"] == "stop"}
    assert len(rows) == 28 and ends and ends <= zoo.stops(chain.name, [] if chain.is_chat else "")


def test_greedy_samples_take_the_most_probable_token(chain):
    rows = chain.made("greedy.jsonl")
    check_samples(chain, rows, "dpo")
    model = reference.load(chain.folder / "dpo")
    for ids, start in sequences_of(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1]
        taken = logits[range(len(ids) - start), ids[start:]]
        assert (logits.max(-1).values - taken).max() < 1e-4  # a tie in float32


# --- preferences


def test_dpo_on_samples_of_its_own(chain):
    logged = chain.update("dpo")
    rows = chain.rows("prefs.jsonl")
    counts = chain.manifest("dpo")
    assert counts["from_ids"] == len(rows) == counts["pairs"] and counts["special_text"] == 0
    policy, ref = reference.load(chain.folder / "sft"), reference.load(chain.folder / "base")
    check_dpo(logged, *(compare(policy, ref, sequences_of(rows, side)) for side in ("chosen", "rejected")))


def compare(policy, ref, sequences: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, log-ratios) of completions."""
    logps = reference.summed_logps(policy, sequences)
    return logps, logps - reference.summed_logps(ref, sequences)


def check_dpo(logged: dict, chosen: tuple, rejected: tuple) -> None:
    assert logged["logps/chosen"] == pytest.approx(chosen[0].mean().item(), abs=LOGP)
    assert logged["logps/rejected"] == pytest.approx(rejected[0].mean().item(), abs=LOGP)
    assert logged["rewards/chosen"] == pytest.approx(BETA * chosen[1].mean().item(), abs=BETA * LOGP)
    assert logged["rewards/rejected"] == pytest.approx(BETA * rejected[1].mean().item(), abs=BETA * LOGP)
    assert logged["loss"] == pytest.approx(reference.dpo_loss(chosen[1], rejected[1], BETA), abs=BETA * LOGP)


def test_flipping_the_text_flips_the_training(chain, capsys):
    """Each text takes along the ids that were made for it, as if the row had been written the other way round."""
    rows = chain.made("prefs.jsonl")
    flipped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    chain.write("flipped.jsonl", flipped)
    sides = {"chosen": "rejected", "rejected": "chosen"}
    other = [{re.sub("chosen|rejected", lambda m: sides[m[0]], name): row[name] for name in row} for row in rows]
    chain.write("by-hand.jsonl", other)
    chain.make("dpo")
    capsys.readouterr()
    chain.make("flipped")
    assert chain.manifest("flipped")["from_ids"] == len(rows) and chain.manifest("flipped")["ids_not_used"] == 0
    assert f"{len(rows)} rows have the texts of chosen and rejected exchanged" in capsys.readouterr().err
    policies = [reference.load(chain.folder / run) for run in ("dpo", "flipped")]
    prefers = []
    for policy in policies:
        ratio = [compare(policy, policies[0], sequences_of(rows, side))[0] for side in ("chosen", "rejected")]
        prefers.append((ratio[0] - ratio[1]).mean().item())
    assert prefers[0] > prefers[1]
    assert chain.update("flipped") == chain.update("by-hand")


# --- rewards


def test_rewards_are_those_of_plain_transformers(chain):
    rows = chain.made("scores.jsonl")
    model = reference.load_reward_model(chain.folder / "rm")
    sequences = [ids for ids, _ in sequences_of(chain.rows("completions.jsonl"))]
    check_rewards(model, [row["score"] for row in rows], sequences)
    tokenizer = AutoTokenizer.from_pretrained(chain.folder / "rm")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    single = AutoModelForSequenceClassification.from_pretrained(chain.folder / "rm").eval()
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        padded = single(**batch).logits[:, 0].tolist()
    check_rewards(model, [normal(model, value) for value in padded], sequences)


def normal(model, value: float) -> float:
    return (value - model.config.reward_shift) / model.config.reward_scale


def check_rewards(model, found: list[float], sequences: list[list[int]]) -> None:
    expected = [normal(model, reference.reward(model, ids)) for ids in sequences]
    assert max(expected) - min(expected) > 0.1
    assert found == pytest.approx(expected, abs=2e-5 * max(1.0, *map(abs, expected)))


def test_the_loss_of_a_reward_model_is_that_of_its_rewards(chain):
    """Trained at the token at which transformers reads the reward afterwards."""
    chain.make("prefs.jsonl")
    chain.run(
        "train-rm --model sft --data prefs.jsonl --max-steps 1 --lr 1e-12 --batch-size 256 --log-every 1 "
        "--validation 0.2 --select last --normalize none --warmup-steps 0 --out rm-still"
    )
    manifest, model = chain.manifest("rm-still"), reference.load_reward_model(chain.folder / "rm-still")
    rows = chain.rows("prefs.jsonl")
    every = {
        side: torch.tensor([reference.reward(model, ids) for ids, _ in sequences_of(rows, side)])
        for side in ("chosen", "rejected")
    }
    losses = -torch.nn.functional.logsigmoid(every["chosen"] - every["rejected"])
    # the logged losses are means over training and held-out pairs
    logged = chain.rows("rm-still/metrics.jsonl")[-1]
    total = logged["loss"] * manifest["train_pairs"] + manifest["eval/loss"] * manifest["validation_pairs"]
    assert total == pytest.approx(losses.sum().item(), abs=2e-5 * len(rows))


def test_conversations_are_scored_as_the_documentation_says(chain):
    if not chain.is_chat:
        pytest.skip("no chat template")
    prompt, text = [{"role": "user", "content": "Is the garden good?"}], "Yes, I like it."
    shapes = [
        {"prompt": prompt, "completion": text},
        {"prompt": prompt, "completion": [assistant(text)]},
        {"messages": [*prompt, assistant(text)]},
    ]
    chain.write("shapes.jsonl", shapes)
    ids, _ = answer(chain, prompt, text)
    expected = normal(model := reference.load_reward_model(chain.make("rm")), reference.reward(model, ids))
    scores = [row["score"] for row in chain.made("shapes-scored.jsonl")]
    assert scores == pytest.approx([expected] * 3, abs=1e-5 * max(1.0, abs(expected)))


def test_implicit_rewards(chain):
    scores = [row["score"] for row in chain.made("implicit.jsonl")]
    sequences = sequences_of(chain.rows("completions.jsonl"))
    _, ratios = compare(reference.load(chain.folder / "dpo"), reference.load(chain.folder / "base"), sequences)
    assert scores == pytest.approx((BETA * ratios).tolist(), abs=BETA * LOGP)


# --- evaluation


def test_evaluate_reports_the_kl_of_the_samples(chain):
    [found], rows = chain.made("eval.jsonl"), chain.made("samples.jsonl")
    sequences = sequences_of(rows)
    policy, ref = reference.load(chain.folder / "dpo"), reference.load(chain.folder / "base")
    _, ratios = compare(policy, ref, sequences)
    exact = [reference.exact_kl(policy, ref, sequence) for sequence in sequences]
    assert found["kl"] == pytest.approx(ratios.mean().item(), abs=LOGP)
    assert found["kl_exact"] == pytest.approx(sum(exact) / len(exact), abs=LOGP)
    assert found["length"] == pytest.approx(sum(len(ids) - start for ids, start in sequences) / len(rows))
    assert found["ended"] == pytest.approx(sum(row["finish"] == "stop" for row in rows) / len(rows))
    tokens = torch.cat([reference.token_logps(ref, sequence) for sequence in sequences])
    assert found["perplexity_ref"] == pytest.approx(math.exp(-tokens.mean().item()), rel=1e-5)
    model = reference.load_reward_model(chain.folder / "rm")
    rewards = [normal(model, reference.reward(model, ids)) for ids, _ in sequences]
    assert found["reward"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)


def test_a_step_of_ppo(chain):
    """Its episodes are the samples of the same seed."""
    logged, rows = chain.update("ppo"), chain.made("a.jsonl")
    sequences = sequences_of(rows)
    _, ratios = compare(reference.load(chain.folder / "dpo"), reference.load(chain.folder / "base"), sequences)
    model = reference.load_reward_model(chain.folder / "rm")
    rewards = [normal(model, reference.reward(model, ids)) for ids, _ in sequences]
    assert logged["objective/kl"] == pytest.approx(ratios.mean().item(), abs=LOGP)
    assert logged["objective/scores"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-4)
    assert logged["length/response"] == pytest.approx(sum(len(ids) - start for ids, start in sequences) / 7, rel=1e-5)
    assert GenerationConfig.from_pretrained(chain.folder / "ppo").eos_token_id is not None


def test_the_judge_prefers_the_higher_reward(chain):
    judged = {(row["prompt_id"], row["order"]): row for row in chain.made("judged.jsonl")}
    model = reference.load_reward_model(chain.folder / "rm")
    for a, b in zip(chain.rows("a.jsonl"), chain.rows("b.jsonl"), strict=True):
        if a["completion"] == b["completion"]:
            continue
        scores = [normal(model, reference.reward(model, ids)) for ids, _ in sequences_of([a, b])]
        row = judged[a["prompt_id"], "AB"]
        assert [float(word) for word in row["raw"].split()] == pytest.approx(scores, rel=1e-4, abs=1e-4)
        assert row["verdict"] == ("a" if scores[0] > scores[1] else "b")


def test_what_a_family_cannot_do_is_refused_in_words(chain, capsys):
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chain.write("system.jsonl", [{"prompt": system}])
    takes = chain.is_chat and chain.name not in ("gemma", "mistral")
    chain.run("sample --model base --prompts system.jsonl --max-new-tokens 2 --out system-out.jsonl", 0 if takes else 2)
    told = capsys.readouterr().err
    if not takes:
        assert "system.jsonl" in told and "hint:" in told and not (chain.folder / "system-out.jsonl").exists()
    else:
        assert json.loads((chain.folder / "system-out.jsonl").read_text())["completion_ids"]
