"""make-prefs on samples that exist (files, any judge, votes of several people), and judge --within."""

import itertools
import json
import math
import random
import re
import time

import pytest

from dpoctl.config.make_prefs import MakePrefs
from dpoctl.data.samples import Reading, SampleFiles
from dpoctl.inference.pairing import preference
from dpoctl.judging.judges import open_judge
from dpoctl.judging.pairs import decision_of
from helpers.chain import lines_in
from helpers.engines import use_ahead
from helpers.judge_server import JudgeServer
from helpers.judging import KEY, fenced, rows_of, write
from helpers.samples_to_pair import caller, enter, samples


@pytest.fixture
def here(tmp_path, monkeypatch):
    return enter(tmp_path, monkeypatch)


@pytest.fixture
def run(here, capsys):
    return caller(capsys)


def order(rows: list[dict]) -> set[tuple[str, str]]:
    return {(row["chosen"], row["rejected"]) for row in rows}


def metrics(path) -> dict:
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["metrics"]


BY_WORDS = {("a b", "a"), ("a b c", "a"), ("a b c", "a b"), ("x y", "x"), ("z w", "x")}


# --- files of samples ------------------------------------------------------------------------------------------------


def test_samples_of_a_file_are_scored_and_paired(here, run):
    run("make-prefs --samples s.jsonl --scorer python:words.py:words --out p.jsonl --completions-out scored.jsonl")
    rows = rows_of(here / "p.jsonl")
    assert order(rows) == BY_WORDS
    assert rows[1] == {
        **{"prompt_id": "p0", "prompt": "Say p0", "chosen": "a b c", "chosen_score": 3.0, "chosen_k": 2},
        **{"chosen_finish": "stop", "rejected": "a", "rejected_score": 1.0, "rejected_k": 0},
        **{"rejected_finish": "stop", "margin": 2.0},
    }
    made = metrics(here / "p.jsonl")
    assert (made["ties"], made["duplicates"], made["pairs"], made["samples"]) == (1, 1, 5, 8)
    assert made["mean_length"] is None and made["ended"] == 1.0
    run("make-prefs --samples scored.jsonl --out own.jsonl")  # by the rows' own scores
    assert rows_of(here / "own.jsonl") == rows


def test_without_a_scorer_every_row_has_a_score(here, run):
    said = run("make-prefs --samples s.jsonl --out p.jsonl", code=2)
    assert "s.jsonl:1: field 'score': missing" in said and "--scorer" in said
    assert sorted(path.name for path in here.iterdir()) == ["s.jsonl", "words.py"]


def test_files_without_prompt_ids_are_grouped_by_prompt(here):
    one = [{"prompt": f"P{i}", "completion": f"a{i}", "k": 3} for i in range(3)]
    two = [{"prompt": f"P{i}", "completion": f"b{i}", "k": 3} for i in (2, 0, 1, 0)]
    chat = [{"prompt": [{"role": "user", "content": "P1"}], "completion": "c"} for _ in range(2)]
    files = SampleFiles([write(here / "1.jsonl", one), write(here / "2.jsonl", two + chat)], Reading())
    groups = list(files.groups(slice(0, 4)))
    assert [[row["completion"] for row in rows] for rows in groups] == [
        ["a0", "b0", "b0"],
        ["a1", "b1"],
        ["a2", "b2"],
        ["c", "c"],
    ]
    assert [(row["k"], row["source_k"]) for row in groups[0]] == [(0, 3), (1, 3), (2, 3)]
    assert [row["k"] for row in groups[3]] == [0, 1] and len({rows[0]["prompt_id"] for rows in groups}) == 4
    named = [{"prompt_id": 7, "prompt": "P0", "completion": "n"}, {"prompt_id": 8, "prompt": "P0", "completion": "m"}]
    files = SampleFiles([write(here / "3.jsonl", named), "2.jsonl"], Reading())
    assert files.ids[:2] == ["7", "8"] and files.sizes[:2] == [3, 1]  # rows without an id join the first with the text


