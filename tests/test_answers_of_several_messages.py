"""Completions of several messages, as agents with tools write them: only what the assistant said counts as said."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dpoctl.cli.app import run
from dpoctl.data.chats import Prompt
from dpoctl.data.codec import Codec
from dpoctl.data.encode import Limits, encode_examples, encode_pairs
from dpoctl.data.unpaired import encode_unpaired
from dpoctl.errors import InputError
from helpers.encoding import make_rows
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import chat
from test_chat_kinds import NEXT, THINKING, WITH_TOOLS, codec_of, shown, spans

ASK = {"role": "user", "content": "how is the film?"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"film": "Ghent"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": "seven points of ten, all seen and counted"}
GOOD, BAD = {"role": "assistant", "content": "It is good."}, {"role": "assistant", "content": "No idea."}
ROWS = [
    {"prompt": [ASK], "chosen": [CALLS, TOLD, GOOD], "rejected": [BAD]},
    {"prompt": [ASK], "chosen": [GOOD], "rejected": [CALLS, {**TOLD, "content": "nothing"}, BAD]},
    {"prompt": [{**ASK, "content": "and this?"}], "chosen": [GOOD, ASK, GOOD], "rejected": [GOOD, ASK, BAD]},
]
TRAIN = "--max-steps 1 --batch-size 6 --log-every 1 --warmup-steps 0 --max-length 200 --max-prompt-length 100"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, m, and another reference, r, with tools in their template."""
    folder = tmp_path_factory.mktemp("several")
    tokenizer = chat()
    tokenizer.chat_template = WITH_TOOLS
    for name, seed in (("m", 0), ("r", 1)):
        model = tiny_model("llama", vocab=len(tokenizer), context=256, eos_token_id=tokenizer.eos_token_id)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.02 * seed * torch.randn_like(p)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    for name in ("m", "r"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write("rows.jsonl", ROWS)
    return tmp_path


def write(name, rows):
    with open(name, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def said(tokenizer, row, name):
    """(ids, whether each is the assistant's) of prompt and completion: the template's text, split at its markers."""
    before = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(row["prompt"] + row[name], tokenize=False)
    opening, end = "<|im_start|>assistant\n", "<|im_end|>"
    assert text.startswith(before) and before.endswith(opening)
    ids, mine = tokenizer(before, add_special_tokens=False)["input_ids"], []
    mine += [False] * len(ids)
    for n, part in enumerate(text[len(before) :].split(opening)):
        answer, closing, rest = part.partition(end)
        for piece, own in ((opening * (n > 0), False), (answer + closing, True), (rest, False)):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            ids, mine = ids + new, mine + [own] * len(new)
    last = max(n for n, own in enumerate(mine) if own)
    assert tokenizer.decode(ids) == text
    return ids[: last + 1], mine[: last + 1]


@torch.no_grad()
def logp(model, ids, mine):
    """(the sum of the log-probs of the assistant's tokens, their number), in float64."""
    logps = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    kept = [n for n, own in enumerate(mine) if own]
    return sum(logps[n - 1, ids[n]] for n in kept).item(), len(kept)


def reference(name="chosen", model="m", rows=ROWS):
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [logp(policy, *said(tokenizer, row, name)) for row in rows]


def first_update(line):
    assert run(f"{line} {TRAIN} --out out".split()) == 0
    with open("out/metrics.jsonl") as f:
        return json.loads(f.readline())


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "nca_pair"])
def test_log_probs_of_pairs_are_those_of_what_the_assistant_said(here, loss):
    row = first_update(f"train-dpo --model m --ref r --data rows.jsonl --loss {loss} --beta 0.5")
    for side in ("chosen", "rejected"):
        mine, theirs = reference(side), reference(side, "r")
        assert row[f"logps/{side}"] == pytest.approx(sum(s for s, _ in mine) / 3, abs=1e-3)
        assert row[f"length/{side}"] == pytest.approx(sum(n for _, n in mine) / 3, abs=1e-3)
        if loss == "sigmoid":
            ratios = [a - b for (a, _), (b, _) in zip(mine, theirs, strict=True)]
            assert row[f"rewards/{side}"] == pytest.approx(0.5 * sum(ratios) / 3, abs=1e-3)


