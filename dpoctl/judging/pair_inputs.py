"""What make-prefs reads where it samples no model: files of samples and of judgements."""

from ..config.make_prefs import MakePrefs
from ..data.samples import Reading, SampleFiles
from .ballots import Ballots


def samples_of(config: MakePrefs) -> SampleFiles:
    """The samples of --samples, to be decided by scores or a judge.

    Raises InputError as SampleFiles does, and where there is no pair.
    """
    by_own_scores = not (config.judge or config.scorer)
    files = SampleFiles(config.samples, Reading(config.skip_bad_rows, config.columns, config.limit, by_own_scores))
    if config.threshold is None:
        files.require_pairs()
    return files


def votes_of(config: MakePrefs) -> tuple[Ballots, SampleFiles | None]:
    """The votes of --judgements, and the samples that were judged, where they are given.

    Raises InputError as Ballots does, and where the samples are not those that were judged.
    """
    ballots = Ballots(config.judgements, Reading(config.skip_bad_rows, config.columns, config.limit))
    if not config.samples:
        return ballots, None
    files = SampleFiles(config.samples, Reading(config.skip_bad_rows, config.columns))
    ballots.match(files)
    return ballots, files