def test_every_order_of_rows_gives_the_same_groups(here):
    rows = [{"prompt_id": f"p{i % 5}", "prompt": f"P{i % 5}", "completion": str(i)} for i in range(40)]
    for seed in range(6):
        draw = random.Random(seed)
        draw.shuffle(rows)
        paths = [write(here / f"{n}.jsonl", rows[n::3]) for n in range(3)]
        files = SampleFiles(paths, Reading())
        whole = list(files.groups(slice(0, 5)))
        parts = [group for at in range(5) for group in files.groups(slice(at, at + 1))]
        assert whole == parts and sum(map(len, whole)) == 40
        assert {row["completion"] for row in whole[0]} == {
            row["completion"] for row in rows if row["prompt_id"] == whole[0][0]["prompt_id"]
        }


def test_ids_of_samples_are_carried_and_those_of_edited_texts_are_not(prefs, run, here):
    rows = rows_of(prefs.folder / "samples.jsonl")
    rows[1]["completion"] += " edited"
    write(here / "kept.jsonl", rows)
    said = run("make-prefs --samples kept.jsonl --out p.jsonl")
    assert "1 samples were edited" in said
    by_text = {(row["prompt_id"], row["completion"]): row for row in rows}
    made = rows_of(here / "p.jsonl")
    assert len(made) > 100
    for pair in made:
        chosen, rejected = (by_text[pair["prompt_id"], pair[side]] for side in ("chosen", "rejected"))
        if rows[1] in (chosen, rejected):
            assert not {"prompt_ids", "chosen_ids", "tokenizer", "texts"} & set(pair)
        else:
            assert (pair["chosen_ids"], pair["rejected_ids"]) == (chosen["completion_ids"], rejected["completion_ids"])
            assert pair["texts"] == chosen["texts"] + rejected["texts"]
    write(here / "same.jsonl", rows_of(prefs.folder / "samples.jsonl"))
    run("make-prefs --samples same.jsonl --out same-pairs.jsonl")
    left = ("chosen_score", "rejected_score", "margin")  # a probability that saturates ties where its log-odds do not
    plain = [{k: v for k, v in row.items() if k not in left} for row in rows_of(prefs.folder / "prefs.jsonl")]
    assert [{k: v for k, v in row.items() if k not in left} for row in rows_of(here / "same-pairs.jsonl")] == plain


def test_ids_of_two_tokenizers_are_not_put_into_one_pair():
    one = {"prompt_id": "p", "prompt": "P", "prompt_ids": [1], "tokenizer": "t", "finish": "stop"}
    a, b = (one | {"completion": text, "completion_ids": [n], "texts": [text], "k": n} for n, text in enumerate("ab"))
    assert preference(a, b)["chosen_ids"] == [0] and preference(a, b)["rejected_ids"] == [1]
    for other in ({"tokenizer": "u"}, {"prompt_ids": [2]}, {"completion_ids": None}):
        assert not {"prompt_ids", "chosen_ids", "rejected_ids", "tokenizer"} & set(preference(a, b | other))


def test_a_limit_is_of_prompts(here, run):
    run("make-prefs --samples s.jsonl --scorer python:words.py:words --limit 1 --out p.jsonl")
    assert {row["prompt_id"] for row in rows_of(here / "p.jsonl")} == {"p0"} and len(rows_of(here / "p.jsonl")) == 3
    run("judge --within s.jsonl --backend scorer --scorer python:words.py:words --out j.jsonl")
    for more in ("", "--samples s.jsonl"):
        run(f"make-prefs --judgements j.jsonl --limit 1 --out p.jsonl --overwrite {more}")
        assert {row["prompt_id"] for row in rows_of(here / "p.jsonl")} == {"p0"}
        assert metrics(here / "p.jsonl")["prompts"] == 1


def test_shards_of_samples_merge_to_the_bytes_of_one_run(here, run):
    write(here / "many.jsonl", samples({f"p{i}": [str(i), f"{i} b", "c d e"][: 2 + i % 2] for i in range(9)}))
    made = "make-prefs --samples many.jsonl --scorer python:words.py:words --pairs random"
    run(f"{made} --out whole.jsonl")
    for number in (1, 2, 3):
        run(f"{made} --out {number}.jsonl --shard {number}/3")
    run("merge 1.jsonl 2.jsonl 3.jsonl --out joined.jsonl")
    assert (here / "joined.jsonl").read_bytes() == (here / "whole.jsonl").read_bytes()
    assert metrics(here / "joined.jsonl") == metrics(here / "whole.jsonl")


