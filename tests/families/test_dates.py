"""A chat template that writes today's date: one date in one output, whatever the day on which a part was made."""

import datetime
import json

import pytest

from dpoctl.data.chats import Prompt, TemplateOptions
from dpoctl.data.codec import Codec
from dpoctl.inference import options
from families import zoo
from families.chain import Chain

QUESTION = [{"role": "user", "content": "Is the garden good?"}]


@pytest.fixture
def chain(tmp_path, monkeypatch) -> Chain:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Chain("llama3-dated", tmp_path)


@pytest.fixture
def on(monkeypatch):
    """Sets the day of today."""

    def set_day(text: str) -> None:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date.fromisoformat(text)

        monkeypatch.setattr(options, "date", Day)

    return set_day


def shown(chain: Chain, rows: list[dict]) -> set[str]:
    """What the prompts of chats say of the date."""
    texts = [chain.tokenizer.decode(row["prompt_ids"]) for row in rows if isinstance(row["prompt"], list)]
    return {text.split("Today is ")[1].split(".")[0] for text in texts}


SAMPLE = "sample --model base --prompts prompts.jsonl --max-new-tokens 3 --generation-batch-size 2"


def test_shards_of_two_days_are_not_merged(chain, on, capsys):
    on("2026-02-28")
    chain.run(f"{SAMPLE} --shard 1/2 --out 1.jsonl")
    on("2026-03-01")
    chain.run(f"{SAMPLE} --shard 2/2 --out 2.jsonl")
    capsys.readouterr()
    chain.run("merge 1.jsonl 2.jsonl --out merged.jsonl", code=2)
    told = capsys.readouterr().err
    assert "2026-02-28" in told and "2026-03-01" in told and not (chain.folder / "merged.jsonl").exists()

    chain.run(f"{SAMPLE} --shard 2/2 --template-date 2026-02-28 --out 2.jsonl --overwrite", code=0)
    chain.run(f"{SAMPLE} --shard 1/2 --template-date 2026-02-28 --out 1.jsonl --overwrite", code=0)
    chain.run("merge 1.jsonl 2.jsonl --out merged.jsonl")
    assert shown(chain, chain.rows("merged.jsonl")) == {"28 Feb 2026"}


def test_a_run_that_goes_on_another_day_keeps_its_date(chain, on):
    on("2026-02-28")
    chain.run(f"{SAMPLE} --out whole.jsonl")
    assert shown(chain, chain.rows("whole.jsonl")) == {"28 Feb 2026"}
    on("2026-03-01")
    chain.run(f"{SAMPLE} --out whole.jsonl")  # nothing is left to do
    assert shown(chain, chain.rows("whole.jsonl")) == {"28 Feb 2026"}
    manifest = json.loads((chain.folder / "whole.jsonl.manifest.json").read_text())
    assert manifest["identity"]["started-on"] == "2026-02-28"


@pytest.mark.parametrize("format", ["%d %b %Y", "%B %-d, %Y", "%A, %d/%m/%y", "100%% on %j"])
def test_formats(format):
    """As the clock of transformers writes them."""
    day = datetime.date(2024, 1, 5)
    tokenizer = zoo.FAMILIES["llama3-dated"].tokenizer()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{% set today = strftime_now('" + format + "') %}{% endif %}"
        "{{ today }}: {{ messages[0]['content'] }}"
    )
    template = Codec(tokenizer, (), TemplateOptions(today=lambda: day)).template
    assert template.conversation_text(Prompt(QUESTION)) == f"{day.strftime(format)}: Is the garden good?"
    now = datetime.date.today()
    template = Codec(tokenizer).template
    assert template.conversation_text(Prompt(QUESTION)) in (
        tokenizer.apply_chat_template(QUESTION, tokenize=False),
        f"{now.strftime(format)}: Is the garden good?",
    )
