"""Reward models over the border: train-rm's read by plain transformers, and models from elsewhere read by dpoctl."""

import json

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from dpoctl.data.chats import Prompt
from dpoctl.data.stored import text_key
from dpoctl.data.tokens import fingerprint
from dpoctl.inference.scorers import ScorerOptions, load_scorer
from dpoctl.models.load import load_reward_start
from dpoctl.models.rewards import last_token_rewards
from helpers.chain import World
from helpers.tiny_models import tiny_model
from helpers.tokenizer_families import chat, word_piece

QUESTION = [{"role": "user", "content": "is the film good?"}]
ANSWERS = ["the film was great", "no", "it was a long film, and a dull one"]


def rows_of(answers: list[str]) -> list[dict]:
    return [{"prompt": QUESTION, "completion": answer} for answer in answers]


def conversation(answer: str) -> list[dict]:
    return [*QUESTION, {"role": "assistant", "content": answer}]


@torch.no_grad()
def logit(model, ids: list[int]) -> float:
    return model.double()(torch.tensor([ids])).logits[0, 0].item()


def save_classifier(folder, tokenizer, **config):
    """A decoder with one label, as a model card's training script leaves it."""
    tiny_model("llama", vocab=len(tokenizer), context=128, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_reward_model_of_train_rm_in_plain_transformers(tmp_path, warm):
    world, tokenizer = World(tmp_path, warm), chat(pad_token="<s>")
    tiny_model("llama", vocab=len(tokenizer), context=128, eos_token_id=2).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    pairs = [
        {"prompt": [{"role": "user", "content": f"is film {n} good?"}], "chosen": a, "rejected": b}
        for n, (a, b) in enumerate(zip(ANSWERS, ANSWERS[1:] + ANSWERS[:1], strict=True))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(ANSWERS)))
    world.run(
        "train-rm --model lm --data pairs.jsonl --max-steps 2 --batch-size 2 --lr 1e-2 --max-length 120",
        "--max-prompt-length 60 --warmup-steps 1 --validation 0.4 --normalize shift-scale --out rm",
    )
    world.run("score --data rows.jsonl --scorer rm --out scored.jsonl")
    scores = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]

    # As the documentation tells a user to do it.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    for answer, score in zip(ANSWERS, scores, strict=True):
        ids = tokenizer.apply_chat_template(conversation(answer), return_dict=False)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids[-1] != end  # the template writes a line break after it
        ids = ids[: len(ids) - ids[::-1].index(end)]
        reward = (logit(model, ids) - model.config.reward_shift) / model.config.reward_scale
        assert score == pytest.approx(reward, abs=2e-5)


@pytest.mark.parametrize("pad", ["<s>", "<|im_start|>"])
def test_a_decoder_from_elsewhere_gets_its_template_and_pads_as_its_tokenizer(tmp_path, pad):
    """Its configuration may name another padding, at which transformers would look for the last token."""
    tokenizer = chat(pad_token=pad)
    save_classifier(tmp_path / "rm", tokenizer, pad_token_id=tokenizer.convert_tokens_to_ids("<s>"))
    scorer = load_scorer(str(tmp_path / "rm"), ScorerOptions())
    scores = scorer.score(rows_of(ANSWERS)).values
    messages = scorer.score([{"messages": conversation(answer)} for answer in ANSWERS]).values
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    for answer, score, of_messages in zip(ANSWERS, scores, messages, strict=True):
        expected = logit(model, tokenizer.apply_chat_template(conversation(answer), return_dict=False))
        assert score == pytest.approx(expected, abs=2e-6) and of_messages == score


def test_a_reward_model_without_padding_is_read_at_the_last_token(tmp_path):
    """As transformers reads a row alone, also where the conversation ends with the EOS."""
    tokenizer = chat()
    tokenizer.pad_token = None
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    save_classifier(tmp_path / "rm", tokenizer)
    scores = load_scorer(str(tmp_path / "rm"), ScorerOptions()).score(rows_of(ANSWERS)).values
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    for answer, score in zip(ANSWERS, scores, strict=True):
        ids = tokenizer.apply_chat_template(conversation(answer), return_dict=False)
        assert ids[-1] == tokenizer.eos_token_id and score == pytest.approx(logit(model, ids), abs=2e-6)


def test_a_beginning_and_its_continuation_are_one_message(tmp_path):
    tokenizer = chat()
    save_classifier(tmp_path / "rm", tokenizer, pad_token_id=tokenizer.pad_token_id)
    begun = [{"prompt": conversation("the film"), "completion": " was great"}]
    scorer = load_scorer(str(tmp_path / "rm"), ScorerOptions())
    assert scorer.score(begun).values == scorer.score(rows_of(["the film was great"])).values


def test_a_reward_model_does_not_pad_with_an_end_token(tmp_path):
    """A sample that ends with a further end token of the model is scored at that token, as it was trained."""
    tokenizer = chat(pad_token="<s>")
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    tiny_model("llama", vocab=len(tokenizer), context=128, eos_token_id=ends).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model, tokenizer, codec = load_reward_start(str(tmp_path / "lm"))
    assert model.config.pad_token_id == tokenizer.pad_token_id and tokenizer.pad_token_id not in ends
    assert codec.fingerprint == fingerprint(chat(pad_token="<s>"))
    for name, value in (("reward_shift", 0.0), ("reward_scale", 1.0)):
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    ids = [*codec.encode_prompts([Prompt(QUESTION)])[0], 70]
    row = {"prompt": QUESTION, "completion": "x", "finish": "stop", "tokenizer": codec.fingerprint}
    row |= {"prompt_ids": ids[:-1], "completion_ids": [70, ends[1]]}
    row["texts"] = [text_key(Prompt(QUESTION), ids[:-1], "x", [70, ends[1]])]
    [score] = load_scorer(str(tmp_path / "rm")).score([row]).values
    expected = last_token_rewards(model, [([*ids, ends[1]], len(ids) - 1)]).item()
    assert score == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("typed", [False, True])
def test_an_encoder_from_elsewhere_gets_prompt_and_completion_as_a_pair(tmp_path, typed):
    tokenizer = word_piece()
    if typed:  # as BERT's, which says of each token in which text it is
        ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, ends)
        names = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", model_input_names=names
        )
    torch.manual_seed(1)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **shape)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval().double()
    rows = [{"prompt": "is the film good?", "completion": answer} for answer in ANSWERS]
    for row, score in zip(rows, load_scorer(str(tmp_path / "rm")).score(rows).values, strict=True):
        with torch.no_grad():
            both = tokenizer(row["prompt"], row["completion"], return_tensors="pt")
            assert ("token_type_ids" in both) == typed
            expected = model(**both).logits[0, 0].item()
            joined = model(**tokenizer(row["prompt"] + row["completion"], return_tensors="pt")).logits[0, 0].item()
        assert score == pytest.approx(expected, abs=2e-6) and abs(score - joined) > 1e-4