@pytest.mark.parametrize(
    ("rows", "args", "said"),
    [
        ([{"prompt": "P", "completion": "a"}, {"prompt": "Q", "completion": "b"}], "", "no prompt has two samples"),
        (
            [{"prompt_id": 1, "prompt": p, "completion": "a"} for p in "PQ"],
            "",
            "b.jsonl:2: field 'prompt': another one for prompt_id '1'",
        ),
        ([{"prompt": "P", "completion": 3}], "", "b.jsonl:1: field 'completion'"),
        ([{"prompt": "P", "completion": "a", "k": -1}], "", "b.jsonl:1: field 'k'"),
        ([{"prompt": "P", "completion": "a"}] * 2, "--samples b.jsonl", "b.jsonl: given twice"),
        ([{"prompt": "P", "completion": "a"}] * 2, "--model lm", "--model has no effect with --samples"),
        ([{"prompt": "P", "completion": "a"}] * 2, "--temperature 0.5", "--temperature has no effect with --samples"),
        ([{"prompt": "P", "completion": "a"}] * 2, "--completions 8", "--completions has no effect with --samples"),
        ([{"prompt": "P", "completion": "a"}] * 2, "--samples none.jsonl", "none.jsonl: "),
        ([{"prompt": "P", "completion": "a"}] * 2, "--completions-out b.jsonl", "b.jsonl is also an input"),
    ],
)
def test_bad_samples_are_refused_and_nothing_is_left(here, run, rows, args, said):
    write(here / "b.jsonl", rows)
    assert said in run(f"make-prefs --samples b.jsonl --scorer python:words.py:words --out p.jsonl {args}", code=2)
    assert not list(here.glob("p.jsonl*"))


def test_a_model_and_prompts_are_required_without_samples(run):
    said = run("make-prefs --out p.jsonl", code=2)
    assert "--model is required without --samples and --judgements" in said and "--prompts is required" in said
    assert "--judge-model is required with --judge openai" in run(
        "make-prefs --samples s.jsonl --judge openai --out p.jsonl", code=2
    )


# --- a judge ---------------------------------------------------------------------------------------------------------


def longer(text: str) -> str:
    _, a, b = (len(part.split()) for part in fenced(text))
    return "I cannot say." if {a, b} == {1, 3} else f"Preferred: {'A' if a >= b else 'B'}"  # a tie depends on the order


def judged(server, more: str = "") -> str:
    asked = f"--judge openai --judge-model m --judge-base-url {server.url} --judge-retries 1"
    return f"make-prefs --samples s.jsonl {asked} --out p.jsonl {more}"


def test_a_judge_on_a_server_decides(here, run):
    with JudgeServer(longer) as server:
        said = run(judged(server, "--price-in 1 --price-out 1"))
        assert server.keys == {f"Bearer {KEY}"} and max(server.served.values()) == 1
        assert len(server.served) == 12  # 3 + 3 pairs in both orders; equal texts are not asked about
    rows = rows_of(here / "p.jsonl")
    assert order(rows) == BY_WORDS - {("a b c", "a")}
    assert {(row["chosen_share"], row["votes"]) for row in rows} == {(1.0, 1)} and "margin" not in rows[0]
    made = metrics(here / "p.jsonl")
    assert [made[name] for name in ("ties", "invalid", "duplicates", "pairs")] == [1, 1, 1, 4]
    cost = json.loads((here / "p.jsonl.manifest.json").read_text())["cost"]
    assert cost["asked"] == 12 and cost["dollars"] == pytest.approx(12 * 110 / 1e6)
    assert "1 without a valid verdict" in said
    for file in here.rglob("*"):
        assert not file.is_file() or KEY not in file.read_text(errors="replace")


