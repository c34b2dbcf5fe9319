"""The `dpoctl` of the documentation's command lines: runs the command on the warm server, with few steps and rows.

Run as `docs_command.py ARGS...`. DOCS_WARM holds the warm command as JSON, DOCS_JUDGE the address of a judge's server.
"""

import json
import os
import sys

_TRAINING = {"--max-steps": "1", "--max-length": "96", "--max-prompt-length": "16"}
_SMALL = {
    "prepare": {"--train-prompts": "24", "--test-prompts": "12", "--source": "reviews.jsonl"},
    "sft": _TRAINING,
    "train-dpo": _TRAINING,
    "train-rm": _TRAINING,
    "train-ilql": _TRAINING,
    "train-ppo": _TRAINING | {"--max-new-tokens": "8"},
    "make-prefs": {"--max-new-tokens": "8", "--limit": "8", "--generation-batch-size": "16"},
    "sample": {"--max-new-tokens": "8", "--limit": "4"},
}


def small(argv: list[str]) -> list[str]:
    """The arguments with few steps, prompts and tokens, and the test's server in place of a real one."""
    command, argv = argv[0], list(argv)
    values = dict(_SMALL.get(command, {}))
    if ("--eval-prompts" in argv and command != "preview") or (command == "evaluate" and "--prompts" in argv):
        values |= {"--max-new-tokens": "8", "--eval-limit" if command != "evaluate" else "--limit": "4"}
    if command == "train-ppo" and "--preset" not in argv:
        values |= {"--batch-size": "8", "--minibatch-size": "8"}
    if "--engine" in argv:
        values.pop("--generation-batch-size", None)
    if command == "judge" and "--backend" not in argv:
        values["--base-url"] = os.environ["DOCS_JUDGE"]
    if command == "make-prefs" and "--judge-model" in argv:
        values["--judge-base-url"] = os.environ["DOCS_JUDGE"]
    if command == "make-prefs" and {"--samples", "--judgements"} & set(argv):
        values = {flag: value for flag, value in values.items() if flag in ("--limit", "--judge-base-url")}
    for flag, value in values.items():
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    return argv


if __name__ == "__main__":
    warm = json.loads(os.environ["DOCS_WARM"])
    os.execv(warm[0], [*warm, *small(sys.argv[1:])])
