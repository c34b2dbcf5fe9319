"""Where make-prefs has its samples from: a model that is sampled, files, or the texts of judgements."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from .. import log
from ..data.samples import SampleFiles
from ..models.pretrained import silence_transformers
from ..outputs.claims import Output
from ..outputs.shards import ShardRange, shard_range, slices
from ..runtime.devices import Compute, open_compute
from .options import SamplerOptions, ScoringOptions, TemplateArguments, template_options
from .sampler import Sampler
from .scorers import Scorer, load_scorer, scorer_options

BATCH = 256  # samples at least, of whole prompts, that are decided together

Groups = Sequence[list[dict]]  # the samples of each prompt of a batch


class GivenOptions(ScoringOptions, TemplateArguments, Protocol):
    """What samples that exist read of a command's options: how their scorer is opened."""

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shard(self) -> str | None: ...


class Source(ABC):
    """Samples in batches of whole prompts. `shard`: the prompts of this command; `samples`: how many these have.

    `holds_device`: what makes the samples takes the memory of a device, which a scorer has only after `make_all`.
    """

    shard: ShardRange
    samples: int
    skipped: Mapping[str, int]  # rows that are left out, by reason
    holds_device = False

    @abstractmethod
    def groups(self, done: int, meter: log.Progress) -> Iterator[Groups]:
        """The samples of each prompt, batch by batch, after the first `done` batches."""

    @abstractmethod
    def open_scorer(self, spec: str) -> Scorer:
        """A scorer of these samples. Raises InputError as load_scorer does."""

    def make_all(self, scorer: str | None = None) -> None:  # noqa: B027  # files hold them
        """Make all samples before the first is used; they are kept until the output is complete.

        Raises InputError, before any is made, for a `scorer` that cannot be used.
        """

    @abstractmethod
    def cost(self) -> dict[str, Any]:
        """What they cost, for the manifest."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(  # noqa: B027  # files leave nothing to free
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Free what makes the samples."""


class Sampled(Source):
    """`n` samples of each prompt from a model."""

    def __init__(self, options: SamplerOptions, scoring: ScoringOptions, n: int, temperature: float, output: Output):
        """Raises InputError as Sampler does."""
        self.scoring, self.n = scoring, n
        self.sampler = Sampler(options, n, [temperature], output=output)
        self.shard, self.samples = self.sampler.shard, self.sampler.shard.count * n
        self.skipped = self.sampler.prompt_set.skipped
        self.holds_device = self.sampler.engine.before_scorer

    def groups(self, done: int, meter: log.Progress) -> Iterator[Groups]:
        for rows in self.sampler.rows(done, meter):
            yield [rows[part] for part in slices(len(rows), self.n)]

    def open_scorer(self, spec: str) -> Scorer:
        return self.sampler.open_scorer(spec, self.scoring)

    def make_all(self, scorer: str | None = None) -> None:
        self.sampler.sample_ahead(scorer, self.scoring)

    def cost(self) -> dict[str, Any]:
        return self.sampler.cost()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sampler.__exit__(kind, error, trace)


class Given(Source):
    """Samples that exist."""

    def __init__(self, options: GivenOptions, output: Output, sizes: Sequence[int], batches: Sequence[slice]):
        self.options, self.output = options, output
        self.shard = shard_range(options.shard, batches)
        self.batches = batches[self.shard.batches]
        self.samples = sum(sizes[self.shard.first : self.shard.first + self.shard.count])
        self.compute: Compute | None = None

    @abstractmethod
    def read(self, prompts: slice) -> Iterator[list[dict]]:
        """The samples of each prompt of a slice."""

    def groups(self, done: int, meter: log.Progress) -> Iterator[Groups]:
        left = self.batches[done:]
        found = self.read(slice(left[0].start, left[-1].stop)) if left else iter(())
        for batch in left:
            groups = [next(found) for _ in range(batch.stop - batch.start)]
            yield groups
            meter.advance(sum(map(len, groups)))

    def open_scorer(self, spec: str) -> Scorer:
        silence_transformers()
        self.compute = open_compute(self.options.device, self.options.dtype)
        options = scorer_options(self.options, self.compute, template_options(self.options, self.output))
        return load_scorer(spec, options)

    def cost(self) -> dict[str, Any]:
        if self.compute is None:
            return {}
        return {"peak_memory_bytes": self.compute.peak_memory_bytes(), "device": self.compute.name}


class InFiles(Given):
    """The samples of files."""

    def __init__(self, options: GivenOptions, output: Output, files: SampleFiles, skipped: Mapping[str, int]):
        """`skipped`: what was left out of other files."""
        super().__init__(options, output, files.sizes, files.batches(BATCH))
        self.files, self.skipped = files, dict(files.skipped) | dict(skipped)

    def read(self, prompts: slice) -> Iterator[list[dict]]:
        yield from self.files.groups(prompts)

    def groups(self, done: int, meter: log.Progress) -> Iterator[Groups]:
        yield from super().groups(done, meter)
        if self.files.ids_not_used:
            log.say(f"{self.files.ids_not_used} samples were edited since their token ids were stored: not used")


class Texts(Given):
    """Samples that are in memory, and have no token ids."""

    def __init__(self, options: GivenOptions, output: Output, groups: Groups, skipped: Mapping[str, int]):
        super().__init__(options, output, list(map(len, groups)), slices(len(groups), BATCH))
        self.texts, self.skipped = groups, skipped

    def read(self, prompts: slice) -> Iterator[list[dict]]:
        yield from self.texts[prompts]
