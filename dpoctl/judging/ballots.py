"""The votes in judgements files, by prompt and pair of candidates; and the samples that were judged."""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..data.readers import refuse_repeated, stream_rows, warn_of_skipped
from ..data.samples import Reading, SampleFiles
from ..data.stored import carried
from ..errors import InputError
from .comparisons import text_of
from .summary import Vote, turned, vote_on

Prompt = tuple[str, str]  # prompt_id, and the prompt as text
Texts = tuple[str, str]  # a and b
_HINT = "give the files that were judged as --samples; without --samples pairs hold the judged texts alone"


class Ballots:
    """`prompts`: those of the judgements, in order. `skipped`: invalid rows by reason.

    A voter is a judge of one file, or a person. The same two texts of a prompt are one pair, whichever of them is a;
    what a voter says of them, in both orders or of several samples with these texts, is one vote; of a rubric each
    criterion has one.
    """

    def __init__(self, paths: Sequence[str], reading: Reading):
        """Raises InputError for unreadable files and invalid rows, a file that is given twice, a prompt_id with two
        prompts, and where there is no judgement but a canary's."""
        refuse_repeated(paths)
        self.paths, self.reading = paths, reading
        self.skipped: Counter[str] = Counter()
        self.prompts: list[Prompt] = []
        self._votes: dict[Prompt, dict[Texts, list[Vote]]] = {}
        self._ks: dict[tuple[Prompt, str], int | None] = {}
        self._places: dict[tuple[Prompt, Texts], str] = {}
        self._prompt_of: dict[str, str] = {}
        self._judged: dict[str, Prompt] = {}  # by the prompt_id of the samples
        self.chat_at = ""  # a judgement of chats, which it holds as text
        for path in paths:
            self._read(path)
        if not self.prompts:
            raise InputError(f"{', '.join(paths)}: no judgements but a canary's", "give a file of dpoctl judge")

    def _read(self, path: str) -> None:
        voters: dict[tuple[Prompt, Texts, str | None, str | None], list[dict]] = {}
        skipped, reading, kept = Counter[str](), self.reading, 0
        rows = stream_rows(path, "judgements", skip_bad=reading.skip_bad, columns=reading.columns, skipped=skipped)
        for line, row in rows:
            if "check" in row:
                raise InputError(f"{path}: a file of judge --check", "pairs are made of judgements, not of a check")
            if self._prompt_of.setdefault(row["prompt_id"], row["prompt"]) != row["prompt"]:
                if not reading.skip_bad:
                    message = f"field 'prompt': another one for prompt_id {row['prompt_id']!r}, of this or another file"
                    raise InputError(f"{path}:{line}: {message}", "the files must judge samples of the same prompts")
                skipped["another prompt for a prompt_id"] += 1
                continue
            kept += 1
            if not row.get("canary") and self._enter(row, f"{path}:{line}"):
                prompt, texts = (row["prompt_id"], row["prompt"]), (row["a"], row["b"])
                said = {"verdict": row["verdict"], "p": row.get("p")}
                if texts not in self._votes[prompt]:  # it is entered the other way round
                    texts, said = (texts[1], texts[0]), turned(said)
                voters.setdefault((prompt, texts, row.get("judge"), row.get("criterion")), []).append(said)
        for (prompt, texts, *_), judged in voters.items():
            self._votes[prompt][texts].append(vote_on(judged))
        warn_of_skipped(path, kept, skipped)
        self.skipped.update(skipped)

    def _enter(self, row: dict, place: str) -> bool:
        """Note the prompt and the candidates of a row; whether the prompt is within --limit."""
        prompt = row["prompt_id"], row["prompt"]
        if prompt not in self._votes:
            if self.reading.limit is not None and len(self.prompts) >= self.reading.limit:
                return False
            self.prompts.append(prompt)
            self._votes[prompt] = {}
        if row.get("chat"):
            self.chat_at = self.chat_at or place
        b_k = row.get("b_k")
        self._ks.setdefault((prompt, row["a"]), row["k"])
        self._ks.setdefault((prompt, row["b"]), row["k"] if b_k is None else b_k)
        self._places.setdefault((prompt, (row["a"], row["b"])), place)
        pairs = self._votes[prompt]
        if (row["b"], row["a"]) not in pairs:
            pairs.setdefault((row["a"], row["b"]), [])
        return True

    @property
    def count(self) -> int:
        """The pairs that were compared."""
        return sum(map(len, self._votes.values()))

    @property
    def candidates(self) -> int:
        """The different texts that were compared."""
        return sum(len(list(self._texts(prompt))) for prompt in self.prompts)

    # --- the samples

    def groups(self) -> list[list[dict]]:
        """The judged candidates of each prompt as samples: texts, without token ids.

        Raises InputError where the judgements hold chats as text, which is not what a model is to be trained on.
        """
        if self.chat_at:
            raise InputError(f"{self.chat_at}: chats are judged as text, which has lost their messages", _HINT)
        self._judged = {prompt[0]: prompt for prompt in self.prompts}
        return [
            [{"prompt_id": prompt[0], "prompt": prompt[1], "completion": text} for text in self._texts(prompt)]
            for prompt in self.prompts
        ]

    def _texts(self, prompt: Prompt) -> Iterator[str]:
        return iter(dict.fromkeys(text for pair in self._votes[prompt] for text in pair))

    def match(self, samples: SampleFiles) -> None:
        """Find the samples of each judged prompt: by prompt_id and text, else by text alone.

        Raises InputError where a judged candidate is in none of the files.
        """
        judged = {text for _, text in self.prompts}
        by_text: dict[str, tuple[str, Collection[str]]] = {}  # of samples with other prompt_ids
        for rows in samples.groups(slice(0, len(samples.ids))):
            name, text = rows[0]["prompt_id"], text_of(rows[0]["prompt"])
            if text not in judged:
                continue
            known = list(self._candidates(rows))
            if (name, text) in self._votes:
                self._match((name, text), name, known, samples)
            else:
                by_text.setdefault(text, (name, known))
        matched = set(self._judged.values())
        for prompt in self.prompts:
            if prompt not in matched:
                self._match(prompt, *by_text.pop(prompt[1], ("", ())), samples)

    def _match(self, prompt: Prompt, name: str, known: Collection[str], samples: SampleFiles) -> None:
        for text in self._texts(prompt):
            if text not in known:
                self._refuse(prompt, text, samples)
        self._judged[name] = prompt

    def _refuse(self, prompt: Prompt, text: str, samples: SampleFiles) -> None:
        place = next(place for (of, texts), place in self._places.items() if of == prompt and text in texts)
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise InputError(
            f"{place}: a sample of prompt_id {prompt[0]!r} that was judged ({shown!r}) is not in "
            f"{', '.join(samples.paths)}",
            _HINT,
        )

    def of_samples(self, rows: Sequence[dict]) -> tuple[list[dict], dict[tuple[int, int], list[Vote]]]:
        """(the samples of a prompt that were judged, the votes on pairs of them by their indices)."""
        prompt = self._judged.get(rows[0]["prompt_id"])
        if prompt is None:
            return [], {}
        candidates = self._candidates(rows)
        texts = {text: i for i, text in enumerate(self._texts(prompt))}
        judged = [self._sample(candidates[text], self._ks[prompt, text]) for text in texts]
        return judged, {(texts[a], texts[b]): votes for (a, b), votes in self._votes[prompt].items()}

    def _candidates(self, rows: Sequence[dict]) -> dict[str, list[dict]]:
        """The samples of a prompt by the text that a judge sees, their human answers last."""
        found: dict[str, list[dict]] = {}
        for row in rows:
            found.setdefault(text_of(row["completion"], answer=True), []).append(row)
        for row in rows:
            if row.get("reference") is not None:
                answer = carried(row) | {"completion": row["reference"], "k": None, "finish": None, "score": None}
                found.setdefault(text_of(row["reference"], answer=True), []).append(answer)
        return found

    def _sample(self, rows: Sequence[dict], k: int | None) -> dict[str, Any]:
        """The sample with the number that the judgement names, else the first with its text."""
        return next((row for row in rows if row.get("k") == k), rows[0])
