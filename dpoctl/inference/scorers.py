"""Scorers: text in, one number out. The notation is in `scorer_spec`, its meaning in `load_scorer`.

A scorer has a tokenizer of its own and gets text. What it returns is independent of what shares a batch, but for
rounding. Comparisons belong on `keys`: a probability saturates in float32, and its ties are none.
"""

import importlib.util
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from .. import log
from ..config.scorer import parse_scorer
from ..data.encode import truncate
from ..data.tokens import encode_completion, encode_prompt, encode_text, fingerprint
from ..errors import InputError
from ..models.hub import resolve
from ..models.load import context_length, load_classifier, load_policy
from ..models.logprobs import response_logps

_POSITIVE = ("positive", "pos")


@dataclass
class Scores:
    """`values`: the reading asked for. `keys`: float64 numbers to compare by (log-odds for a classifier)."""

    values: list[float]
    keys: list[float]


@dataclass
class Scorer:
    """`score(rows)` gives the rows' scores in order; rows hold `prompt` (text or messages) and `completion`, or `text`.

    `reading` is `prob`, `logit`, `log-odds` (classifiers), `reward`, `implicit` or `python`.
    """

    name: str
    score_type: str
    _score: Callable[[list[dict]], Scores]

    def score(self, rows: list[dict]) -> Scores:
        return self._score(rows) if rows else Scores([], [])


def load_scorer(
    spec: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    text: str = "joined",
    tokens_per_batch: int = 16384,
    score_type: str = "prob",
) -> Scorer:
    """The scorer that the SCORER notation names.

    A classifier: with z its logits and z+ the one of its positive label, `logit` is z+, `log-odds` is
    z+ - logsumexp(the others), `prob` their logistic. A model of one label is a reward model: its value
    is (logit - reward_shift) / reward_scale, both of its config.json, 0 and 1 where absent. `implicit`:
    beta * sum over the completion of log policy - log reference (2305.18290, section 4), beta from the policy's
    config.yaml. `python`: what the function returns.

    `reading` is a classifier's where the notation leaves it open.
    `text`: `joined` scores prompt + completion, `completion` the completion alone (classifiers and reward models).
    Raises InputError for whatever is wrong with notation, models or file; `score` raises it, naming the text, where a
    score is not a finite number.
    """
    parsed = parse_scorer(spec)
    if parsed.kind != "model" and text != "joined":
        raise InputError(f"scorer {spec!r}: it sees prompt and completion, never the completion alone")
    if parsed.kind == "python":
        return Scorer(spec, "python", _python_scorer(*parsed.parts))
    if parsed.kind == "implicit":
        models = [load_policy(path, device=device, dtype=dtype) for path in parsed.parts]
        return Scorer(spec, "implicit", _implicit_scorer(parsed.parts, models, tokens_per_batch))
    path = parsed.parts[0]
    model, tokenizer = load_classifier(path, device=device, dtype=dtype, revision=revision)
    joined = text == "joined"
    if model.config.num_labels == 1:
        if parsed.score_type:
            raise InputError(f"{path}: a reward model (one label) has no reading @{parsed.score_type}", "leave it out")
        return Scorer(spec, "reward", _reward_scorer(model, tokenizer, joined, tokens_per_batch))
    score_type = parsed.score_type or score_type
    return Scorer(spec, score_type, _classifier_scorer(path, model, tokenizer, score_type, joined, tokens_per_batch))


# ---- the kinds


def _classifier_scorer(path, model, tokenizer, score_type, joined, tokens_per_batch):
    labels = {int(i): name for i, name in model.config.id2label.items()}
    positive = [i for i, name in labels.items() if str(name).lower() in _POSITIVE]
    if len(positive) != 1:
        raise InputError(
            f"{path}: no label of this classifier is called positive; it has {', '.join(map(str, labels.values()))}",
            hint="name it POSITIVE in config.json (id2label, label2id), or write a python:FILE.py:FUNCTION scorer",
        )
    encode = _text_encoder(path, model, tokenizer)

    def score(rows: list[dict]) -> Scores:
        logits = _logits(model, tokenizer, encode([_text(row, joined) for row in rows]), tokens_per_batch)
        chosen = logits[:, positive[0]]
        if model.config.problem_type == "multi_label_classification":  # each label is a yes or no of its own
            keys = chosen
        else:
            keys = chosen - logits[:, [i for i in labels if i != positive[0]]].logsumexp(-1)
        values = {"prob": torch.sigmoid(keys), "logit": chosen, "log-odds": keys}[score_type]
        return _checked(rows, values.tolist(), keys.tolist())

    return score


