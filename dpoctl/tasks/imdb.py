"""Film reviews from the hub or a file, cleaned, and prompts that are their first few tokens (PAPER: IMDb, step 3)."""

import html
import random
import re

from ..data.tokens import encode_prompt, fingerprint
from ..errors import InputError
from .sources import source_rows, text_of

HUB_ID = "stanfordnlp/imdb"
_TAG = re.compile(r"<[a-zA-Z/!][^<>]{0,200}>")


def clean(text: str) -> str:
    """The text without markup: tags such as `<br />` become spaces, entities characters, white space one space."""
    return " ".join(html.unescape(_TAG.sub(" ", text)).split())


def load_reviews(source: str | None, limit: int | None = None, revision: str | None = None) -> list[dict]:
    """Reviews {"id", "text", "label"?} in the order of the source, cleaned.

    `source`: a .jsonl, .jsonl.gz, .csv or .parquet file with a `text` column; None takes the training split from the
    hub. Raises InputError with file, line and field for a missing column or an empty text, and where nothing is found.
    """
    found: list[dict] = []
    place = source or HUB_ID
    for line, row in source_rows(source, HUB_ID, revision=revision):
        if limit is not None and len(found) == limit:
            break
        text = text_of(row, "text", f"{place}:{line}")
        if not clean(text):
            raise InputError(f"{place}:{line}: text: is empty", hint="remove the row")
        kept = {"id": str(row.get("id", line)), "text": clean(text)}
        found.append(kept | ({"label": row["label"]} if row.get("label") is not None else {}))
    if not found:
        raise InputError(f"{place}: holds no rows", hint="reviews are rows with a `text` column")
    return found


def prefix_prompts(reviews: list[dict], tokenizer, seed: int, shortest: int = 2, longest: int = 8) -> list[dict]:
    """One prompt row per review: its first `shortest` to `longest` tokens, the number drawn from (seed, id).

    A prefix never ends within a character. Its token ids go along where the text alone gives the same ids again.
    Raises InputError where a review is shorter than its prefix.
    """
    own = fingerprint(tokenizer)
    prompts = []
    for review in reviews:
        n = random.Random(f"prefix {seed} {review['id']}").randint(shortest, longest)
        start = tokenizer(review["text"][: 40 * longest], add_special_tokens=False)["input_ids"]
        for length in (*range(n, longest + 1), *range(n - 1, shortest - 1, -1)):  # as drawn, else longer, else shorter
            ids = start[:length]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if len(ids) == length and text.strip() and not text.endswith("\ufffd"):
                break
        else:
            raise InputError(
                f"review {review['id']}: gives no prefix of {shortest} to {longest} whole tokens ({review['text'][:40]!r})",
                hint="remove it, lower --min-prefix or raise --max-prefix",
            )
        row = {"prompt_id": review["id"], "prompt": text}
        whole = encode_prompt(tokenizer, text)
        if whole[len(whole) - len(ids) :] == ids:
            row |= {"prompt_ids": whole, "tokenizer": own}
        prompts.append(row)
    return prompts


def split_prompts(reviews: list[dict], prompts: list[dict], train: int, test: int, seed: int):
    """(SFT reviews, train prompts, test prompts) of reviews and their prompts, side by side.

    Train prompts are prefixes of SFT reviews, as in the paper. Test prompts come from reviews that neither SFT nor the
    train prompts see, and none of them is also a train prompt: short prefixes recur. Raises InputError where there are
    too few.
    """
    order = list(range(len(reviews)))
    random.Random(f"split {seed}").shuffle(order)
    for_training = order[:train]
    known = {prompts[i]["prompt"] for i in for_training}
    for_testing = [i for i in order[train:] if prompts[i]["prompt"] not in known][:test]
    if len(for_training) < train or len(for_testing) < test:
        raise InputError(
            f"{len(reviews)} reviews give {len(for_training)} train and {len(for_testing)} unseen test prompts; "
            f"{train} and {test} are asked for",
            hint="lower --train-prompts or --test-prompts, or raise --limit",
        )
    held_out = set(for_testing)
    sft = [reviews[i] for i in order if i not in held_out]
    return sft, [prompts[i] for i in for_training], [prompts[i] for i in for_testing]
