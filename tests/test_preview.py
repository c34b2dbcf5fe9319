"""preview shows what training uses: the same ids and the same trained tokens, for chats of several families."""

import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpoctl.cli.app import run
from dpoctl.data.counts import WORDS, in_words
from dpoctl.data.pieces import pieces
from dpoctl.reports.preview_facts import histogram
from dpoctl.reports.preview_text import visible
from dpoctl.training import loop
from helpers.chat_families import FAMILIES, save_family, tokenizer_of

CUT = ["--max-length", "56", "--max-prompt-length", "30"]
DROP = ["--max-length", "150", "--max-prompt-length", "100", "--overlong", "drop"]
ANSWERS = ["It is good.", "It was great, believe me: é 字!", "No.", "Not <|im_end|> or </s> or <|eot_id|> at all."]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def question(i: int) -> str:
    return " ".join(["Is the film good?", f"Number {i}."] + ["Tell me about the music."] * (i % 4 * 2))


CHATS = [
    {"messages": [user(question(i)), assistant(ANSWERS[i % 4])] * (1 + i % 3), "source": i, "finish": finish}
    for i, finish in enumerate(["stop", None, "length"] * 4)
]
TEXTS = [
    {"text": "The film was great. " * (1 + i % 5)} if i % 2 else {"prompt": question(i), "completion": " Yes, it is."}
    for i in range(8)
]
PAIRS = [
    {
        "prompt": [user(question(i))],
        "chosen": [assistant(ANSWERS[i % 4])] if i % 2 else ANSWERS[i % 4],
        "rejected": [assistant(ANSWERS[(i + (i != 5)) % 4])] if i % 2 else ANSWERS[(i + 1) % 4],
        "chosen_score": float(i % 3),
        "rejected_score": 1.0,
        "source": "web",
    }
    for i in [*range(12), 3]
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a family to the directory of its tiny model."""
    folder, made = tmp_path_factory.mktemp("families"), {}
    return lambda family: made.get(family) or made.setdefault(family, str(save_family(family, folder / family)))


@pytest.fixture
def write(tmp_path):
    """A function that writes rows to a file and returns its path."""

    def written(rows: list[dict], name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return written


@pytest.fixture
def preview(capsys):
    """A function from arguments to (exit code, stdout, stderr)."""

    def ran(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run(["preview", *argv])
        out, err = capsys.readouterr()
        return code, out, err

    return ran


@pytest.fixture
def shown(preview):
    """A function from arguments to what --json prints, all rows shown."""

    def found(*argv: str) -> dict:
        code, out, err = preview(*argv, "--json", "--rows", "999")
        assert code == 0, err
        return json.loads(out)

    return found


class _Stop(Exception):
    """The task is set up: nothing is trained."""


@pytest.fixture
def task(monkeypatch, tmp_path):
    """A function from a training command line to its task, ready to train."""
    tasks = []

    def capture(task) -> None:
        tasks.append(task)
        raise _Stop

    monkeypatch.setattr(loop, "train", capture)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def made(*argv: str):
        with pytest.raises(_Stop):
            run([*argv, "--device", "cpu", "--warmup-steps", "0", "--out", str(tmp_path / f"run{len(tasks)}")])
        return tasks[-1]

    return made


def sequences(found: dict) -> list[tuple[list[int], list[bool]]]:
    """(ids, whether each is trained on) of every sequence that preview shows."""
    result = []
    for row in found["shown"]:
        for sequence in row["sequences"]:
            kept = [part for part in sequence["parts"] if part["part"] != "cut"]
            mask = [part["part"] == "answer" for part in kept for _ in part["ids"]]
            assert sequence["tokens"] == len(mask) and sequence["trained"] == sum(mask)
            result.append(([id for part in kept for id in part["ids"]], mask))
    return result


def trained(examples) -> list[tuple[list[int], list[bool]]]:
    return [(e.ids, [False] * e.start + e.mask) for e in examples]


def of_pairs(data) -> list[tuple[list[int], list[bool]]]:
    found = []
    for i in (i for pair in data.pairs for i in pair):
        prompt, completion = data.prompts[data.prompt_of[i]], data.completions[i]
        found.append((prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return found


# --- what it says to be trained is what is trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [[], CUT, DROP, ["--answers", "last"]], ids=" ".join)
def test_sft(family, options, models, write, shown, task):
    data = write(CHATS)
    found = shown(data, "--model", models(family), *options)
    of_training = task("sft", "--model", models(family), "--data", data, *options)
    assert found["for"] == "sft"
    assert sequences(found) == trained(of_training.examples)
    assert any(any(mask) and not all(mask) for _, mask in sequences(found))
    for name in ("truncated", "dropped", "special_text", "duplicates"):
        assert found["counts"][name] == of_training.extra_metrics[name], name


@pytest.mark.parametrize("options", [[], CUT, [*CUT, "--overlong", "split"]], ids=" ".join)
def test_sft_on_texts(options, models, write, shown, task):
    data = write([row for row in TEXTS if "text" in row] if "split" in options else TEXTS)
    found = shown(data, "--model", models("gemma"), *options)
    assert sequences(found) == trained(task("sft", "--model", models("gemma"), "--data", data, *options).examples)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_sft_on_one_side_of_pairs(side, models, write, shown, task):
    data, options = write(PAIRS), ["--field", side, *CUT]
    found = shown(data, "--model", models("llama3"), *options)
    assert found["for"] == "sft"
    assert sequences(found) == trained(task("sft", "--model", models("llama3"), "--data", data, *options).examples)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [[], CUT], ids=" ".join)
def test_dpo(family, options, models, write, shown, task):
    data = write(PAIRS)
    found = shown(data, "--model", models(family), *options)
    of_training = task("train-dpo", "--model", models(family), "--data", data, *options).data
    assert found["for"] == "train-dpo" and sequences(found) == of_pairs(of_training)
    assert {name: found["counts"][name] for name in of_training.counts} == of_training.counts
    assert found["counts"]["equal_dropped"] == 1
    assert found["counts"]["duplicates"] == 1 or options  # what is cut may make more rows the same


def test_reward_model(models, write, shown, task):
    data = write(PAIRS)
    found = shown(data, "--model", models("gemma"), "--for", "train-rm", *CUT)
    of_training = task("train-rm", "--model", models("gemma"), "--data", data, *CUT)
    assert sorted(sequences(found)) == sorted(of_pairs(of_training.data) + of_pairs(of_training.held_out))


def test_ppo(models, write, shown, task, tmp_path):
    (tmp_path / "r.py").write_text("def r(rows):\n    return [0.0 for _ in rows]\n")
    data = write([{"prompt": row["prompt"]} for row in PAIRS])
    found = shown(data, "--model", models("chatml"), "--for", "train-ppo", *CUT[2:])
    reward = ["--reward", f"python:{tmp_path}/r.py:r", "--max-new-tokens", "8"]
    of_training = task("train-ppo", "--model", models("chatml"), "--prompts", data, *reward, *CUT[2:])
    assert [ids for ids, _ in sequences(found)] == of_training.prompts.ids
    assert found["counts"] == of_training.prompts.counts and found["counts"]["truncated"]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_with_what_is_cut_join_to_the_sequence_without_limits(family, models, write, shown):
    for rows in (CHATS, PAIRS):
        data = write(rows)
        limited, whole = (shown(data, "--model", models(family), *options) for options in (CUT, []))
        number = 0
        for row, full in zip(limited["shown"], whole["shown"], strict=True):
            for cut, other in zip(row["sequences"], full["sequences"], strict=True):
                parts = [part for part in cut["parts"] if part["part"] == "cut"]
                number += len(parts)
                joined = [[id for part in s["parts"] for id in part["ids"]] for s in (cut, other)]
                assert joined[0] == joined[1]
                texts = ["".join(part["text"] for part in s["parts"]) for s in (cut, other)]
                decoded = tokenizer_of(family).decode(joined[0], clean_up_tokenization_spaces=False)
                assert texts == [decoded, decoded]
        assert number


def test_answers_end_with_the_token_at_which_sampling_stops(models, write, shown):
    for family, end in (("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("mistral", "</s>")):
        found = shown(write(CHATS), "--model", models(family))
        end_id = tokenizer_of(family).convert_tokens_to_ids(end)
        answers = [p for row in found["shown"] for s in row["sequences"] for p in s["parts"] if p["part"] == "answer"]
        assert {part["ids"][-1] == end_id for part in answers if part["ended"]} == {True}
        assert sum(not part["ended"] for part in answers) == found["without_end"] == 4  # those of finish "length"
        assert repr(end) in found["ends"]


# --- the facts


def test_facts_of_a_file(models, write, shown):
    rows = [*PAIRS, {**PAIRS[0], "prompt": "Is it?", "rejected": "Never."}]
    data, held = write(rows), write([PAIRS[0], {**PAIRS[1], "prompt": [user("Another one?")]}], "held.jsonl")
    prompts = write([{"prompt": row["prompt"]} for row in PAIRS[:4]], "prompts.jsonl")
    found = shown(data, "--model", models("chatml"), *CUT, "--eval-data", held, "--eval-prompts", prompts)
    assert found["rows"] == 14 and found["shapes"].keys() == {
        "prompt, chosen, rejected as messages",
        "prompt as messages, chosen as text, rejected as text",
        "prompt, chosen, rejected as text",
    }
    assert found["columns"]["used"] == {"prompt": 14, "chosen": 14, "rejected": 14}
    assert found["columns"]["ignored"] == {"chosen_score": 14, "rejected_score": 14, "source": 14}
    scores = [(row["chosen_score"], row["rejected_score"]) for row in rows]
    assert (found["scored"], found["ties"]) == (14, sum(a == b for a, b in scores))
    assert found["misordered"] == sum(a < b for a, b in scores)
    assert found["repeated_prompts"] == {held: {"rows": 2, "repeated": 1}, prompts: {"rows": 4, "repeated": 4}}
    total = found["lengths"]["total"]
    assert total["over"] and found["counts"]["truncated"] and total["max"] > 56
    assert (
        sum(n for _, _, n in total["histogram"]) == 26  # without the pair that is dropped
        and sum(n for _, _, n in found["lengths"]["prompt"]["histogram"]) == 13
    )


def test_columns_that_are_ignored_change_nothing_and_those_that_are_used_do(models, write, shown):
    for rows in (CHATS, PAIRS):
        found = shown(write(rows), "--model", models("llama3"))
        ignored = found["columns"]["ignored"]
        assert ignored
        bare = [{name: value for name, value in row.items() if name not in ignored} for row in rows]
        again = shown(write(bare), "--model", models("llama3"))
        assert again["shown"] == found["shown"] and not again["columns"]["ignored"]
    finished = [{name: value for name, value in row.items() if name != "finish"} for row in CHATS]
    assert (
        shown(write(finished), "--model", models("llama3"))["shown"]
        != shown(write(CHATS), "--model", models("llama3"))["shown"]
    )


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_a_histogram_counts_every_value_once_in_at_most_eight_bins(values):
    bins = histogram(values)
    assert 1 <= len(bins) <= 8 and sum(n for _, _, n in bins) == len(values)
    assert all(n == sum(low <= value <= high for value in values) for low, high, n in bins)
    assert [low for low, _, _ in bins[1:]] == [high + 1 for _, high, _ in bins[:-1]]


# --- refusals


def test_a_file_that_training_refuses_is_shown_and_then_refused(models, write, preview):
    rows = [*PAIRS[:3], {**PAIRS[3], "prompt": [{"role": "system", "content": "Be brief."}, user("Why?")]}]
    data = write([*rows, {"prompt": "no answers"}])
    code, out, err = preview(data, "--model", models("gemma"))
    assert code == 2 and "rows.jsonl:5: field 'chosen'" in err
    assert "System role not supported" in out and "skipped" in out and "rows.jsonl:1" in out
    code, out, err = preview(data, "--model", models("gemma"), "--skip-bad-rows", "--row", "4")
    assert code == 0 and "rows.jsonl:4: not used: the chat template refuses" in out
    code, _, err = preview(data, "--model", models("gemma"), "--skip-bad-rows", "--row", "5")
    assert code == 2 and "no row is used at line 5" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--answers", "last"], "--answers has no effect with --for train-dpo"),
        (["--for", "sample", "--max-length", "9"], "--max-length has no effect with --for sample"),
        (["--for", "sft"], "--field chosen"),
        (["--rows", "2", "--row", "2"], "--rows has no effect with --row"),
        (["--max-length", "9", "--max-prompt-length", "9"], "leaves no room"),
        (["--max-length", "56"], "--max-prompt-length 256 leaves no room within --max-length 56"),
        (["--chat-template-kwargs", "{"], "expected a JSON object"),
    ],
)
def test_options_without_effect_and_rows_of_another_kind_are_refused(argv, said, models, write, preview):
    code, _, err = preview(write(PAIRS), "--model", models("chatml"), *argv)
    assert code == 2 and said in " ".join(err.split())


def test_what_rows_are_for_is_found_in_them(models, write, preview):
    for row, purpose in (
        (PAIRS[0], "train-dpo"),
        (CHATS[0], "sft"),
        ({"text": "A film."}, "sft"),
        ({"prompt": "A film"}, "sample"),
    ):
        code, out, _ = preview(write([row]), "--model", models("chatml"))
        assert code == 0 and f"rows.jsonl for {purpose}, as its fields suggest" in out
    code, _, err = preview(write([{"a": 1}]), "--model", models("chatml"))
    assert code == 2 and "neither preferences, texts nor prompts" in err
    code, _, err = preview("absent.jsonl", "--model", models("chatml"))
    assert code == 2 and err.count("absent.jsonl") == 1


# --- on the terminal


def test_marks_without_colour(models, write, preview):
    code, out, _ = preview(write(CHATS), "--model", models("llama3"), "--row", "2", "--ids")
    assert code == 0 and "\x1b" not in out
    tokenizer = tokenizer_of("llama3")
    marked = re.findall(r"\[(.+?) (\d+)\]", out, re.S)
    assert "prompt:" in out and "answer 1 of 2" in out and "between:" in out and "ends with '<|eot_id|>'" in out
    ids = [int(id) for _, id in marked]
    assert tokenizer.decode(ids) == f"{ANSWERS[1]}<|eot_id|>" * 2
    assert f"|<|begin_of_text|> {tokenizer.bos_token_id}|" in out


def test_colour_on_a_terminal_unless_no_color_is_set(models, write, preview, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = preview(write(CHATS), "--model", models("gemma"), *CUT)
    assert "\x1b[" in out and "|<s>|" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = preview(write(CHATS), "--model", models("gemma"), *CUT)
    assert "\x1b[3" not in out and "\x1b[4" not in out and "|<s>|" in out and "{" in out


def test_signs_for_what_cannot_be_seen():
    assert visible("a\tb\n\x1b[31m\u200b字 ") == "a⇥b⏎\n\\x1b[31m\\u200b字 "


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), max_size=40))
@pytest.mark.parametrize("family", ["llama3", "gemma", "mistral"])
def test_pieces_of_text_join_to_the_text(family, text):
    tokenizer = tokenizer_of(family)
    ids = tokenizer(text)["input_ids"]
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


# --- the same counts in the log of training


def test_training_logs_the_counts_in_one_line(models, write, task, capsys):
    task("train-dpo", "--model", models("chatml"), "--data", write(PAIRS), *CUT)
    [line] = [line for line in capsys.readouterr().err.splitlines() if "truncated" in line]
    assert "1 dropped as equal completions" in line and "spell a special token" in line


def test_counts_in_words():
    assert in_words(dict.fromkeys(WORDS, 0)) == ""
    assert in_words({"truncated": 3, "refused": 1, "rows": 9}) == "3 truncated, 1 refused by the chat template"
