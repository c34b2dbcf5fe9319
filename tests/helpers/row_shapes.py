"""Rows of the shapes that people have, each with the same rows as written by hand, and files of every format."""

import gzip
import json

import datasets
import pyarrow

TEXTS = [("Is it good?", "Yes, very.", "No."), ("Who wrote it?", "A friend of mine.", "Nobody\nknows.")]
SYSTEMS = ("Be brief.", "")
EXTRA = ("in one word", "")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return [{"role": "system", "content": content}] if content else []


def pair(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **more}


# shape -> (rows as people have them, the same rows by hand)
PREFERENCES = {
    "trl explicit": (
        [{"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant(b)]} for q, a, b in TEXTS],
        [pair([user(q)], a, b) for q, a, b in TEXTS],
    ),
    "trl implicit": (
        [{"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]} for q, a, b in TEXTS],
        [pair([user(q)], a, b) for q, a, b in TEXTS],
    ),
    "hh": (
        [
            {"chosen": f"\n\nHuman: {q}\n\nAssistant: {a}", "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}"}
            for q, a, b in TEXTS
        ],
        [{"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"} for q, a, b in TEXTS],
    ),
    "hh beside its prompt": (
        [
            {
                "prompt": f"\n\nHuman: {q}\n\nAssistant:",
                "chosen": f"\n\nHuman: {q}\n\nAssistant: {a}",
                "rejected": f"\n\nHuman: {q}\n\nAssistant: {b}",
            }
            for q, a, b in TEXTS
        ],
        [{"prompt": f"\n\nHuman: {q}\n\nAssistant:", "chosen": f" {a}", "rejected": f" {b}"} for q, a, b in TEXTS],
    ),
    "ultrafeedback": (
        [
            {
                "prompt": f" {q}\n",  # differs by blanks
                "chosen": [user(q), assistant(a)],
                "rejected": [user(q), assistant(b)],
                "messages": [user(q), assistant(a)],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
            for q, a, b in TEXTS
        ],
        [pair([user(q)], a, b, chosen_score=8.5, rejected_score=3.0) for q, a, b in TEXTS],
    ),
    "orca": (
        [{"system": s, "question": q, "chosen": a, "rejected": b} for s, (q, a, b) in zip(SYSTEMS, TEXTS, strict=True)],
        [pair([*system(s), user(q)], a, b) for s, (q, a, b) in zip(SYSTEMS, TEXTS, strict=True)],
    ),
    "orca renamed": (
        [{"system": s, "prompt": q, "chosen": a, "rejected": b} for s, (q, a, b) in zip(SYSTEMS, TEXTS, strict=True)],
        [pair([*system(s), user(q)], a, b) for s, (q, a, b) in zip(SYSTEMS, TEXTS, strict=True)],
    ),
    "alpaca": (
        [
            {"instruction": q, "input": more, "chosen": a, "rejected": b}
            for more, (q, a, b) in zip(EXTRA, TEXTS, strict=True)
        ],
        [pair([user(f"{q}\n{more}" if more else q)], a, b) for more, (q, a, b) in zip(EXTRA, TEXTS, strict=True)],
    ),
    "alpaca renamed": (
        [
            {"prompt": q, "input": more, "chosen": a, "rejected": b}
            for more, (q, a, b) in zip(EXTRA, TEXTS, strict=True)
        ],
        [pair([user(f"{q}\n{more}" if more else q)], a, b) for more, (q, a, b) in zip(EXTRA, TEXTS, strict=True)],
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi."},
                    {"from": "human", "value": q},
                ],
                "chosen": {"from": "gpt", "value": a},
                "rejected": {"from": "gpt", "value": b},
            }
            for q, a, b in TEXTS
        ],
        [pair([user("Hello"), assistant("Hi."), user(q)], a, b) for q, a, b in TEXTS],
    ),
    "text parts": (
        [
            {
                name: [{"role": role, "content": [{"type": "text", "text": text}]}]
                for name, role, text in (
                    ("prompt", "user", q),
                    ("chosen", "assistant", a),
                    ("rejected", "assistant", b),
                )
            }
            for q, a, b in TEXTS
        ],
        [pair([user(q)], a, b) for q, a, b in TEXTS],
    ),
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CHATS = {
    "alpaca": (
        [{"instruction": q, "input": more, "output": a} for more, (q, a, _) in zip(EXTRA, TEXTS, strict=True)],
        [
            {"prompt": [user(f"{q}\n{more}" if more else q)], "completion": [assistant(a)]}
            for more, (q, a, _) in zip(EXTRA, TEXTS, strict=True)
        ],
    ),
    "orca": (
        [{"system_prompt": "Be brief.", "question": q, "response": a} for q, a, _ in TEXTS],
        [{"prompt": [*system("Be brief."), user(q)], "completion": [assistant(a)]} for q, a, _ in TEXTS],
    ),
    "sharegpt": (
        [
            {"system": "Be brief.", "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a, _ in TEXTS
        ],
        [{"messages": [*system("Be brief."), user(q), assistant(a)]} for q, a, _ in TEXTS],
    ),
    "tools": (
        [{"messages": [user(q), assistant(a)], "tools": json.dumps([TOOL])} for q, a, _ in TEXTS],
        [{"messages": [user(q), assistant(a)], "tools": [TOOL]} for q, a, _ in TEXTS],
    ),
}
FORMATS = ("jsonl", "json", "parquet", "arrow", "saved", "jsonl.gz", "json.zst")


def write(folder, rows, form):
    path = folder / f"rows.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "jsonl":
        path.write_text(lines)
    elif form == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "json.zst":
        packed = pyarrow.Codec("zstd").compress(json.dumps(rows).encode(), asbytes=True)
        path.write_bytes(packed)
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path = folder / "saved"
        datasets.Dataset.from_list(rows).save_to_disk(path)
        if form == "arrow":
            path = next(path.glob("*.arrow"))
    return path
