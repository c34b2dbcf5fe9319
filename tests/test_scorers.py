"""Scorers against forwards of one text at a time in float64, their notation, and their refusals; text statistics."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Cache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpoctl.config.scorer import ScorerSpec, model_revisions, parse_scorer
from dpoctl.data.chats import Prompt
from dpoctl.data.stored import text_key
from dpoctl.errors import InputError
from dpoctl.inference import scorers
from dpoctl.inference.policy_evaluation import length_of, without_end
from dpoctl.inference.scorers import ScorerOptions, load_scorer
from dpoctl.inference.text_statistics import distinct_n, mean_se, repetition_loop

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *"the film was good bad very dull bright long short plot end a b".split()]
ROWS = [
    {"prompt_id": "p0", "prompt": "the film ", "completion": "was very good", "k": 0},
    {"prompt_id": "p0", "prompt": "the film ", "completion": "was bad", "k": 1},
    {"prompt_id": "p1", "prompt": "a ", "completion": "long dull plot the end", "k": 0, "finish": "length"},
    {"prompt_id": "p2", "prompt": "bright ", "completion": "end", "k": 0, "finish": "stop"},
]


def tokenizer_of(words, *, wrap=False, **special):
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if wrap:
        inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A RoBERTa classifier; a GPT-2 reward model; two GPT-2 language models, the first a DPO run with beta 0.25."""
    root = tmp_path_factory.mktemp("scorers")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        initializer_range=0.5,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    RobertaForSequenceClassification(config).save_pretrained(root / "classifier")
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer_of(WORDS, wrap=True, **special).save_pretrained(root / "classifier")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": len(WORDS)}
    shape |= {"initializer_range": 0.5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    plain = tokenizer_of(WORDS, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    reward = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1))
    reward.config.reward_shift, reward.config.reward_scale = 0.5, 2.0
    for name, model in {
        "reward": reward,
        "policy": GPT2LMHeadModel(GPT2Config(**shape)),
        "reference": GPT2LMHeadModel(GPT2Config(**shape)),
    }.items():
        model.save_pretrained(root / name)
        plain.save_pretrained(root / name)
    (root / "policy" / "config.yaml").write_text("stage: train-dpo\nbeta: 0.25\n")
    return root


def classifier_logits(root, texts, name="classifier"):
    """[texts, labels] in float64, a text at a time."""
    model = RobertaForSequenceClassification.from_pretrained(root / name).double().eval()
    words = {word: i for i, word in enumerate(WORDS)}
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[0, *(words[w] for w in text.split()), 2]])).logits for text in texts])


# Float32 forwards of models this size agree with float64 to about 1e-6, while the texts' scores differ by over 0.1.
NOISE = {"abs": 1e-5}


@pytest.mark.parametrize("score_type", [None, "prob", "logit", "log-odds"])
@pytest.mark.parametrize("tokens_per_batch", [1, 12, 16384])
def test_a_classifier_s_score_types(root, score_type, tokens_per_batch):
    scorer = load_scorer(
        str(root / "classifier") + (f"@{score_type}" if score_type else ""),
        ScorerOptions(tokens_per_batch=tokens_per_batch),
    )
    scores = scorer.score(ROWS)
    logits = classifier_logits(root, [row["prompt"] + row["completion"] for row in ROWS])
    odds = (logits[:, 1] - logits[:, 0]).tolist()
    expected = {"logit": logits[:, 1].tolist(), "log-odds": odds}
    expected["prob"] = [1 / (1 + math.exp(-x)) for x in odds]
    assert scorer.score_type == (score_type or "prob")
    assert scores.keys == pytest.approx(odds, **NOISE)
    assert scores.values == pytest.approx(expected[score_type or "prob"], **NOISE)
    assert max(odds) - min(odds) > 0.1  # the texts do differ


def test_completion_alone_messages_and_whole_texts(root):
    path = str(root / "classifier@log-odds")

    def odds(texts):
        logits = classifier_logits(root, texts)
        return pytest.approx((logits[:, 1] - logits[:, 0]).tolist(), **NOISE)

    alone = load_scorer(path, ScorerOptions(text="completion")).score(ROWS)
    assert alone.keys == odds([row["completion"] for row in ROWS])
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was bad"}]
    rows = [{"prompt": messages, "completion": "very dull"}, {"text": "a film"}, {"messages": messages}]
    assert load_scorer(path).score(rows).keys == odds(["the film\nwas bad\nvery dull", "a film", "the film\nwas bad"])
    assert load_scorer(path).score([]).values == []