def test_best_worst_is_by_wins_and_random_asks_about_one_pair(here, run):
    texts = {"p0": ["a", "a b", "a b c d e", "a b c d"]}
    write(here / "s.jsonl", samples(texts))
    with JudgeServer(longer) as server:
        run(judged(server, "--pairs best-worst"))
        assert order(rows_of(here / "p.jsonl")) == {("a b c d e", "a")}
        assert metrics(here / "p.jsonl")["not_picked"] == 5
        asked = sum(server.served.values())
        run(judged(server, "--pairs random --overwrite --judge-cache-dir other"))
        assert sum(server.served.values()) == asked + 2
        assert metrics(here / "p.jsonl")["not_picked"] == 5 and len(rows_of(here / "p.jsonl")) == 1


def test_a_rerun_asks_only_for_what_is_missing(here, run):
    class Stubborn(JudgeServer):
        healthy = False

        def fault_of(self, text):
            return "500" if "x y" in text and not self.healthy else None

    with Stubborn(longer) as server:
        said = run(judged(server), code=75)
        assert "4 judgements are pending" in said and not (here / "p.jsonl").exists()
        server.healthy = True
        run(judged(server))
        assert max(server.served.values()) == 1 and sum(server.served.values()) == 12
    assert order(rows_of(here / "p.jsonl")) == BY_WORDS - {("a b c", "a")}


def test_a_cost_limit_and_a_wrong_key_are_told_with_this_commands_options(here, run):
    with JudgeServer(longer) as server:
        said = run(judged(server, "--price-in 100 --price-out 100 --max-cost 0.05 --judge-concurrency 1"), code=2)
        assert "--max-cost 0.05 is reached" in said
        run(judged(server, "--price-in 100 --price-out 100 --max-cost 9"))
        assert sum(server.served.values()) == 12
    with JudgeServer(longer, status=404) as server:
        said = run(judged(server, "--overwrite --judge-cache-dir other"), code=2)
        assert "404 and 400: --judge-model, --judge-base-url, --judge-max-tokens" in said


def test_the_scorer_as_judge_gives_the_pairs_of_the_scorer(prefs):
    """In both ways on the same samples of the same model, with the same token ids."""
    made = "make-prefs --model sft --prompts train.jsonl --scorer classifier --max-new-tokens 20"
    prefs.run(f"{made} --generation-batch-size 16 --judge scorer --completions-out again.jsonl --out judged.jsonl")
    left = ("chosen_score", "rejected_score", "margin", "chosen_share", "votes")
    by_score, by_judge = (
        [{k: v for k, v in row.items() if k not in left} for row in prefs.rows(name)]
        for name in ("prefs.jsonl", "judged.jsonl")
    )
    assert by_judge == by_score and len(by_judge) > 100
    assert not list(prefs.folder.glob("judged.jsonl.*partial*")) and not list(
        prefs.folder.glob("judged.jsonl.samples*")
    )
    prefs.run("make-prefs --samples again.jsonl --scorer classifier --judge scorer --pairs best-worst --out best.jsonl")
    prefs.run("make-prefs --samples again.jsonl --scorer classifier --pairs best-worst --out best-scored.jsonl")
    assert order(prefs.rows("best.jsonl")) == order(prefs.rows("best-scored.jsonl"))


def test_an_engine_is_closed_before_a_scorer_judges(prefs, here, run, monkeypatch):
    """An engine that holds the device: samples are made first, and a scorer that cannot be used is refused before."""
    ahead = use_ahead(monkeypatch.setattr)
    for name in ("sft", "classifier", "test.jsonl"):
        (here / name).symlink_to(prefs.folder / name)
    made = "make-prefs --model sft --prompts test.jsonl --limit 3 --completions 2 --max-new-tokens 4 --engine vllm"
    assert "has no function f" in run(f"{made} --judge scorer --scorer python:words.py:f --out p.jsonl", code=2)
    assert [engine.calls for engine in ahead.opened] == [0]
    (here / "long.py").write_text("def f(rows):\n    return [float(len(r['completion'])) for r in rows]\n")
    run(f"{made} --judge scorer --scorer python:long.py:f --out p.jsonl")
    assert ahead.opened[-1].calls == 1 and ahead.opened[-1].closed
    run(f"{made} --scorer python:long.py:f --out q.jsonl")
    assert order(rows_of(here / "p.jsonl")) == order(rows_of(here / "q.jsonl")) and rows_of(here / "q.jsonl")


