"""What an evaluated point was measured with, by the manifests: its policy, the reference of its KL, and its scorer.

Names and paths say nothing: a path may hold another model by now, and one model may lie in several places.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..outputs.manifests import inputs_of, read_manifest, sampling_manifest


class Origin(NamedTuple):
    """Content hashes and ids from the manifest of a point's file; None where it does not tell.

    `policy`: id of the manifest of the run that trained the policy; None for a completions file. `reference`: hash of
    the model that the KL is to, or for a file and its curves of the model that was sampled. `scorer`: hash of the
    scorer's files, else its name.
    """

    policy: str | None = None
    reference: str | None = None
    scorer: str | None = None


class Point(dict[str, Any]):
    """An evaluation row, with its origin and the name of its model in the report."""

    def __init__(self, row: dict[str, Any], origin: Origin | None = None, name: str = ""):
        super().__init__(row)
        self.origin = origin or Origin()
        self.name = name or Path(row["model"]).name


def hash_of(described: dict[str, Any] | None) -> str | None:
    """What identifies an input's content: its hash, or a hub id whose commit was not known."""
    return (described.get("sha256") or described["path"]) if described else None


def of_run(manifest: dict[str, Any] | None) -> Origin:
    """The origin of the points that a training command measured of its policy."""
    if manifest is None:
        return Origin()
    reference = next(iter([*inputs_of(manifest, "ref"), *inputs_of(manifest, "model")]), None)
    return Origin(manifest.get("id"), hash_of(reference), _scorer(manifest))


def of_row(row: dict[str, Any], path: str, manifest: dict[str, Any] | None) -> Origin:
    """The origin of a row of an evaluations file with this manifest."""
    if manifest is None or manifest["stage"] != "evaluate":
        return Origin()
    if model := _given(manifest, "model", row["model"]):
        reference = next(iter(inputs_of(manifest, "ref")), None)
        return Origin(model["manifest"], hash_of(reference), _scorer(manifest))
    sampled = None
    if file := _given(manifest, "completions", row["model"]):
        sampled = _sampled_model(Path(path).parent / file["path"], file["manifest"])
    return Origin(None, hash_of(sampled), _scorer(manifest))


def _given(manifest: dict[str, Any], name: str, path: str) -> dict[str, Any] | None:
    """The input of an option that may be given several times, by its path on the command line."""
    given = manifest["options"].get(name) or []
    given = given if isinstance(given, list) else [given]
    return dict(zip(given, inputs_of(manifest, name), strict=False)).get(path)


def _sampled_model(path: Path, manifest_id: str | None) -> dict[str, Any] | None:
    """The model that sampled a completions file, where the file's manifest is still there."""
    try:
        if (read_manifest(path) or {}).get("id") != manifest_id:
            return None
        return next(iter(inputs_of(sampling_manifest(path), "model")), None)
    except InputError:  # damaged: of no importance here
        return None


def _scorer(manifest: dict[str, Any]) -> str | None:
    """The hashes of a scorer's files, as one; the name of a scorer without files, which is a server.

    Of several scorers also how they are combined: their mean and their minimum have the same files.
    """
    hashes = " ".join(str(hash_of(described)) for described in inputs_of(manifest, "scorer"))
    how = str(manifest.get("identity", {}).get("scorer") or "")
    if hashes and how.startswith(("mean:", "min:")):
        return f"{how} {hashes}"
    return hashes or manifest["options"].get("scorer")
