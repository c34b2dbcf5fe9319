"""train-rm as a user runs it: validation on held-out prompts, rewards that transformers reads, resuming, refusals."""

import pytest
import torch

from dpoctl.models.rewards import last_token_rewards
from helpers.chain import REWARD_MODEL, TRAIN, assert_same_bytes


def test_it_is_validated_on_held_out_prompts_and_the_best_is_saved(rewarded):
    found = rewarded.manifest("rm")["metrics"]
    assert found["train_pairs"] + found["validation_pairs"] == found["pairs"]
    rows = rewarded.rows("rm/metrics.jsonl")
    assert {"accuracy", "margin", "mean_reward", "min_reward", "max_reward", "eval/calibration_error"} <= set(rows[-1])
    assert rows[0]["min_reward"] < rows[0]["mean_reward"] < rows[0]["max_reward"]
    evaluated = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert len(evaluated) > 4 and found["best/accuracy"] == pytest.approx(max(evaluated), abs=1e-6)
    assert found["eval/accuracy"] == pytest.approx(found["best/accuracy"], abs=1e-6)  # the best is what was saved
    assert sum(n for *_, n in found["accuracy_by_margin"]) == found["validation_pairs"]


def test_plain_transformers_reads_the_rewards_that_were_trained(rewarded):
    """At the end token of a padded batch; the scorer subtracts the shift, so that the mean over samples is 0."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(rewarded.folder / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(rewarded.folder / "rm")
    assert model.config.num_labels == 1 and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = ["I liked it.", "A film without any end, and then some more of it."]
    ids = [tokenizer(t)["input_ids"] + [tokenizer.eos_token_id] for t in texts]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).logits[:, 0]
        assert torch.allclose(plain, last_token_rewards(model, [(text, 1) for text in ids]), atol=1e-5)
        assert torch.allclose(plain[:1], last_token_rewards(model, [(ids[0], 2)]), atol=1e-5)
    rewarded.run("score", "--data", "samples.jsonl", "--scorer", "rm", "--out", "by-rm.jsonl")
    scores = [row["score"] for row in rewarded.rows("by-rm.jsonl")]
    # the shift is the mean over the completions in the preferences, which are nearly all of these samples
    assert abs(sum(scores) / len(scores)) < 0.15 * (max(scores) - min(scores))


def test_centring_is_added_to_the_loss(rewarded):
    """The first update has the untouched model's loss and the term; in training the sums of rewards shrink."""
    rewarded.run(*REWARD_MODEL, "--center-rewards", "0.5", "--out", "rm-centred")
    plain, centred = rewarded.rows("rm/metrics.jsonl"), rewarded.rows("rm-centred/metrics.jsonl")
    assert "centring" not in plain[0] and centred[0]["centring"] > 0
    assert centred[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.5 * centred[0]["centring"], rel=1e-5)
    assert centred[0]["accuracy"] == plain[0]["accuracy"]
    assert centred[-1]["centring"] < 0.5 * centred[0]["centring"]  # after so few updates
    assert abs(rewarded.manifest("rm-centred")["metrics"]["reward_shift"]) < abs(
        rewarded.manifest("rm")["metrics"]["reward_shift"]
    )


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(rewarded):
    args = [*REWARD_MODEL, "--save-every", "2", "--out", "rm-killed"]
    rewarded.kill(*args, when=lambda: rewarded.has_checkpoint("rm-killed"))
    _, err = rewarded.run(*args)
    assert "resuming after update" in err
    assert_same_bytes(rewarded, "rm", "rm-killed")


def test_a_classifier_and_validation_on_training_prompts_are_refused(prefs):
    _, err = prefs.run("train-rm", "--model", "classifier", "--data", "prefs.jsonl", "--out", "no-rm", code=2)
    assert "classifier: classifier.out_proj.bias is [2] in the weights, [1] by config.json" in err
    _, err = prefs.run(
        "train-rm --model sft --data prefs.jsonl --eval-data prefs.jsonl --out no-rm",
        *TRAIN,
        code=2,
    )
    assert "all of its prompts are trained on" in err
