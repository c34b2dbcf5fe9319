"""The base of the tasks that learn from preference pairs: DPO and the reward model."""

from ..data.encode import PairData
from ..runtime import collectives
from . import pairs
from .pairs import PairBatch
from .task import BatchTask, listed


class PairTask(BatchTask):
    """Batches of pairs whose completions are forwarded once; a subclass sets `data` and `stream`."""

    unit = "pairs"
    data: PairData

    def pair_batches(self, step: int) -> list[PairBatch]:
        """This rank's pairs of update `step` (0-based), in micro-batches."""
        rank, world = collectives.rank(), collectives.world_size()
        return pairs.micro_batches(self.data, self.stream.batch(step), self.config.tokens_per_batch, rank, world)

    def describe(self, step: int) -> str:
        return "rows at lines " + listed(self.data.lines[i] for i in self.stream.batch(step))
