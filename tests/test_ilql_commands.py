"""train-ilql and --ilql-beta: run directory, resuming, frontiers, stored samples, refusals."""

import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dpoctl.models import ilql
from dpoctl.models.load import load_policy
from dpoctl.models.logprobs import policy_kl
from dpoctl.models.place import Place
from dpoctl.objectives.kl import kl
from helpers.chain import TRAIN, assert_same_bytes
from helpers.ilql_values import perturbed

ILQL = [*"train-ilql --model sft --data samples.jsonl --batch-size 16 --lr 1e-3 --epochs 3 --target-every 2".split()]
ILQL += [*"--target-rate 0.5 --log-every 2 --save-every 2".split(), *TRAIN]
FILES = ("model.safetensors", "ilql.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def learned(prefs):
    """With `ilql`, trained on scored completions."""
    prefs.run(*ILQL, "--eval-data samples.jsonl --eval-every 9 --out ilql")
    return prefs


def test_a_run_directory_is_a_model_with_values(learned):
    rows = learned.rows("ilql/metrics.jsonl")
    terms = {"loss/q", "loss/value", "loss/cql", "loss/policy", "val/q", "val/value", "val/last_q", "val/return"}
    assert terms <= set(rows[0]) and {"eval/loss", "eval/loss/q"} <= set(rows[-1])
    first = rows[0]
    total = first["loss/q"] + first["loss/value"] + 0.1 * first["loss/cql"] + first["loss/policy"]
    assert first["loss"] == pytest.approx(total, rel=1e-4)
    assert first["val/q"] == first["val/value"] == first["loss/value"] == 0  # no token has a value by chance
    found = learned.manifest("ilql")
    scores = torch.tensor([row["score"] for row in learned.rows("samples.jsonl")], dtype=torch.float64)
    assert found["metrics"]["return_mean"] == pytest.approx(scores.mean().item())
    assert found["metrics"]["return_scale"] == pytest.approx(scores.std(correction=0).item())
    assert "ilql.safetensors" in json.dumps(found["outputs"])
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(learned.folder / "ilql")
    heads = load_file(learned.folder / "ilql" / "ilql.safetensors")
    vocabulary, width = plain.lm_head.weight.shape
    assert rows[-1]["loss/cql"] < first["loss/cql"] == pytest.approx(2 * math.log(vocabulary), rel=1e-5)
    assert heads["q.1.out.weight"].shape == heads["target_q.1.out.weight"].shape == (vocabulary, 2 * width)
    assert not torch.equal(heads["q.1.out.weight"], heads["target_q.1.out.weight"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(learned):
    """Target heads and the count of updates between theirs are in the checkpoints."""
    args = [*ILQL, "--eval-data samples.jsonl --eval-every 9 --save-every 3 --out killed"]
    learned.kill(*args, when=lambda: learned.has_checkpoint("killed"))
    _, err = learned.run(*args)
    assert "resuming after update" in err
    assert_same_bytes(learned, "ilql", "killed", FILES)


def test_targets_are_read_from_the_checkpoint(learned):
    """They do not start again as copies of the Q heads."""
    newest = max((learned.folder / "ilql" / "checkpoints").glob("step-*"))
    held, trained = load_file(newest / "further.safetensors"), load_file(newest / "model.safetensors")
    name = "heads.target_q.0.out.weight"
    assert not torch.equal(held[name], trained["heads.q.0.out.weight"]) and name not in trained


@pytest.mark.slow
def test_a_checkpoint_without_the_targets_is_refused(learned):
    """They would start again as copies of the Q heads of the first update."""
    args = [*ILQL, "--save-every 3 --out without"]
    learned.kill(*args, when=lambda: learned.has_checkpoint("without"))
    for folder in (learned.folder / "without" / "checkpoints").glob("step-*"):
        (folder / "further.safetensors").unlink()
        sums = json.loads((folder / "checksums.json").read_text())
        sums.pop("further.safetensors")
        (folder / "checksums.json").write_text(json.dumps(sums))
    _, err = learned.run(*args, code=2)
    assert "does not hold heads.target_q." in err


def test_preferences_and_unnormalised_returns(learned):
    learned.run("train-ilql --model sft --data prefs.jsonl --rows preferences --max-steps 2 --batch-size 8", *TRAIN,
                "--out from-prefs")  # fmt: skip
    found = learned.manifest("from-prefs")["metrics"]
    assert found["completions"] == 2 * found["rows"] and (found["return_mean"], found["return_scale"]) == (0.0, 1.0)
    learned.run(*ILQL, "--normalize none --max-steps 1 --out raw")
    assert learned.manifest("raw")["metrics"]["return_mean"] == 0.0
    assert 0 < learned.rows("raw/metrics.jsonl")[0]["val/return"] < 1  # a probability


SAMPLE = "sample --prompts test.jsonl --max-new-tokens 8 --generation-batch-size 4"


def test_beta_0_decodes_the_policy(learned):
    """The bytes of the model directory without its values; without the option that is said."""
    shutil.copytree(learned.folder / "ilql", learned.folder / "plain")
    for name in ("ilql.safetensors", "manifest.json"):
        (learned.folder / "plain" / name).unlink()
    _, told = learned.run(SAMPLE, "--model ilql --ilql-beta 0 --out zero.jsonl")
    _, warned = learned.run(SAMPLE, "--model ilql --out none.jsonl")
    learned.run(SAMPLE, "--model plain --out plain.jsonl")
    learned.run(SAMPLE, "--model ilql --ilql-beta 4 --out four.jsonl")
    assert learned.digest("zero.jsonl") == learned.digest("none.jsonl") == learned.digest("plain.jsonl")
    assert learned.digest("four.jsonl") != learned.digest("zero.jsonl")
    assert "decoded without its values" in warned and "without its values" not in told


def test_evaluate_draws_a_frontier_of_one_model(learned):
    learned.run("evaluate --model ilql --ilql-beta 0,1,8 --ref sft --prompts test.jsonl --scorer classifier",
                "--max-new-tokens 8 --n 2 --out frontier.jsonl")  # fmt: skip
    rows = learned.rows("frontier.jsonl")
    assert [row["options"]["ilql_beta"] for row in rows] == [0, 1, 8]
    assert {row["method"] for row in rows} == {"ilql"}
    assert rows[0]["kl_exact"] < rows[1]["kl_exact"] < rows[2]["kl_exact"]
    out, _ = learned.run("report frontier.jsonl --out report")
    assert "ilql β=8" in out
    # other betas are no repetitions of a measurement
    assert "seeds of" not in (learned.folder / "report/report.html").read_text()


def test_shards_of_a_frontier_are_merged_beta_by_beta(learned):
    """Each shard has a row for each beta on its prompts."""
    words = (
        "evaluate --model ilql --ilql-beta 0,8 --ref sft --prompts test.jsonl --scorer classifier --max-new-tokens 8"
    )
    words += " --generation-batch-size 4"
    learned.run(words, "--out both.jsonl")
    for i in (1, 2):
        learned.run(words, f"--shard {i}/2 --out part{i}.jsonl")
    learned.run("merge part1.jsonl part2.jsonl --out pooled.jsonl")
    whole, pooled = learned.rows("both.jsonl"), learned.rows("pooled.jsonl")
    assert [row["options"]["ilql_beta"] for row in pooled] == [0, 8]
    for name in ("reward", "kl", "kl_exact", "length"):
        assert [r[name] for r in pooled] == pytest.approx([r[name] for r in whole], rel=1e-4)


def test_kl_of_stored_samples_is_that_of_the_beta_they_were_decoded_with(learned):
    """By the manifest of the samples; another beta is refused, and samples without a manifest are given theirs."""
    learned.run("sample --n 2 --prompts test.jsonl --max-new-tokens 8 --model ilql --ilql-beta 8 --out stored.jsonl")
    shutil.copyfile(learned.folder / "stored.jsonl", learned.folder / "copy.jsonl")
    words = "evaluate --model ilql --ref sft --scorer classifier"
    _, err = learned.run(words, "--ilql-beta 1 --completions stored.jsonl --out no.jsonl", code=2)
    assert "stored.jsonl: by its manifest it was sampled with --ilql-beta 8, not 1" in err
    learned.run(words, "--completions stored.jsonl --out of-stored.jsonl")
    learned.run(words, "--ilql-beta 8 --completions copy.jsonl --out of-copy.jsonl")
    learned.run(words, "--ilql-beta 8 --n 2 --prompts test.jsonl --max-new-tokens 8 --out of-model.jsonl")
    stored, copy, sampled = (learned.rows(f"of-{name}.jsonl")[0] for name in ("stored", "copy", "model"))
    for name in ("reward", "kl", "kl_exact"):
        assert stored[name] == copy[name] == pytest.approx(sampled[name], rel=1e-4), name
    assert stored["options"]["ilql_beta"] == 8 and stored["completions"] == "stored.jsonl"
    _, err = learned.run("evaluate --completions stored.jsonl --optimum --scorer classifier --out no.jsonl", code=2)
    assert "--optimum does not hold for them: they were decoded with --ilql-beta" in err


def test_the_values_that_are_read_are_the_targets_that_were_trained(learned):
    policy = load_policy(str(learned.folder / "ilql"), Place(torch.device("cpu"), torch.float32))
    heads = ilql.make_heads(policy.model, None)
    heads.load_state_dict(load_file(learned.folder / "ilql" / "ilql.safetensors"))
    model = ilql.IlqlModel(policy.model, heads)
    ilql.decode_with_values(policy.model, learned.folder / "ilql", 2.0, "ilql")
    reference = load_policy(str(learned.folder / "sft"), Place(torch.device("cpu"), torch.float32)).model
    text = ([5, 6, 7, 8], 2)
    p = perturbed(model, text[0], 2.0, 1.0)[1:-1]
    with torch.no_grad():
        r = reference(torch.tensor([text[0]])).logits[0].double().log_softmax(-1)[1:-1]
    found = policy_kl(policy.model, reference, [text], tokens_per_batch=64)[1]
    assert found.item() == pytest.approx(kl(p, r).sum().item(), rel=1e-3)


@pytest.mark.slow
def test_adapters_and_their_merged_model_have_the_same_values(learned):
    pytest.importorskip("peft")
    learned.run(*ILQL, "--lora 4 --max-steps 2 --out adapters")
    learned.run("merge adapters --base sft --out merged")
    assert learned.digest("adapters/ilql.safetensors") == learned.digest("merged/ilql.safetensors")
    for model in ("adapters", "merged"):
        learned.run(SAMPLE, f"--temperature 0 --ilql-beta 2 --model {model} --out greedy-{model}.jsonl")
    texts = [[row["completion"] for row in learned.rows(f"greedy-{model}.jsonl")] for model in ("adapters", "merged")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (f"{SAMPLE} --model sft --ilql-beta 1", "sft: --ilql-beta needs the values that train-ilql saves"),
        (f"{SAMPLE} --model sft --ilql-beta 1 --dry-run", "sft: --ilql-beta needs the values that train-ilql saves"),
        (f"{SAMPLE} --model sft --ilql-beta 0 --dry-run", "sft: --ilql-beta needs the values that train-ilql saves"),
        (f"{SAMPLE} --model ilql --ilql-beta -1", "--ilql-beta: expected at least 0"),
        (f"{SAMPLE} --model ilql --ilql-beta inf", "--ilql-beta: expected at most 10000"),
        (
            "make-prefs --samples samples.jsonl --ilql-beta 1",
            "--ilql-beta has no effect",
        ),
        (
            "evaluate --model ilql --ilql-beta 1,2 --ref sft --completions samples.jsonl --scorer classifier",
            "several --ilql-beta need --prompts",
        ),
        (
            "evaluate --model ilql --model sft --ilql-beta 0 --ref sft --prompts test.jsonl --scorer classifier",
            "sft: --ilql-beta needs the values that train-ilql saves",
        ),
        ("train-ilql --model sft --data prefs.jsonl", "prefs.jsonl:1"),
        ("train-ilql --model sft --data unscored.jsonl", "unscored.jsonl:2: field 'score': expected a number"),
        ("train-ilql --model sft --data samples.jsonl --parallel fsdp", "--parallel ddp"),
        (
            "evaluate --model ilql --ilql-beta 1 --engine vllm --ref sft --prompts test.jsonl --scorer classifier",
            "--ilql-beta has no effect with --engine vllm",
        ),
    ],
)
def test_refusals(learned, args, said):
    rows = learned.rows("samples.jsonl")[:2]
    rows[1].pop("score")
    (learned.folder / "unscored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = "no.jsonl" if args.split()[0] in ("sample", "evaluate", "make-prefs") else "no"
    _, err = learned.run(args, f"--out {name}", code=2)
    assert said in err and not (learned.folder / name).exists()


def test_the_plan_counts_the_heads(learned):
    out, _ = learned.run(*ILQL, "--out planned --dry-run")
    shown = {line[:22].strip(): line[22:].strip() for line in out.splitlines()}
    weights = load_file(learned.folder / "ilql" / "ilql.safetensors")
    policy = load_file(learned.folder / "ilql" / "model.safetensors")
    assert int(shown["parameters"]) == sum(t.numel() for t in (*weights.values(), *policy.values()))
    held = float(shown["memory: weights"].split()[0]) * 1e6
    assert held == pytest.approx(4 * int(shown["parameters"]), rel=0.05)
    plain, _ = learned.run(SAMPLE, "--model ilql --out planned.jsonl --dry-run")
    valued, _ = learned.run(SAMPLE, "--model ilql --ilql-beta 1 --out planned.jsonl --dry-run")
    more = [
        float(line.split()[2]) for said in (plain, valued) for line in said.splitlines() if "memory: weights" in line
    ]
    targets = sum(4e-6 * t.numel() for name, t in weights.items() if name.startswith("target_q"))
    assert more[1] - more[0] == pytest.approx(targets, abs=0.2)
    flops = [float(re.search(r"FLOPs at most +(\S+)", said)[1]) for said in (plain, valued)]
    assert flops[1] / flops[0] == pytest.approx(1 + targets / 4e-6 / sum(t.numel() for t in policy.values()), rel=0.02)