def test_ld_dpo_and_wpo_count_what_the_assistant_said(here):
    row = first_update("train-dpo --model m --ref r --data rows.jsonl --ld-alpha 0.3 --beta 0.5")
    tokenizer = AutoTokenizer.from_pretrained("m")
    sums = dict.fromkeys(("chosen", "rejected"), 0.0)
    for model, sign in (("m", 1), ("r", -1)):
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager").eval()
        for pair in ROWS:
            both = {name: said(tokenizer, pair, name) for name in sums}
            shared = min(sum(mine) for _, mine in both.values())
            for name, (ids, mine) in both.items():
                count, first = 0, []
                for own in mine:
                    count += own
                    first.append(own and count <= shared)
                whole, prefix = logp(policy, ids, mine)[0], logp(policy, ids, first)[0]
                sums[name] += sign * (prefix + 0.3 * (whole - prefix))
    for name, total in sums.items():
        assert row[f"rewards/{name}"] == pytest.approx(0.5 * total / 3, abs=1e-3)


def test_single_completions_and_ilql_count_the_same(here):
    flat = [
        {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"} for r in ROWS for n in r if n != "prompt"
    ]
    write("flat.jsonl", [{**row, "score": float(row["label"])} for row in flat])
    for loss in ("kto --unpaired", "bco"):
        row = first_update(f"train-dpo --model m --ref r --data flat.jsonl --loss {loss}")
        for side in ("chosen", "rejected"):
            assert row[f"logps/{side}"] == pytest.approx(sum(s for s, _ in reference(side)) / 3, abs=1e-3)
        (here / "out").rename(here / loss.split()[0])
    row = first_update("train-ilql --model m --data flat.jsonl")
    every = reference("chosen") + reference("rejected")
    assert row["loss/policy"] == pytest.approx(-sum(s for s, _ in every) / sum(n for _, n in every), abs=1e-5)


def test_the_implicit_reward_is_that_of_training(here):
    assert run(f"train-dpo --model m --ref r --data rows.jsonl --beta 0.5 --lr 1e-3 {TRAIN} --out dpo".split()) == 0
    write("c.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
    assert run("score --data c.jsonl --scorer implicit:dpo,r --out s.jsonl".split()) == 0
    scores = [json.loads(line)["score"] for line in open("s.jsonl")]  # noqa: SIM115
    beta = yaml.safe_load((here / "dpo/config.yaml").read_text())["beta"]
    expected = [beta * (a - b) for (a, _), (b, _) in zip(reference(model="dpo"), reference(model="r"), strict=True)]
    assert scores == pytest.approx(expected, abs=1e-3)


def test_the_perplexity_is_that_of_what_the_assistant_said(here):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "finish": "stop", "prompt_id": str(n)}
        for n, row in enumerate(ROWS)
    ]
    write("c.jsonl", rows)
    (here / "one.py").write_text("def one(rows):\n    return [1.0 for _ in rows]\n")
    assert run("evaluate --completions c.jsonl --scorer python:one.py:one --lm m --out e.jsonl".split()) == 0
    found = json.loads((here / "e.jsonl").read_text())
    every = reference()
    assert found["perplexity_lm"] == pytest.approx(
        math.exp(-sum(s for s, _ in every) / sum(n for _, n in every)), rel=1e-4
    )


