"""The main chain as a user runs it: trained, resumed, repeated, refused."""

import hashlib
import json
import math
import re
import time

import pytest

from dpoctl.data.chats import Prompt
from dpoctl.data.stored import text_key
from dpoctl.data.tokens import fingerprint
from dpoctl.models.tokenizers import load_tokenizer
from dpoctl.outputs.files import seal
from helpers.chain import assert_same_run, dpo, lines_in, wait_until
from helpers.encoding import encode_prompt


def test_sft_reduces_the_held_out_loss(prefs):
    rows = prefs.rows("sft/metrics.jsonl")
    manifest = prefs.manifest("sft")
    assert rows[0]["step"] == 1
    assert rows[-1]["eval/loss"] < manifest["metrics"]["eval/loss_before"]


def test_preferences_are_what_was_scored(prefs):
    samples = {(r["prompt_id"], r["k"]): r for r in prefs.rows("samples.jsonl")}
    rows = prefs.rows("prefs.jsonl")
    assert len(samples) == 24 * 4
    for row in rows:
        chosen, rejected = (samples[row["prompt_id"], row[f"{side}_k"]] for side in ("chosen", "rejected"))
        assert chosen["score"] >= rejected["score"] and row["margin"] == chosen["score"] - rejected["score"]
        assert (row["chosen"], row["rejected"]) == (chosen["completion"], rejected["completion"])
    counts = prefs.manifest("prefs.jsonl")["metrics"]
    assert len(rows) == counts["pairs"] == 24 * 6 - counts["ties"] - counts["duplicates"] - counts["below_margin"]
    assert {"prompt", "chosen", "rejected"} <= set(rows[0])


def test_dpo_starts_at_log_two_and_learns(trained):
    rows = trained.rows("dpo/metrics.jsonl")
    assert rows[0]["step"] == 1
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(rows[0]["rewards/margins"]) < 1e-4
    assert rows[-1]["eval/loss"] < math.log(2) and rows[-1]["eval/rewards/accuracies"] > 0.55
    points = trained.rows("dpo/eval.jsonl")
    assert points[0]["step"] == 0 and points[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert points[-1]["kl_exact"] > 0


def test_plain_libraries_load_what_was_written(trained):
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained.folder / "dpo")
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "dpo")
    assert model.config.vocab_size == len(tokenizer)
    for name in ("prefs.jsonl", "samples.jsonl", "dpo/metrics.jsonl", "dpo/eval.jsonl"):
        table = datasets.load_dataset(
            "json", data_files=str(trained.folder / name), split="train", cache_dir=str(trained.folder / "datasets")
        )
        assert len(table) == len(trained.rows(name))


def test_a_killed_run_resumes_to_the_same_bytes(trained):
    trained.kill(*dpo("killed"), when=lambda: trained.has_checkpoint("killed"))
    assert not (trained.folder / "killed/manifest.json").exists()
    # the reference's log-probs come from the first run's cache: the key is content
    _, err = trained.run(*dpo("killed"))
    assert "resuming after update" in err and "from the cache" in err
    assert_same_run(trained, "killed", "dpo")


def test_sigterm_saves_and_exits_75(trained):
    process = trained.popen(*dpo("stopped", "--save-every", "1000"))
    wait_until(lambda: lines_in(trained.folder / "stopped/metrics.jsonl"), process)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    trained.run(*dpo("stopped", "--save-every", "1000"))
    assert_same_run(trained, "stopped", "dpo")


def test_a_loss_that_is_not_finite_exits_with_3(trained):
    _, err = trained.run(*dpo("wrong", "--lr", "1e30"), code=3)
    assert re.search(r"update \d+ \(rows at lines [\d, ]+\): the loss is", err) and "hint:" in err
    assert not (trained.folder / "wrong/manifest.json").exists()