def test_saturated_probabilities_keep_their_order_in_the_keys(root, tmp_path):
    model = RobertaForSequenceClassification.from_pretrained(root / "classifier")
    model.classifier.out_proj.weight.data *= 1000
    model.classifier.out_proj.bias.data = torch.tensor([-1e5, 1e5])
    model.save_pretrained(tmp_path)
    tokenizer_of(WORDS, wrap=True, bos_token="<s>", pad_token="<pad>", eos_token="</s>").save_pretrained(tmp_path)
    scores = load_scorer(str(tmp_path)).score(ROWS)
    assert set(scores.values) == {1.0} and len(set(scores.keys)) == len(ROWS)


def test_three_labels_are_read_as_positive_against_the_rest(root, tmp_path):
    config = RobertaConfig.from_pretrained(root / "classifier", num_labels=3)
    config.id2label = {0: "neg", 1: "neutral", 2: "Pos"}
    torch.manual_seed(1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer_of(WORDS, wrap=True, bos_token="<s>", pad_token="<pad>", eos_token="</s>").save_pretrained(tmp_path)
    scores = load_scorer(str(tmp_path)).score(ROWS)
    logits = classifier_logits(tmp_path, [row["prompt"] + row["completion"] for row in ROWS], name=".")
    assert scores.values == pytest.approx(logits.softmax(-1)[:, 2].tolist(), **NOISE)
    assert scores.keys == pytest.approx(torch.logit(logits.softmax(-1)[:, 2]).tolist(), **NOISE)


def test_long_texts_are_truncated_at_the_limit_of_the_classifier_with_one_warning(root, capsys):
    # 20 position embeddings, the first two before and at the padding index: 18 tokens, 16 words between <s> and </s>.
    scorer = load_scorer(str(root / "classifier@logit"))
    rows = [{"prompt": "", "completion": " ".join(["very"] * n + ["good"])} for n in (15, 16, 30)]
    values = scorer.score(rows).values
    scorer.score(rows)
    expected = classifier_logits(root, ["very " * 15 + "good", "very " * 16])[:, 1].tolist()
    assert values == pytest.approx([expected[0], expected[1], expected[1]], **NOISE)
    said = capsys.readouterr().err
    assert said.count("2 texts are longer than its 18 tokens") == 1


@pytest.mark.parametrize("spec", ["classifier@logit", "reward", "implicit"])
def test_scores_have_the_asked_precision_whatever_the_precision_around_them(root, spec):
    spec = f"implicit:{root / 'policy'},{root / 'reference'}" if spec == "implicit" else str(root / spec)
    exact, rounded = (load_scorer(spec, ScorerOptions(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    expected, expected_rounded = exact.score(ROWS), rounded.score(ROWS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact.score(ROWS) == expected
        assert rounded.score(ROWS) == expected_rounded
    # eight bits of precision through two layers; the head's output is not rounded to them
    assert expected_rounded.values == pytest.approx(expected.values, rel=0.1, abs=0.1)
    assert expected_rounded.values != expected.values
    if spec.split(":")[0] != "implicit":
        logits = torch.tensor(expected_rounded.values)
        assert (logits.bfloat16().float() != logits).any()


def test_a_classifier_without_a_positive_label_is_refused(root, tmp_path):
    model = RobertaForSequenceClassification.from_pretrained(root / "classifier")
    tokenizer_of(WORDS, wrap=True, pad_token="<pad>").save_pretrained(tmp_path)
    for labels in (["LABEL_0", "LABEL_1"], ["joy", "anger"]):
        model.config.id2label = dict(enumerate(labels))
        model.save_pretrained(tmp_path)
        with pytest.raises(
            InputError, match=f"no label .* called positive; it has {', '.join(labels)}\nhint: .*id2label"
        ):
            load_scorer(str(tmp_path))


def test_a_reward_model_reads_the_last_token_with_eos_only_where_the_text_ended(root):
    scorer = load_scorer(str(root / "reward"))
    scores = scorer.score(ROWS)
    model = GPT2ForSequenceClassification.from_pretrained(root / "reward").double().eval()
    words = {word: i for i, word in enumerate(WORDS)}
    expected = []
    for row in ROWS:
        ids = [words[w] for w in (row["prompt"] + row["completion"]).split()] + [2] * (row.get("finish") != "length")
        with torch.no_grad():
            expected.append(((model(torch.tensor([ids])).logits[0, 0] - 0.5) / 2.0).item())
    assert scores.values == pytest.approx(expected, **NOISE) and scores.keys == scores.values
    assert scorer.score_type == "reward"
    one_by_one = [scorer.score([row]).values[0] for row in ROWS]
    assert scores.values == pytest.approx(one_by_one, abs=1e-5)
    with pytest.raises(InputError, match="one label.* no score type @prob"):
        load_scorer(str(root / "reward@prob"))


def test_a_decoder_keeps_no_keys_and_values_while_it_scores(root):
    scorer = load_scorer(str(root / "reward"))
    outputs = []
    scorer.model.register_forward_hook(lambda model, args, output: outputs.append(output))
    scorer.score(ROWS)
    assert outputs and not any(isinstance(value, Cache) for output in outputs for value in output.values())


def test_a_reward_model_padded_with_its_eos_is_not_shown_one(root, tmp_path):
    # transformers reads the last token that is not padding: an EOS at the end would be taken for padding.
    model = GPT2ForSequenceClassification.from_pretrained(root / "reward")
    model.config.pad_token_id = 2
    model.save_pretrained(tmp_path)
    tokenizer_of(WORDS, pad_token="</s>", eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    never_ended = load_scorer(str(root / "reward")).score([row | {"finish": "length"} for row in ROWS])
    assert load_scorer(str(tmp_path)).score(ROWS).values == pytest.approx(never_ended.values, **NOISE)


def summed_logps(root, name, prompt, completion):
    model = GPT2LMHeadModel.from_pretrained(root / name).double().eval()
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logps = model(ids).logits[0, :-1].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion))


def test_the_implicit_reward_is_beta_times_the_summed_log_ratio(root):
    scorer = load_scorer(f"implicit:{root / 'policy'},{root / 'reference'}")
    words = {word: i for i, word in enumerate(WORDS)}
    expected = []
    for row in ROWS:
        prompt = [words[w] for w in row["prompt"].split()]
        completion = [words[w] for w in row["completion"].split()] + [2] * (row.get("finish") != "length")
        ratio = summed_logps(root, "policy", prompt, completion) - summed_logps(root, "reference", prompt, completion)
        expected.append(0.25 * ratio)
    scores = scorer.score(ROWS)
    assert scores.values == pytest.approx(expected, **NOISE) and scores.keys == scores.values
    same = load_scorer(f"implicit:{root / 'policy'},{root / 'policy'}").score(ROWS)
    assert same.values == [0.0] * len(ROWS)
    nothing = {**ROWS[0], "completion": "", "finish": "length"}  # a sample that was cut before its first token
    assert scorer.score([nothing, *ROWS, nothing]).values == pytest.approx([0.0, *expected, 0.0], **NOISE)
    assert scorer.score([nothing]).values == [0.0]
    with pytest.raises(InputError, match="config.yaml.*beta"):
        load_scorer(f"implicit:{root / 'reference'},{root / 'policy'}")
    with pytest.raises(InputError, match="never the completion alone"):
        load_scorer(f"implicit:{root / 'policy'},{root / 'reference'}", ScorerOptions(text="completion"))


@pytest.mark.parametrize(("given", "expected"), [("a,b", ["a", "b"]), ("a", ["a", "a"]), (None, [None, None])])
def test_each_model_of_an_implicit_reward_has_its_revision(root, monkeypatch, given, expected):
    opened, asked = [], []
    load_policy, resolve = scorers.load_policy, scorers.resolve

    def load(path, place, *, revision, **options):
        opened.append(revision)
        return load_policy(path, place, revision=None, **options)

    monkeypatch.setattr(scorers, "load_policy", load)
    monkeypatch.setattr(scorers, "resolve", lambda path, revision: asked.append(revision) or resolve(path))
    load_scorer(f"implicit:{root / 'policy'},{root / 'reference'}", ScorerOptions(revision=given))
    assert opened == expected and asked == expected[:1]  # the policy's revision has the beta


@pytest.mark.parametrize("given", ["a,", ",b", "a,b,c"])
def test_a_pair_of_revisions_is_complete(given):
    with pytest.raises(InputError, match="expected one or two"):
        model_revisions(parse_scorer("implicit:p,r"), given)
    assert model_revisions(parse_scorer("m"), given) == (given,)


@pytest.fixture
def python(tmp_path):
    """python(code) -> the scorer of its function f."""

    def build(code, name="f"):
        (tmp_path / "mine.py").write_text(code)
        return load_scorer(f"python:{tmp_path / 'mine.py'}:{name}")

    return build


def test_a_python_function(python):
    scorer = python("def f(pairs):\n    return [len(p['prompt']) * 100 + len(p['completion']) for p in pairs]\n")
    assert scorer.score(ROWS).values == [913.0, 907.0, 222.0, 703.0] == scorer.score(ROWS).keys
    assert scorer.score_type == "python"


@pytest.mark.parametrize(
    "code, message",
    [
        ("def f(pairs): return [1.0]", "returned 1 numbers for 4 texts.*prompt_id p0, k 0: 'the film was very good'"),
        (
            "def f(pairs): return [float('nan') if 'bad' in p['completion'] else 0 for p in pairs]",
            "gave nan for prompt_id p0, k 1: 'the film was bad'",
        ),
        (
            "def f(pairs):\n    return [1 / ('dull' not in p['completion']) for p in pairs]",
            "line 2: ZeroDivisionError.*, on prompt_id p1, k 0: 'a long dull plot the end'",
        ),
        ("def f(pairs): return ['good' for p in pairs]", "ValueError: could not convert.*'the film was very good'"),
        ("def f(pairs): return 1.0", "TypeError"),
        ("def f(pairs: return", "cannot be imported: SyntaxError"),
        ("import nothing_of_this_name", "cannot be imported: line 1: ModuleNotFoundError"),
        ("def g(pairs): return 0\nclass H: pass", "no function f\nhint: it has: g, H"),
    ],
)
def test_a_function_that_fails_is_reported_with_its_text(python, code, message):
    with pytest.raises(InputError, match=message):
        python(code).score(ROWS)


def test_the_notation(tmp_path):
    hub = "siebert/sentiment-roberta-large-english"
    assert parse_scorer(hub) == ScorerSpec("model", (hub,))
    assert parse_scorer(hub + "@log-odds") == ScorerSpec("model", (hub,), "log-odds")
    odd = tmp_path / "at@prob"
    odd.mkdir()
    (odd / "config.json").write_text(json.dumps({}))
    assert parse_scorer(str(odd)) == ScorerSpec("model", (str(odd),))
    for spec, message in {
        f"{hub}@probs": "unknown score type 'probs'\nhint: did you mean @prob",
        "implicit:only-one": "write implicit:POLICY,REFERENCE",
        "python:scorer.py": "write python:FILE.py:FUNCTION",
        "@prob": "no model named",
        "implict:a,b": "did you mean implicit:a,b\\?",
        "Implicit:a,b": "did you mean implicit:a,b\\?",
        "pyton:f.py:g": "did you mean python:f.py:g\\?",
        "f.py:g": "did you mean python:f.py:g\\?",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_scorer(spec)


def test_scorers_that_do_not_exist(root):
    for spec, message in {
        f"implicit:{root}/policyy,{root}/reference": "policyy: no such model directory\nhint: .*policy",
        f"implicit:{root}/policy,{root}/no-such": "no-such: no such model directory",
        f"python:{root}/none.py:f": "no such file",
        f"{root}/clasifier@prob": "clasifier: no such model directory\nhint: .*classifier",
        str(root): "no config.json\nhint: there is a model in",
    }.items():
        with pytest.raises(InputError, match=message):
            load_scorer(spec)


# ---- text statistics


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4  # ab, ba, ab | ab: no pair across the two texts
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_n(["a", ""], 2) == 0.0


def test_repetition_loops_by_hand():
    assert repetition_loop([9, 8, 7] + [1] * 12)
    assert not repetition_loop([9, 8, 7] + [1] * 11)  # fewer than 12 tokens
    assert repetition_loop([5, 6] + [1, 2, 3, 4] * 3)
    assert not repetition_loop([5, 6] + [1, 2, 3, 4, 5] * 2 + [1, 2, 3, 4])  # not quite three times
    assert repetition_loop([1, 2, 3, 4, 5] * 3 + [1, 2])  # the last one cut short
    assert not repetition_loop([1] * 30 + [2, 3])  # it got out of it
    assert not repetition_loop(list(range(9)) * 4)  # units of at most 8
    assert not repetition_loop([])


def test_mean_and_standard_error_by_hand():
    assert mean_se([1.0, 2.0, 3.0]) == pytest.approx((2.0, math.sqrt(1.0 / 3)))
    # Prompt means 2 and 5: mean 3.5, standard deviation sqrt(4.5), error sqrt(4.5 / 2) = 1.5.
    assert mean_se([1.0, 3.0, 5.0], ["p", "p", "q"]) == pytest.approx((3.5, 1.5))
    mean, error = mean_se([4.0])
    assert mean == 4.0 and math.isnan(error)


def test_the_length_of_an_edited_completion_is_not_that_of_its_old_ids():
    row = {"prompt": "p", "completion": "a b c", "finish": "stop", "tokenizer": "t"}
    row |= {"prompt_ids": [1], "completion_ids": [2, 3, 4, 5, 6, 0]}
    row["texts"] = [text_key(Prompt("p"), [1], "a b c", row["completion_ids"])]
    assert (length_of(row), without_end(row)) == (6, [2, 3, 4, 5, 6])
    assert (length_of(row | {"completion": "a b"}), without_end(row | {"completion": "a b"})) == (3, [])