def test_reward_models_read_the_end_of_all_messages(here):
    row = first_update("train-rm --model m --data rows.jsonl --validation 0.4 --lr 1e-9")
    assert math.isfinite(row["loss"])
    write("c.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS])
    assert run("score --data c.jsonl --scorer out --out s.jsonl".split()) == 0
    model = AutoModelForSequenceClassification.from_pretrained("out", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained("out")
    for line, row in zip(open("s.jsonl"), ROWS, strict=True):  # noqa: SIM115
        ids, _ = said(tokenizer, row, "chosen")
        with torch.no_grad():
            logit = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
        expected = (logit - model.config.reward_shift) / model.config.reward_scale
        assert json.loads(line)["score"] == pytest.approx(expected, abs=1e-4)


def test_sft_on_a_completion_of_several_messages_trains_as_on_messages():
    codec = codec_of(WITH_TOOLS)
    [one], _ = encode_examples(make_rows({"prompt": [ASK], "completion": [CALLS, TOLD, GOOD]}), codec, Limits())
    [other], _ = encode_examples(make_rows({"messages": [ASK, CALLS, TOLD, GOOD]}), codec, Limits())
    assert one == other
    assert spans(codec, one)[1:] == ["It is good.<|im_end|>"] and "seven points" not in "".join(spans(codec, one))


def test_a_truncated_completion_does_not_end_between_the_assistants_messages():
    codec = codec_of(WITH_TOOLS)
    data = encode_pairs(make_rows(ROWS[0]), codec, Limits())
    chosen = data.pairs[0][0]
    [(begin, end)] = data.gaps[chosen]
    start = len(data.prompts[0])
    for length in range(start + 1, start + len(data.completions[chosen]) + 1):
        cut = encode_pairs(make_rows(ROWS[0]), codec, Limits(length))
        completion, gaps = cut.completions[cut.pairs[0][0]], cut.gaps.get(cut.pairs[0][0], [])
        room = length - start
        assert completion == data.completions[chosen][: begin if begin < room <= end else room]
        assert list(gaps) == ([(begin, end)] if room > end else [])


def test_mismatched_completions_keep_their_gaps():
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": n != 1} for n, r in enumerate(ROWS)]
    data = encode_unpaired(make_rows(*rows), codec_of(WITH_TOOLS), Limits(), mismatches=True)
    first = data.mismatched[2]  # the prompt of the third row with the completion of the first
    assert data.completions[first] == data.completions[data.pairs[0][0]]
    assert data.gaps[first] == data.gaps[data.pairs[0][0]]


def test_a_template_that_changes_earlier_answers_is_refused():
    thought = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}
    row = {"prompt": [ASK], "chosen": [thought, ASK, thought], "rejected": [thought]}
    with pytest.raises(InputError, match="renders the first of several messages") as error:
        encode_pairs(make_rows(row), codec_of(THINKING), Limits())
    assert "end of the prompt" in error.value.hint


def test_messages_before_the_first_answer_are_not_trained():
    """A template whose generation prompt writes nothing lets a completion begin with a tool's result."""
    codec = codec_of(WITH_TOOLS.removesuffix(NEXT))
    prompt = Prompt([ASK, CALLS])
    [before] = codec.encode_prompts([prompt])
    [found] = codec.encode_answers([prompt], [[TOLD, GOOD]], [before], [True])
    [(begin, end)] = found.gaps
    assert begin == 0 and "seven points" in shown(codec, found.ids[:end])
    assert shown(codec, found.ids[end:]).endswith("It is good.<|im_end|>")


# --- tool calls that were cut


@pytest.mark.parametrize("content", [None, "I look."])
def test_a_cut_answer_keeps_its_tool_calls(content):
    codec = codec_of(WITH_TOOLS)
    prompt = Prompt([ASK])
    [before] = codec.encode_prompts([prompt])
    answer = [{**CALLS, "content": content}]
    [whole], [cut] = (codec.encode_completions([prompt], [answer], [before], [ended]) for ended in (True, False))
    assert "Ghent" in shown(codec, cut) and whole == [*cut, codec.chat_end]


# --- thoughts that the template opens


def test_an_answer_inside_the_thought_that_its_prompt_opens_is_counted(capsys):
    rows = [
        {"prompt": [ASK], "chosen": "<think>\nwell\n</think>\n\nyes", "rejected": "no"},
        {"prompt": [ASK], "chosen": "<think>\nwell\n</think>\n\nyes", "rejected": "well\n</think>\n\nno"},
    ]
    data = encode_pairs(make_rows(*rows), codec_of(THINKING), Limits())
    told = " ".join(capsys.readouterr().err.split())
    assert data.counts["in_thought"] == 1 and "1 rows have an answer without a thought" in told
    data = encode_pairs(make_rows(*rows), codec_of(THINKING, arguments={"thinking": False}), Limits())
    assert "in_thought" not in data.counts
    cut = [{**rows[0], "rejected_finish": "length"}]  # a thought that was cut ends nowhere
    assert "in_thought" not in encode_pairs(make_rows(*cut), codec_of(THINKING), Limits()).counts


def test_an_empty_thought_that_the_template_writes_is_trained_outside():
    template = THINKING.replace("{{ a }}", "{% if '</think>' not in a %}<think>\n\n</think>\n\n{% endif %}{{ a }}")
    data = encode_pairs(make_rows({"prompt": [ASK], "chosen": "yes", "rejected": "no"}), codec_of(template), Limits())
    assert "in_thought" not in data.counts


def test_codec_of_plain_texts_is_unchanged():
    codec = Codec(chat())
    [ids] = codec.encode_prompts([Prompt("a")])
    [found] = codec.encode_answers([Prompt("a")], [" b"], [ids], [True])
    assert found.gaps == () and not found.in_thought and F.relu(torch.tensor(len(found.ids))) > 0


def test_the_preview_shows_what_the_assistant_said_as_trained(here, capsys):
    assert run("preview rows.jsonl --model m --for train-dpo --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    told = json.dumps(found)
    assert '"between"' in told