def test_sampling_resumes_after_the_last_complete_batch(prefs):
    args = "sample --model sft --prompts test.jsonl --n 3 --generation-batch-size 6 --max-new-tokens 8".split()
    prefs.run(*args, "--out", "whole.jsonl")
    # what a kill leaves: two complete batches, and the third cut in the middle of a line
    text = (prefs.folder / "whole.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)
    prefs.run(*args, "--out", "cut.jsonl")
    manifest = prefs.manifest("cut.jsonl")
    (prefs.folder / "cut.jsonl").unlink()
    (prefs.folder / "cut.jsonl.manifest.json").unlink()
    plan = {"stage": "sample", "identity": manifest["identity"], "inputs": manifest["inputs"]}
    (prefs.folder / "cut.jsonl.plan.json").write_text(json.dumps(plan))
    sizes = [sum(map(len, lines[: 6 * w])) for w in (1, 2, 3)]
    (prefs.folder / "cut.jsonl.partial").write_bytes(text[: sizes[1] + 40])
    sums = [hashlib.sha256(text[:size]).hexdigest() for size in sizes]
    batches = [
        {"batches": w + 1, "sizes": [sizes[w]], "rows": [6 * (w + 1)], "state": {"ended": 0}, "sha256": [sums[w]]}
        for w in range(3)
    ]
    (prefs.folder / "cut.jsonl.progress").write_text("".join(json.dumps(seal(batch)) + "\n" for batch in batches))
    _, err = prefs.run(*args, "--out", "cut.jsonl")
    assert "resuming after 12 rows" in err
    assert (prefs.folder / "cut.jsonl").read_bytes() == text


def test_a_complete_run_does_nothing_and_changed_options_are_refused(trained):
    before = (trained.folder / "dpo/manifest.json").stat().st_mtime_ns
    start = time.monotonic()
    out, err = trained.run(*dpo("dpo"))
    assert time.monotonic() - start < 2.0  # a process start, without torch or a model
    assert out == "" and "nothing to do" in err
    assert (trained.folder / "dpo/manifest.json").stat().st_mtime_ns > before
    _, err = trained.run(*dpo("dpo", "--beta", "0.5"), code=2)
    assert "--beta 0.1, now it is 0.5" in err and "hint:" in err
    trained.run(*dpo("dpo", "--tokens-per-batch", "64"))  # affects memory only, so it may change


def test_evaluate_sample_score_report(trained):
    out, _ = trained.run(
        "evaluate --model sft --model dpo --ref sft --prompts test.jsonl --scorer classifier "
        "--max-new-tokens 12 --out eval.jsonl",
    )
    rows = trained.rows("eval.jsonl")
    assert all(f"{r['reward']:.3f} ± {r['reward_se']:.3f}" in out for r in rows)
    assert [r["method"] for r in rows] == ["sft", "dpo"] and rows[0]["kl"] == 0 and rows[1]["options"]["beta"] == 0.1
    trained.run("score", "--data", "samples.jsonl", "--scorer", "classifier@log-odds", "--out", "scored.jsonl")
    for scored, sample in zip(trained.rows("scored.jsonl"), trained.rows("samples.jsonl"), strict=True):
        assert 1 / (1 + math.exp(-scored["score"])) == pytest.approx(sample["score"], abs=1e-4)
    trained.run("report", "sft", "dpo", "prefs.jsonl", "eval.jsonl", "samples.jsonl", "scored.jsonl", "--out", "report")
    page = (trained.folder / "report/report.html").read_text()
    assert f"{rows[1]['reward']:.3f} ± {rows[1]['reward_se']:.3f}" in page and page.count("<svg") >= 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("sft --model lm --data sfft.jsonl", "did you mean sft.jsonl"),
        ("sft --model nowhere/at/all --data sft.jsonl", "nowhere/at/all: no such model directory"),
        ("sft --model lm --data broken.jsonl", "broken.jsonl:2: broken JSON"),
        ("sft --model lm --data empty.jsonl", "empty.jsonl: the file holds no rows"),
        ("train-dpo --model lm --data hollow.jsonl", "hollow.jsonl:1: field 'prompt': expected text"),
        ("train-dpo --model lm --data equal.jsonl", "no pairs are left to train on (1 equal_dropped)"),
        ("train-dpo --model lm --data hollow.jsonl --gamma 1", "--gamma has no effect with --loss sigmoid"),
        (
            "train-dpo --model classifier --data equal.jsonl",
            "classifier: a RobertaForSequenceClassification, where a causal language model is expected",
        ),
    ],
)
def test_bad_input_is_one_clear_message(world, args, said):
    pair = {"prompt": "I saw", "chosen": " it.", "rejected": " it."}
    files = {
        "broken": '{"text": "a b c"}\n{"text": \n{"text": "d e f"}\n',
        "empty": "",
        "equal": json.dumps(pair) + "\n",
        "hollow": json.dumps(pair | {"prompt": ""}) + "\n",
    }
    for name, text in files.items():
        (world.folder / f"{name}.jsonl").write_text(text)
    _, err = world.run(args, "--out refused", code=2)
    assert said in " ".join(err.split()) and err.count("error:") == 1
    assert not (world.folder / "refused").exists()


