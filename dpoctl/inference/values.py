"""Decoding with the values of train-ilql: which models have them, and what --ilql-beta does to a loaded policy."""

from pathlib import Path

from .. import log
from ..errors import InputError
from ..models import ilql
from ..models.hub import resolve
from ..models.load import Loaded
from ..models.perturbation import perturb
from ..outputs.manifests import sampling_manifest
from ..runtime.sharing import on_rank_0


def use_values(policy: Loaded, path: str, revision: str | None, beta: float | None) -> None:
    """Let a policy of train-ilql be decoded with `beta` times its values; with beta 0 it is decoded as any model.

    The beta of an earlier call no longer holds. Warns where a model has values and none are asked for. Raises
    InputError for a beta and a model without values.
    """
    perturb(policy.model, None)
    if beta is None:
        warn_of_values(path, revision)
        return
    folder = require_values(path, revision)
    if beta > 0:
        ilql.decode_with_values(policy.model, folder, beta, path)


def require_values(path: str, revision: str | None) -> Path:
    """The local directory of a model that has values. Raises InputError for one without."""
    folder = _folder_with_values(path, revision)
    if folder is None:
        raise InputError(
            f"{path}: --ilql-beta needs the values that train-ilql saves, and there is no {ilql.FILE} in it",
            hint="give a run directory of train-ilql, or leave --ilql-beta out",
        )
    return folder


def warn_of_values(path: str, revision: str | None) -> None:
    """Warn where a model has values that are not used, as by an engine outside this package."""
    if _folder_with_values(path, revision):
        log.warn(f"{path}: decoded without its values in {ilql.FILE}, as with --ilql-beta 0: the policy that imitates")


def count_values(path: str, revision: str | None, beta: float | None) -> int:
    """The weights beside a policy's that decoding with `beta` multiplies a token with. Raises InputError."""
    return ilql.count_values(require_values(path, revision)) if beta else 0


def beta_of_samples(path: str, given: float | None) -> float | None:
    """The beta with which a completions file was sampled, by its manifest; without a manifest, the one that is given.

    None: the model was decoded as any model. Called on every rank. Raises InputError where the two differ.
    """
    source = on_rank_0(lambda: sampling_manifest(path))
    if source is None:
        return given
    beta = source["options"].get("ilql-beta")
    if given is not None and given != (beta or 0):
        raise InputError(
            f"{path}: by its manifest it was sampled with --ilql-beta {beta or 0:g}, not {given:g}",
            hint="leave --ilql-beta out: the manifest tells it",
        )
    return given if beta is None else beta


def _folder_with_values(path: str, revision: str | None) -> Path | None:
    """The local directory of a model that has values, else None. Called on every rank."""
    folder = Path(on_rank_0(lambda: resolve(path, revision, weights=False)))
    if (folder / ilql.FILE).is_file():
        return folder
    return None
