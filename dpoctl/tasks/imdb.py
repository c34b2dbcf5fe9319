"""IMDb film reviews for controlled sentiment generation: prompts are short prefixes (2305.18290, section 6)."""

import html
import random
import re
from typing import TYPE_CHECKING, Any

from .. import log
from ..config.files import Prepare
from ..data.chats import Prompt
from ..data.codec import Codec
from ..data.stored import text_key
from ..errors import InputError
from .prepared import Prepared
from .sources import source_rows, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_ID = "stanfordnlp/imdb"
_TAG = re.compile(r"<[a-zA-Z/!][^<>]{0,200}>")


def prepare(config: Prepare) -> Prepared:
    """Reviews for SFT, and prompts from their first tokens."""
    from ..models.tokenizers import load_tokenizer

    reviews = load_reviews(config.source, config.limit, config.revision)
    log.say(f"{config.source or HUB_ID}: {len(reviews)} reviews")
    if config.tokenizer is None:
        raise InputError("--tokenizer is required: prompt lengths are counted in its tokens")
    return Prepared(prompt_files(config, reviews, load_tokenizer(config.tokenizer)))


def plan(config: Prepare) -> dict[str, Any]:
    """What --dry-run shows."""
    return {
        "train prompts": config.train_prompts,
        "test prompts": config.test_prompts,
        "source": config.source or HUB_ID,
        "tokenizer": config.tokenizer,
    }


def prompt_files(config: Prepare, reviews: list[dict], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[dict]]:
    """The row files of reviews {"id", "text", ...}: SFT rows, and prompts from separate train and test reviews."""
    prompts = prefix_prompts(reviews, tokenizer, config.seed, config.min_prefix, config.max_prefix)
    sft, train, test = split_prompts(reviews, prompts, config.train_prompts, config.test_prompts, config.seed)
    return {"sft.jsonl": sft, "prompts.train.jsonl": train, "prompts.test.jsonl": test}


def clean(text: str) -> str:
    """The text without markup: tags (`<br />`) become spaces, entities characters, runs of white space one space."""
    return " ".join(html.unescape(_TAG.sub(" ", text)).split())


def load_reviews(source: str | None, limit: int | None = None, revision: str | None = None) -> list[dict]:
    """The first `limit` reviews {"id", "text", "label"?} in the order of the source, cleaned.

    `source`: a .jsonl, .jsonl.gz, .csv or .parquet file with a `text` column; None loads the training split from the
    Hub. Raises InputError naming file, line and field for a missing column or an empty text, and where there are no
    rows.
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
        raise InputError(f"{place}: no rows found", hint="reviews are rows with a `text` column")
    return found


def prefix_prompts(
    reviews: list[dict], tokenizer: "PreTrainedTokenizerBase", seed: int, shortest: int = 2, longest: int = 8
) -> list[dict]:
    """One prompt row per review: its first `shortest` to `longest` tokens, the number drawn from (seed, id).

    A prefix never ends inside a character. A row stores its token ids where the text alone encodes to the same ids.
    Raises InputError where a review is shorter than its prefix.
    """
    codec = Codec(tokenizer)
    prompts = []
    for review in reviews:
        n = random.Random(f"prefix {seed} {review['id']}").randint(shortest, longest)
        start = tokenizer(review["text"][: 40 * longest], add_special_tokens=False)["input_ids"]
        # The length drawn where it ends with a complete character, else a longer one, else a shorter one.
        for length in (*range(n, longest + 1), *range(n - 1, shortest - 1, -1)):
            ids = start[:length]
            text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if len(ids) == length and text.strip() and not text.endswith("\ufffd"):
                break
        else:
            raise InputError(
                f"review {review['id']}: no prefix of {shortest} to {longest} tokens is valid text "
                f"({review['text'][:40]!r})",
                hint="remove it, lower --min-prefix or raise --max-prefix",
            )
        row = {"prompt_id": review["id"], "prompt": text}
        prompt = Prompt(text)
        [encoded] = codec.encode_prompts([prompt])
        if encoded[len(encoded) - len(ids) :] == ids:
            texts = [text_key(prompt, encoded)]
            row |= {"prompt_ids": encoded, "tokenizer": codec.fingerprint, "texts": texts}
        prompts.append(row)
    return prompts


def split_prompts(
    reviews: list[dict], prompts: list[dict], train: int, test: int, seed: int
) -> tuple[list[dict], list[dict], list[dict]]:
    """(SFT reviews, `train` train prompts, `test` test prompts), where prompts[i] is the prefix of reviews[i].

    Train prompts are prefixes of SFT reviews, as in the paper. Test prompts come from reviews that are in neither set,
    and none of them equals a train prompt, since short prefixes recur. Raises InputError where there are too few.
    """
    order = list(range(len(reviews)))
    random.Random(f"split {seed}").shuffle(order)
    for_training = order[:train]
    known = {prompts[i]["prompt"] for i in for_training}
    for_testing = [i for i in order[train:] if prompts[i]["prompt"] not in known][:test]
    if len(for_training) < train or len(for_testing) < test:
        raise InputError(
            f"{len(reviews)} reviews give {len(for_training)} train and {len(for_testing)} unseen test prompts; "
            f"{train} and {test} are needed",
            hint="lower --train-prompts or --test-prompts, or raise --limit",
        )
    held_out = set(for_testing)
    sft = [reviews[i] for i in order if i not in held_out]
    return sft, [prompts[i] for i in for_training], [prompts[i] for i in for_testing]