def test_several_temperatures_and_few_shot_examples(prefs):
    """Rows of each temperature equal a run at that temperature; few-shot examples change completions, not prompts."""
    sample = ["sample", "--model", "sft", "--max-new-tokens", "8"]
    common = [*sample, "--prompts", "test.jsonl"]
    prefs.run(*common, "--temperature", "0,0.5,1", "--out", "several.jsonl")
    prefs.run(*common, "--temperature", "0.5", "--out", "half.jsonl")
    rows = prefs.rows("several.jsonl")
    assert [r["temperature"] for r in rows] == [0.0] * 12 + [0.5] * 12 + [1.0] * 12
    assert rows[12:24] == prefs.rows("half.jsonl")
    examples = [
        {"prompt": "A film", "completion": " that I liked."},
        {"prompt": "A plot", "completion": " without end. "},
    ]
    (prefs.folder / "examples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in examples))
    prefs.run(*common, "--temperature", "0", "--few-shot", "examples.jsonl", "--out", "shots.jsonl")
    shots = prefs.rows("shots.jsonl")
    assert [r["prompt"] for r in shots] == [r["prompt"] for r in rows[:12]]
    assert [r["completion"] for r in shots] != [r["completion"] for r in rows[:12]]
    assert not any("prompt_ids" in r for r in shots)
    long = {"prompt_id": "p", "prompt": "A film " * 200}
    tokenizer = load_tokenizer(str(prefs.folder / "sft"))
    end = {"prompt_ids": encode_prompt(tokenizer, long["prompt"])[-6:], "tokenizer": fingerprint(tokenizer)}
    end["texts"] = [text_key(Prompt(long["prompt"]), end["prompt_ids"])]
    for name, row in (("long", long), ("end", long | end)):
        (prefs.folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    _, err = prefs.run(*sample, "--prompts", "long.jsonl", "--out", "of-too-long.jsonl")
    assert "long.jsonl: 1 of 1 prompts are too long for the model's context of 160 tokens: truncated" in err
    seen = prefs.rows("of-too-long.jsonl")[0]["prompt_ids"]  # to half of the context, from the left
    assert seen == encode_prompt(tokenizer, long["prompt"])[-80:]
    prefs.run(*sample, "--prompts", "long.jsonl", "--max-prompt-length", "6", "--out", "of-long.jsonl")
    prefs.run(*sample, "--prompts", "end.jsonl", "--out", "of-end.jsonl")
    assert prefs.rows("of-long.jsonl")[0]["completion"] == prefs.rows("of-end.jsonl")[0]["completion"]
    _, err = prefs.run(*common, "--temperature", "0,x", "--out", "no.jsonl", code=2)
    assert "expected a number, got 'x'" in err
