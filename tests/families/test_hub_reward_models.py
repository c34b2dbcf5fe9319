"""Reward models in the style of model cards, without dpoctl's mark: the ids of apply_chat_template, whatever pads."""

import pytest
import torch
import transformers as hf

from dpoctl.inference.scorers import load_scorer
from families import reference, zoo
from families.chain import assistant, takes_system, user

ANSWERS = ("It is old.", "Nobody knows; ask again tomorrow.", "Yes")
# float32 against float64 over sums of 32 products; rewards are of size 1
CLOSE = 2e-5


def save(name: str, folder, pad: int | None) -> None:
    """A classifier with one label, whose configuration pads with `pad`."""
    zoo.save(name, folder, seed=2)
    torch.manual_seed(5)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.config.pad_token_id = pad
    model.save_pretrained(folder)
    zoo.tokenizer_of(name).save_pretrained(folder)


def chats(name: str) -> list[list[dict]]:
    start = [{"role": "system", "content": "Be brief."}] if takes_system(name) else []
    return [[*start, user("Is the garden good?")], [user("Tell me."), assistant("It is blue."), user("And 日本?")]]


@pytest.mark.parametrize("name", zoo.CHATS)
def test_conversations(name, tmp_path):
    tokenizer = zoo.tokenizer_of(name)
    whole = [[*chat, assistant(answer)] for chat in chats(name) for answer in ANSWERS]
    ids = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in whole]
    wrong = ids[0][-3]  # a token of the text: everything up to it would be padding
    save(name, tmp_path / "rm", wrong if tokenizer.pad_token_id is not None else None)
    model = reference.load_reward_model(tmp_path / "rm")
    model.config.pad_token_id = tokenizer.pad_token_id
    expected = [reference.reward(model, each) for each in ids]

    scorer = load_scorer(str(tmp_path / "rm"))
    rows = [{"prompt": messages[:-1], "completion": messages[-1]["content"]} for messages in whole]
    assert scorer.score(rows).values == pytest.approx(expected, abs=CLOSE)
    assert scorer.score([{"messages": messages} for messages in whole]).values == pytest.approx(expected, abs=CLOSE)
    assert scorer.score([{"text": messages} for messages in whole[:1]]).values  # joined, as text of a list
    assert max(expected) - min(expected) > 100 * CLOSE


@pytest.mark.parametrize("name", ["llama3-base", "gemma-base", "mistral-base", "neox", "gpt2"])
def test_texts(name, tmp_path):
    tokenizer = zoo.tokenizer_of(name)
    save(name, tmp_path / "rm", tokenizer.pad_token_id)
    model = reference.load_reward_model(tmp_path / "rm")
    rows = [{"prompt": "The kettle", "completion": f" is blue. {answer}"} for answer in ANSWERS]
    expected = [reference.reward(model, tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    assert load_scorer(str(tmp_path / "rm")).score(rows).values == pytest.approx(expected, abs=CLOSE)


def test_padding_of_the_configuration_where_the_tokenizer_has_none(tmp_path):
    """A model that was trained with its EOS as padding reads the token before it."""
    tokenizer = zoo.tokenizer_of("mistral")
    save("mistral", tmp_path / "rm", tokenizer.eos_token_id)
    model = reference.load_reward_model(tmp_path / "rm")
    whole = [[user("Is the garden good?"), assistant(answer)] for answer in ANSWERS]
    ids = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in whole]
    expected = [reference.reward(model, each) for each in ids]
    assert expected == pytest.approx([reference.reward(model, each[:-1]) for each in ids], abs=1e-9)
    found = load_scorer(str(tmp_path / "rm")).score([{"messages": messages} for messages in whole]).values
    assert found == pytest.approx(expected, abs=CLOSE)
