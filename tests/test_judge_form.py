"""The form for human judges: blind, its answers read back as judgements, agreement between people."""

import json
import re

import pytest

from dpoctl.errors import InputError
from dpoctl.judging import form
from dpoctl.reports.collect import collect
from helpers.judging import candidates, rows_of, run, write

pytestmark = pytest.mark.usefixtures("warm_judge")


def test_the_form_is_blind_and_reads_its_answers_back(tmp_path):
    a, b = candidates(tmp_path, 6, good="<b>good</b> </script>", bad="bad")
    common = [a, b, "--backend", "human", "--criterion", "sentiment", "--out", "j.jsonl"]
    run(tmp_path, *common, "--form", "form.html")
    page = (tmp_path / "form.html").read_text()
    assert "a.jsonl" not in page and page.count("</script>") == 2
    assert not list(tmp_path.glob("j.jsonl*.json"))  # no output is started before there are answers
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL).group(1))
    orders = {"good" in item["A"] for item in data["items"]}
    assert orders == {True, False}  # which side is A is drawn
    for person, choice in (("Ann", lambda i: "A" if "good" in i["A"] else "B"), ("Ben", lambda i: "A")):
        answers = {item["id"]: choice(item) for item in data["items"]}
        (tmp_path / f"{person}.json").write_text(
            json.dumps({"form": data["form"], "person": person, "answers": answers})
        )
    run(tmp_path, *common, "--answers", "Ann.json", "--answers", "Ben.json")
    metrics = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())["metrics"]
    assert metrics["people"]["human:Ann"]["win_rate"] == 1.0
    share = sum("good" in item["A"] for item in data["items"]) / 6
    assert metrics["people"]["human:Ben"]["win_rate"] == pytest.approx(share)
    assert metrics["agreement"]["human:Ann and human:Ben"]["raw"] == pytest.approx(share)
    collected = collect((str(tmp_path / "j.jsonl"),)).judged[0]
    assert collected.summary == metrics["summary"] and collected.summary["flips"] is None
    _, err = run(tmp_path, *common, "--answers", "Ann.json", code=2)  # not what is in j.jsonl
    assert "--answers" in err
    (tmp_path / "again.json").write_text((tmp_path / "Ann.json").read_text())
    more = [*common[:-1], "k.jsonl", "--against", "j.jsonl"]
    _, err = run(tmp_path, *more, "--answers", "Ann.json", "--answers", "again.json", code=2)
    assert "again.json: answers of 'Ann', as Ann.json has" in err
    _, err = run(tmp_path, *more, "--answers", "Ann.json")
    assert "agreement of human:Ann and j.jsonl" in err
    with pytest.raises(InputError, match="another form"):
        form.read_answers(str(tmp_path / "Ann.json"), data["items"][:3])


def items_of(path) -> tuple[dict, list[dict]]:
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text(), re.DOTALL).group(1))
    return data, data["items"]


def test_three_annotators_share_the_comparisons(tmp_path):
    """Every comparison is in one share, the overlap in all; the three exports give majorities, ties and alpha."""
    a, b = candidates(tmp_path, 20)
    common = [a, b, "--backend", "human", "--out", "j.jsonl"]
    shared = ["--form", "forms/f.html", "--annotators", "3", "--overlap", ".2"]
    run(tmp_path, *common, *shared)
    pages = [tmp_path / "forms" / f"f-{n}.html" for n in (1, 2, 3)]
    before = [page.read_text() for page in pages]
    (one, first), (_, second), (_, third) = map(items_of, pages)
    ids = [[item["id"] for item in items] for items in (first, second, third)]
    everybody = set(ids[0]) & set(ids[1]) & set(ids[2])
    assert len(everybody) == 4 and [len(share) for share in ids] == [10, 9, 9]
    assert sorted([*everybody, *(i for share in ids for i in share if i not in everybody)]) == sorted(
        f"c{i}" for i in range(20)
    )
    orders = [[i for i in share if i in everybody] for share in ids]
    assert orders[0] != orders[1] or orders[0] != orders[2]  # each annotator has an order of their own
    run(tmp_path, *common, *shared)
    assert [page.read_text() for page in pages] == before

    files = []
    for person, items in (("Ann", first), ("Ben", second), ("Cleo", third)):
        answers = {item["id"]: "A" if "good" in item["A"] else "B" for item in items}
        if person == "Cleo":
            answers |= dict.fromkeys(everybody, "both_bad")
            answers.pop(next(i for i in answers if i not in everybody))
        told = {"form": one["form"], "person": person, "share": 1, "of": len(items), "answers": answers}
        (tmp_path / f"{person}.json").write_text(json.dumps(told | {"comments": {min(everybody): f"says {person}"}}))
        files += ["--answers", f"{person}.json"]
    out, err = run(tmp_path, *common, *files)
    assert "Cleo.json: 8 of 9 comparisons are answered" in err and "human:Cleo: both bad 4 times" in err
    metrics = json.loads((tmp_path / "j.jsonl.manifest.json").read_text())["metrics"]
    assert metrics["summary"]["n"] == 19 and metrics["summary"]["wins"] == 19  # two of three say a
    assert metrics["people"]["human:Cleo"]["both_bad"] == 4 and "both_bad" not in metrics["people"]["human:Ann"]
    # each of 4 units has a, a, tie: 4 of its 6 ordered pairs disagree, by halves; of the 12 values 8 are a, 4 ties
    expected = 1 - (12 - 1) * (4 * 4 / 2) / (2 * 8 * 4)
    assert metrics["alpha"]["nominal"] == pytest.approx(expected) and metrics["alpha"]["n"] == 4
    assert "Krippendorff's alpha of 3 people, over 4 comparisons" in err
    rows = rows_of(tmp_path / "j.jsonl")
    assert [r["comment"] for r in rows if "comment" in r] == ["says Ann", "says Ben", "says Cleo"]
    assert all(r["verdict"] == "tie" and r["raw"] == "both_bad" for r in rows if r.get("both_bad"))

    (tmp_path / "Cleo.json").write_text(json.dumps(told | {"answers": {"c0": "C"}}))
    _, err = run(tmp_path, *common[:-1], "k.jsonl", "--answers", "Cleo.json", code=2)
    assert "answer c0: expected A, B, tie or both_bad" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--annotators", "7", "--overlap", "0"], "6 comparisons leave some of them without any"),
        (["--annotators", "1"], "--annotators"),
        (["--overlap", ".5"], "--overlap"),
        (["--annotators", "2", "--overlap", "1.5"], "--overlap"),
    ],
)
def test_mistakes_of_shares(tmp_path, options, said):
    a, b = candidates(tmp_path, 6)
    _, err = run(tmp_path, a, b, "--backend", "human", "--out", "j.jsonl", "--form", "f.html", *options, code=2)
    assert said in err and not list(tmp_path.glob("f*.html"))


def test_chats_export_no_preferences(tmp_path):
    for name in ("a", "b"):
        row = {"prompt_id": "p", "prompt": [{"role": "user", "content": "Hi"}], "k": 0, "finish": "stop"}
        write(tmp_path / f"{name}.jsonl", [row | {"completion": [{"role": "assistant", "content": name}]}])
    run(tmp_path, "a.jsonl", "b.jsonl", "--backend", "human", "--out", "j.jsonl", "--form", "f.html")
    page = (tmp_path / "f.html").read_text()
    assert re.search(r'id="preferences" disabled', page) and "exports no preferences" in page
