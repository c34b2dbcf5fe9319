"""The form for human judges: blind, its answers read back as judgements, agreement between people."""

import json
import re

import pytest

from dpoctl.errors import InputError
from dpoctl.judging import form
from dpoctl.reports.collect import collect
from helpers.judging import candidates, run

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