def test_the_policys_chat_template_is_not_the_scorers(here):
    (here / "t.jinja").write_text("{{ messages[0].content }}")
    given = {"chat_template": "t.jinja", "scorer": "python:words.py:words", "template_date": "2026-01-31"}
    judge = open_judge("scorer", MakePrefs(out="p.jsonl", **given), {}, None)
    assert judge.scorer.options.templates.template is None


@pytest.mark.slow
def test_a_killed_run_samples_and_asks_nothing_twice(prefs):
    """The samples are kept, and answers are cached: only requests in flight may be made again."""

    def longest(text: str) -> str:
        time.sleep(0.02)
        _, a, b = map(len, fenced(text))
        return f"Preferred: {'A' if a >= b else 'B'}"

    with JudgeServer(longest) as server:
        made = "make-prefs --model sft --prompts test.jsonl --completions 3 --max-new-tokens 8 --judge openai"
        made += f" --judge-model m --judge-base-url {server.url} --judge-concurrency 2 --out killed.jsonl"
        prefs.kill(made, when=lambda: sum(server.served.values()) > 30)
        kept = prefs.folder / "killed.jsonl.samples.partial"
        samples = kept.read_bytes()
        assert lines_in(kept) == 36 and not (prefs.folder / "killed.jsonl").exists()
        _, said = prefs.run(made)
        assert "killed.jsonl.samples: resuming after 36 rows" in said
        assert 30 < sum(server.served.values()) <= 72 + 2 and not kept.exists()
    texts = {json.loads(line)["completion"] for line in samples.splitlines()}
    pairs = prefs.rows("killed.jsonl")
    assert pairs and {row[side] for row in pairs for side in ("chosen", "rejected")} <= texts
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in pairs)


# --- judgements ------------------------------------------------------------------------------------------------------


def test_judge_within_a_file_and_pairs_from_its_judgements(here, run):
    run("judge --within s.jsonl --backend scorer --scorer python:words.py:words --out j.jsonl")
    rows = rows_of(here / "j.jsonl")
    assert [(row["prompt_id"], row["k"], row["b_k"], row["order"]) for row in rows[:4]] == [
        ("p0", 0, 1, "AB"),
        ("p0", 0, 1, "BA"),
        ("p0", 0, 2, "AB"),
        ("p0", 0, 2, "BA"),
    ]
    assert len(rows) == 12
    run("make-prefs --judgements j.jsonl --out texts.jsonl")
    assert order(rows_of(here / "texts.jsonl")) == BY_WORDS
    assert metrics(here / "texts.jsonl")["ties"] == 1 and rows_of(here / "texts.jsonl")[0]["chosen_share"] == 1.0
    run("make-prefs --judgements j.jsonl --samples s.jsonl --out p.jsonl")
    made = rows_of(here / "p.jsonl")
    assert order(made) == BY_WORDS and {(row["chosen_k"], row["chosen_finish"]) for row in made} > {(2, "stop")}
    made = [(row["chosen_k"], row["rejected_k"]) for row in made if row["prompt_id"] == "p0"]
    assert made == [(1, 0), (2, 0), (2, 1)]
    twice = [row | {"k": k, "finish": "length"} for k, row in ((3, row) for row in samples() if row["k"] == 1)]
    write(here / "more.jsonl", [*twice, *samples()])  # the first sample with a text is not the one that was judged
    run("make-prefs --judgements j.jsonl --samples more.jsonl --out p.jsonl --overwrite")
    assert {row[f"{side}_finish"] for row in rows_of(here / "p.jsonl") for side in ("chosen", "rejected")} == {"stop"}
    said = run("report j.jsonl --out report", code=2)
    assert "samples of one file" in said


