"""Show rows as a command reads them: tokens, what is trained on, lengths and counts. No weights are loaded."""

from dataclasses import fields, replace
from typing import Any

from ..config.commands import COMMANDS
from ..config.preview import Preview
from ..config.schema import flag_of, is_read, spec_of
from ..data.encode import Limits
from ..errors import InputError
from ..models.load import context_without_weights
from ..models.pretrained import silence_transformers
from ..outputs.stdout import print_json
from ..reports import preview_facts, preview_rows, preview_text
from ..reports.preview_rows import Encoded, Setting
from ..training import setup

_DONE = {"train-rm": "scored", "train-ppo": "sampled", "sample": "sampled"}  # else: trained


def run(config: Preview) -> None:
    """Print the rows and the facts of the file. Raises InputError, after that, where the command refuses the file."""
    silence_transformers()
    asked, config = config, _decided(config)
    setting = _setting(config)
    found = preview_rows.read(config.data, setting, config.limit)
    facts = preview_facts.facts_of(found, setting)
    lines = _chosen_lines(config, found)
    if config.json:
        print_json(facts | {"shown": [_row(found, line, setting) for line in lines]})
    else:
        guessed = "" if asked.for_ else ", as its fields suggest (--for names another command)"
        _show(found, facts, lines, setting, f"{config.data} for {config.for_}{guessed}")
    if found.error:
        raise found.error


def _decided(config: Preview) -> Preview:
    """The config with the command that reads the rows, and its limits where no others are given.

    Raises InputError for an option that has no effect with that command.
    """
    purpose = preview_rows.purpose_of(config)
    defaults = {f.name: f.default for f in fields(COMMANDS[purpose])}
    decided = replace(config, for_=purpose)
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.default and not is_read(decided, f):
            raise InputError(
                f"{flag_of(f)} has no effect {spec_of(f).when.unmet(decided)}, which {config.data} is for",
                "--for names another command",
            )
    lengths: dict[str, Any] = {
        name: getattr(config, name) or defaults.get(name) for name in ("max_length", "max_prompt_length")
    }
    decided = replace(decided, **lengths)
    for problem in decided.check_lengths():
        raise InputError(problem, f"{purpose} has --max-prompt-length {defaults['max_prompt_length']} by default")
    return decided


def _setting(config: Preview) -> Setting:
    codec = setup.codec_of(config)
    context = context_without_weights(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if config.for_ == "sample":
        return Setting(config, codec, Limits(prompt=config.max_prompt_length), context)
    if config.for_ == "train-ppo":
        return Setting(config, codec, Limits(prompt=config.max_prompt_length))
    assert config.max_length is not None and config.max_prompt_length is not None  # training has defaults
    limits = setup.limits_within(context, config.max_length, config.max_prompt_length)
    return Setting(config, codec, limits, unpaired=preview_rows.are_unpaired(config))


def _chosen_lines(config: Preview, found: Encoded) -> list[Any]:
    """The lines of the rows to show. Raises InputError where --row names none."""
    lines = found.rows.lines
    if config.row is None:
        return lines[: config.rows]
    if config.row not in lines:
        raise InputError(
            f"{config.data}: no row is used at line {config.row}", f"rows are at lines {lines[0]} to {lines[-1]}"
        )
    return [config.row]


def _show(found: Encoded, facts: dict[str, Any], lines: list[Any], setting: Setting, title: str) -> None:
    config, codec = setting.config, setting.codec
    console, coloured = preview_text.console_of()
    look = preview_text.Look(codec, _DONE.get(config.for_ or "", "trained"), config.ids, coloured)
    if lines:
        console.print(preview_text.legend(look), soft_wrap=True)
        console.print()
    rows = dict(zip(found.rows.lines, found.rows.rows, strict=True))
    for line in lines:
        stops = preview_rows.stops_of(rows[line], codec)
        sequences = found.sequences[line]
        parts = preview_text.parts_of(sequences, codec, stops)
        reason = "" if sequences else f": not used: {preview_rows.why_nothing(found, line, setting)}"
        preview_text.show_row(console, f"{config.data}:{line}{reason}", parts, look)
    preview_text.show_facts(console, title, facts, coloured)


def _row(found: Encoded, line: Any, setting: Setting) -> dict[str, Any]:
    """A row of --json: its line, and the parts of each of its sequences with ids and text."""
    codec = setting.codec
    row = found.rows.rows[found.rows.lines.index(line)]
    stops = preview_rows.stops_of(row, codec)
    sequences = [
        {
            "name": sequence.name,
            "tokens": len(sequence.example.ids),
            "trained": sequence.example.trained,
            "parts": [
                {"part": span.kind, "ids": span.ids, "text": "".join(texts), "ended": span.ended}
                for span, texts in preview_text.with_text(sequence.spans(codec, stops), codec)
            ],
        }
        for sequence in found.sequences[line]
    ]
    unused = {} if sequences else {"unused": preview_rows.why_nothing(found, line, setting)}
    return {"line": line, "sequences": sequences} | unused