def _reward_scorer(model, tokenizer, joined, tokens_per_batch):
    path = model.config.name_or_path
    shift, scale = getattr(model.config, "reward_shift", 0.0), getattr(model.config, "reward_scale", 1.0)
    if hasattr(model, "score"):  # a decoder: read at the last token, encoded as it was trained
        encode = _pair_encoder(path, model, tokenizer, joined)
    else:
        encode_texts = _text_encoder(path, model, tokenizer)

        def encode(rows: list[dict]) -> list[list[int]]:
            return encode_texts([_text(row, joined) for row in rows])

    def score(rows: list[dict]) -> Scores:
        values = ((_logits(model, tokenizer, encode(rows), tokens_per_batch)[:, 0] - shift) / scale).tolist()
        return _checked(rows, values, list(values))

    return score


def _implicit_scorer(paths, models, tokens_per_batch):
    (policy, tokenizer), (reference, other) = models
    own = fingerprint(tokenizer)
    if own != fingerprint(other):
        raise InputError(
            f"{paths[0]} and {paths[1]} have different tokenizers", "the reference must share the policy's"
        )
    beta = _beta(paths[0])
    limit = min((context_length(m) for m in (policy, reference) if context_length(m)), default=None)
    warn = _warn_once(f"{paths[0]}: {{}} texts are longer than its {limit} tokens and were cut")

    def score(rows: list[dict]) -> Scores:
        sequences = [_cut(*_pair_ids(tokenizer, own, row), limit) for row in rows]
        for row, (prompt, _, _) in zip(rows, sequences, strict=True):
            if not prompt:
                raise InputError(f"the implicit reward needs a prompt: {_which(row)} has none")
        warn(sum(cut for _, _, cut in sequences))
        spans = [(prompt + completion, len(prompt)) for prompt, completion, _ in sequences]
        with torch.inference_mode():
            ours, base = (
                torch.as_tensor(response_logps(m, spans, tokens_per_batch=tokens_per_batch)).double().cpu()
                for m in (policy, reference)
            )
        values = (beta * (ours - base)).tolist()
        return _checked(rows, values, list(values))

    return score