def test_the_judges_answers_serve_both_commands(here, run):
    with JudgeServer(longer) as server:
        run(f"judge --within s.jsonl --model m --base-url {server.url} --out j.jsonl")
        asked = sum(server.served.values())
        run(judged(server))
        assert sum(server.served.values()) == asked == 12
    run("make-prefs --judgements j.jsonl --out texts.jsonl")
    assert order(rows_of(here / "texts.jsonl")) == order(rows_of(here / "p.jsonl"))


def ballot(prompt: str, a: str, b: str, verdict: str, judge: str, k: int = 0, **more) -> dict:
    row = {"prompt_id": prompt, "k": k, "prompt": f"Say {prompt}", "a": a, "b": b, "order": "AB", "verdict": verdict}
    return row | {"criterion": "helpful", "temperature": None, "judge": judge, "raw": ""} | more


def test_votes_of_people_and_judges_become_shares(here, run):
    """Three people in one file, a judge in both orders in another, which shows the two texts the other way round."""
    people = [ballot("p0", "good", "bad", verdict, f"human:{n}") for n, verdict in enumerate(("a", "a", "b"))]
    people += [ballot("p1", "x", "y", verdict, f"human:{n}") for n, verdict in enumerate(("a", "b", "invalid"))]
    people += [ballot("p2", "u", "v", "invalid", "human:0"), ballot("p3", "u", "v", "b", "human:0")]
    people += [ballot("p3", "canary", "v", "a", "human:0", canary=True)]
    model = [ballot("p0", "bad", "good", "b", "m", order=o) for o in ("AB", "BA")]
    model += [ballot("p3", "u", "v", verdict, "m", order=o) for verdict, o in (("a", "AB"), ("b", "BA"))]
    write(here / "people.jsonl", people)
    write(here / "model.jsonl", model)
    run("make-prefs --judgements people.jsonl --judgements model.jsonl --out p.jsonl")
    rows = rows_of(here / "p.jsonl")
    assert [(row["chosen"], row["chosen_share"], row["votes"]) for row in rows] == [("good", 0.75, 4), ("v", 0.75, 2)]
    made = metrics(here / "p.jsonl")
    assert (made["ties"], made["invalid"], made["pairs"]) == (1, 1, 2)


def test_a_judge_has_one_vote_on_two_texts(here, run):
    """Whatever the number of samples with these texts, and whichever was sampled first."""
    write(here / "s.jsonl", samples({"p0": ["u", "v v", "u", "v v"], "p1": ["x", "y", "x"]}))
    run("judge --within s.jsonl --backend scorer --scorer python:words.py:words --out j.jsonl")
    write(here / "one.jsonl", [ballot("p0", "u", "v v", "a", "m"), ballot("p1", "y", "x", "b", "m")])
    for more in ("", "--samples s.jsonl"):
        run(f"make-prefs --judgements j.jsonl --judgements one.jsonl --out p.jsonl --overwrite {more}")
        (row,) = rows_of(here / "p.jsonl")
        assert (row["chosen"], row["chosen_share"], row["votes"]) == ("x", 0.75, 2)
        assert metrics(here / "p.jsonl")["ties"] == 1


def test_people_judge_the_samples_of_a_file_by_the_form(here, run):
    """Ann likes many words and Ben few, but for one pair that he skips."""
    asked = "judge --within s.jsonl --backend human --out j.jsonl"
    run(f"{asked} --form form.html")
    page = (here / "form.html").read_text()
    form = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL).group(1))
    for person, sign in (("Ann", 1), ("Ben", -1)):
        found = {}
        for item in form["items"]:
            a, b = (sign * len(item[side].split()) for side in "AB")
            if person == "Ann" or "x y" not in (item["A"], item["B"]):
                found[item["id"]] = "tie" if a == b else "A" if a > b else "B"
        content = {"form": form["form"], "person": person, "answers": found}
        (here / f"{person}.json").write_text(json.dumps(content))
    run(f"{asked} --answers Ann.json --answers Ben.json")
    run("make-prefs --judgements j.jsonl --samples s.jsonl --out p.jsonl")
    rows = rows_of(here / "p.jsonl")
    assert [(row["chosen"], row["rejected"], row["chosen_share"], row["votes"]) for row in rows] == [
        ("x y", "x", 1.0, 1)
    ]
    assert metrics(here / "p.jsonl")["ties"] == 5


@pytest.mark.parametrize("votes", list(itertools.product(["a", "b", "tie", "invalid"], repeat=3)))
def test_shares_are_complementary(votes):
    turned = [{"a": "b", "b": "a"}.get(vote, vote) for vote in votes]
    (one, n), (other, m) = decision_of(votes), decision_of(turned)
    assert math.isclose(one + other, 1) and n == m == sum(vote != "invalid" for vote in votes)


def test_two_files_and_the_human_answer(here, run):
    """A against B pairs samples of two files; A against its references pairs them with texts of people."""
    one = [row | {"reference": "of people"} for row in samples({"p0": ["a b c"], "p1": ["x"]})]
    write(here / "a.jsonl", one)
    write(here / "b.jsonl", samples({"p0": ["a"], "p1": ["x y z"]}))
    run("judge a.jsonl b.jsonl --backend scorer --scorer python:words.py:words --out ab.jsonl")
    run("judge a.jsonl --backend scorer --scorer python:words.py:words --out ar.jsonl")
    given = "--judgements ab.jsonl --judgements ar.jsonl"
    run(f"make-prefs {given} --samples a.jsonl --samples b.jsonl --out p.jsonl")
    expected = {("a b c", "a"), ("a b c", "of people"), ("x y z", "x"), ("of people", "x")}
    assert order(rows_of(here / "p.jsonl")) == expected
    run(f"make-prefs {given} --out texts.jsonl")
    assert order(rows_of(here / "texts.jsonl")) == expected
    said = run(f"make-prefs {given} --samples a.jsonl --out q.jsonl", code=2)
    assert "ab.jsonl:1: a sample of prompt_id 'p0' that was judged ('a') is not in a.jsonl" in said
    assert not list(here.glob("q.jsonl*"))


def test_chats_need_the_samples_that_were_judged(here, run):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("hello there", "hello")]
    write(here / "chat.jsonl", [{"prompt": prompt, "completion": answer} for answer in answers])
    (here / "words.py").write_text("def words(rows):\n    return [float(len(str(r['completion']))) for r in rows]\n")
    run("judge --within chat.jsonl --backend scorer --scorer python:words.py:words --out j.jsonl")
    assert "has lost their messages" in run("make-prefs --judgements j.jsonl --out p.jsonl", code=2)
    run("make-prefs --judgements j.jsonl --samples chat.jsonl --out p.jsonl")
    (row,) = rows_of(here / "p.jsonl")
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, *answers)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt_id": "p"}], "j.jsonl:1: field 'k'"),
        ([ballot("p", "a", "b", "A", "m")], "j.jsonl:1: field 'verdict': expected one of a, b, tie, invalid"),
        (
            [ballot("p", "a", "b", "a", "m"), ballot("p", "a", "b", "a", "m") | {"prompt": "other"}],
            "j.jsonl:2: field 'prompt': another one for prompt_id 'p'",
        ),
        ([ballot("p", "a", "b", "a", "m", canary=True)], "j.jsonl: no judgements but a canary's"),
    ],
)
def test_bad_judgements_are_refused(here, run, rows, said):
    write(here / "j.jsonl", rows)
    assert said in run("make-prefs --judgements j.jsonl --out p.jsonl", code=2)
    assert not list(here.glob("p.jsonl*"))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_dry_runs_say_what_would_be_asked_and_made(here, run):
    assert "prompts 3 samples 8 pairs at most 7" in run(
        "make-prefs --samples s.jsonl --scorer python:words.py:words --dry-run --out p.jsonl"
    )
    asked = "--judge openai --judge-model m --price-in 1 --price-out 1 --dry-run --out p.jsonl"
    assert "judgements at most 14" in run(f"make-prefs --samples s.jsonl {asked}")
    assert "judgements at most 3 " in run(f"make-prefs --samples s.jsonl {asked} --pairs random --order random")
    write(here / "j.jsonl", [ballot("p0", "a", "b", "a", "m")])
    assert "compared pairs 1" in run("make-prefs --judgements j.jsonl --dry-run --out p.jsonl")
    assert not list(here.glob("p.jsonl*"))