def _python_scorer(file: str, name: str):
    path = Path(file).expanduser()
    spec = importlib.util.spec_from_file_location(f"dpoctl_scorer_{path.stem}", path)
    if spec is None:
        raise InputError(f"scorer {file}: not a Python file", "its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise InputError(f"scorer {file}: it cannot be imported: {_where(e, path)}") from e
    function = getattr(module, name, None)
    if not callable(function):
        defined = [n for n, prompt_noun in vars(module).items() if callable(prompt_noun) and not n.startswith("_")]
        raise InputError(f"scorer {file}: it has no function {name}", f"it has: {', '.join(defined) or 'none'}")

    def call(rows: list[dict]) -> list[float]:
        pairs = [{"prompt": row.get("prompt", ""), "completion": _completion(row)} for row in rows]
        return [float(x) for x in function(pairs)]

    def score(rows: list[dict]) -> Scores:
        try:
            values = call(rows)
        except Exception as e:
            raise InputError(f"scorer {file}:{name} failed: {_where(e, path)}{_culprit(call, rows)}") from e
        if len(values) != len(rows):
            raise InputError(
                f"scorer {file}:{name} returned {len(values)} numbers for {len(rows)} texts, the first of them "
                f"{_which(rows[0])}",
                hint="return one number for each text, in order",
            )
        return _checked(rows, values, list(values))

    return score


def _culprit(call: Callable, rows: list[dict]) -> str:
    """Which row makes `call` fail when it is alone, if one does."""
    for row in rows:
        try:
            call([row])
        except Exception:
            return f", on {_which(row)}"
    return ""


# ---- text and tokens


def _content(text) -> str:
    """Plain text; messages are joined by their contents, a line each."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _completion(row: dict) -> str:
    """The scored part of a row: its completion, or all of a text row."""
    return _content(next(row[field] for field in ("completion", "text", "messages") if field in row))


def _text(row: dict, joined: bool) -> str:
    prompt = row.get("prompt", "")
    if not joined or not prompt:
        return _completion(row)
    return _content(prompt) + ("" if isinstance(prompt, str) else "\n") + _completion(row)


def _pair_ids(tokenizer, own: str, row: dict) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids with EOS where the text ended); a sampled row's own ids where the tokenizer fits.

    `own` is the tokenizer's fingerprint.
    """
    finished = row.get("finish", "stop") == "stop"
    eos = tokenizer.eos_token_id
    if "completion_ids" in row and "prompt_ids" in row and row.get("tokenizer") == own:
        return row["prompt_ids"], row["completion_ids"] + ([eos] if finished and eos is not None else [])
    prompt = encode_prompt(tokenizer, row.get("prompt", ""))
    return prompt, encode_completion(tokenizer, row.get("prompt", ""), _completion(row), prompt, finished=finished)


def _cut(prompt: list[int], completion: list[int], limit: int | None) -> tuple[list[int], list[int], bool]:
    return truncate(prompt, completion, limit, limit) if limit else (prompt, completion, False)


def _pair_encoder(path, model, tokenizer, joined):
    """Rows to ids as a decoder's reward head is trained on them: prompt, completion, EOS where the text ended.

    A decoder finds its last token as the last one that is not padding: where the EOS is the padding, it is left out.
    """
    limit = context_length(model)
    warn = _warn_once(f"{path}: {{}} texts are longer than its {limit} tokens and were cut")
    own = fingerprint(tokenizer)
    no_eos = tokenizer.pad_token_id == tokenizer.eos_token_id

    def encode(rows: list[dict]) -> list[list[int]]:
        encoded, cuts = [], 0
        for row in rows:
            row = row | {"finish": "length"} if no_eos else row
            if joined and row.get("prompt"):
                prompt, completion = _pair_ids(tokenizer, own, row)
            else:
                finished = row.get("finish", "stop") == "stop"
                prompt, completion = [], encode_text(tokenizer, _completion(row), finished=finished)
            prompt, completion, cut = _cut(prompt, completion, limit)
            encoded.append(prompt + completion)
            cuts += cut
        warn(cuts)
        return encoded

    return encode


def _text_encoder(path, model, tokenizer):
    """Texts to ids with the tokenizer's own special tokens, cut at what model and tokenizer take."""
    limit = _text_limit(model, tokenizer)
    warn = _warn_once(f"{path}: {{}} texts are longer than its {limit} tokens and were cut")

    def encode(texts: list[str]) -> list[list[int]]:
        if limit is None:
            return tokenizer(texts)["input_ids"]
        # One token more than fits shows which are cut.
        encoded = tokenizer(texts, truncation=True, max_length=limit + 1)["input_ids"]
        longer = [n for n, ids in enumerate(encoded) if len(ids) > limit]
        for n in longer:
            encoded[n] = tokenizer(texts[n], truncation=True, max_length=limit)["input_ids"]
        warn(len(longer))
        return encoded

    return encode


def _text_limit(model, tokenizer) -> int | None:
    """The most tokens of a text. RoBERTa's kin count positions from the padding index on and so lose some."""
    limit = context_length(model)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    own = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None  # unset is a huge number
    return min((n for n in (limit, own) if n), default=None)


@torch.inference_mode()
def _logits(model, tokenizer, sequences: list[list[int]], tokens_per_batch: int) -> torch.Tensor:
    """[sequences, labels] float64, in order; batches of like lengths, at most `tokens_per_batch` with the padding."""
    logits = torch.empty(len(sequences), model.config.num_labels, dtype=torch.float64)
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    start = 0
    while start < len(order):
        width = max(1, len(sequences[order[start]]))
        batch = order[start : start + max(1, tokens_per_batch // width)]
        start += len(batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, n in enumerate(batch):
            ids[line, : len(sequences[n])] = torch.tensor(sequences[n], dtype=torch.long)
            mask[line, : len(sequences[n])] = 1
        output = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        logits[batch] = output.logits.double().cpu()
    return logits


# ---- checks and words


def _checked(rows: list[dict], values: list[float], keys: list[float]) -> Scores:
    for row, value, key in zip(rows, values, keys, strict=True):
        if not (math.isfinite(value) and math.isfinite(key)):
            raise InputError(f"the scorer gave {value} for {_which(row)}", "a score must be a finite number")
    return Scores(values, keys)


def _beta(path: str) -> float:
    config = Path(resolve(path)) / "config.yaml"
    try:
        beta = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("beta")
    except (OSError, yaml.YAMLError, AttributeError) as e:
        raise InputError(f"{config}: cannot be read, and the implicit reward needs its beta") from e
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not beta > 0:
        raise InputError(f"{config}: beta: expected a number above 0, got {beta!r}", "is it a train-dpo run directory?")
    return float(beta)


def _which(row: dict) -> str:
    """A row named by what a person can look for: its id, if any, and its text's beginning."""
    names = ", ".join(f"{field} {row[field]}" for field in ("prompt_id", "k") if field in row)
    text = _text(row, joined=True)
    return f"{names + ': ' if names else ''}{text[:60] + '...' if len(text) > 60 else text!r}"


def _where(error: Exception, path: Path) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def _warn_once(message: str) -> Callable[[int], None]:
    said = False

    def warn(count: int) -> None:
        nonlocal said
        if count and not said:
            said = True
            log.warn(message.format(count))

    return warn
