"""A judge on a server that is asked in batches: submitted, watched and collected, and resumed after any kill.

What is in flight stands in the records, so that no request is asked twice. A batch that fails or expires gives what
it has; the rest is asked for in another batch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from .. import log
from ..config.judge_options import JudgeOptions
from ..errors import InputError, Interrupted
from ..outputs.claims import Output
from ..runtime import signals
from ..runtime.http import backoff_s
from ..runtime.server_errors import FATAL, ServerError
from .batch_files import MOST_REQUESTS, Result, parts, read_results, tokens_at_most
from .batch_records import Record, Records
from .batch_server import Batch, BatchServer, Refused
from .batched import BatchedRequests
from .client import Pending
from .connection import server_of

Lines = Mapping[str, str]  # of requests, by digest


class BatchClient(BatchedRequests):
    """Replies by the batches of a server."""

    def __init__(self, config: JudgeOptions, state: dict[str, Any], output: Output):
        """Raises InputError as BatchServer and Requests do."""
        super().__init__(config, state, output, server_of(config))
        self.batches = BatchServer(config, self)
        self.records = Records(self.cache.folder, self.server)
        self.most = MOST_REQUESTS  # of a batch
        self.is_full = False  # the server takes no more until one of the batches has ended

    def fetch(self, requests: Iterable[str]) -> None:
        """Raises InputError where the server refuses, or --max-cost may be exceeded; Interrupted on a signal."""
        asked = list(dict.fromkeys(requests))
        self._known.clear()
        lines = self.missing(asked)
        if not lines:
            return
        with log.progress("judge", len(asked), "answers in batches", len(asked) - len(lines)) as meter:
            try:
                while lines:
                    flying = self._flying(lines)
                    for record, batch in self._ended(flying, meter, len(asked) - len(lines)):
                        self._collect(record, batch, lines)
                    if self.is_full:
                        self.batches.wait(self.config.judge_batch_poll, "the batches before, which are recorded")
                    lines = self.missing(asked)
                    meter.advance(len(asked) - len(lines) - meter.done)
            except Pending as e:
                self.last_failure = str(e)

    # --- submitting

    def _flying(self, lines: Lines) -> list[Record]:
        """The batches in flight that hold some of the requests; what none holds is submitted.

        Empty where the server has refused its size: the next ones are smaller.
        """
        with self.records.locked():
            flying, held = [], set()
            for record in self.records.all():
                if lines.keys() & set(record.digests):
                    held.update(record.digests)
                    flying.append(record if record.batch_id else self._recover(record))
            left = {digest: line for digest, line in lines.items() if digest not in held}
            left = {digest: line for digest, line in left.items() if not self.cache.read(digest)}
            if left and not (self.is_full and flying):
                self._submit(left, flying)
        return flying

    def _recover(self, record: Record) -> Record:
        """The record of a batch that was being submitted as a command ended, which is submitted if it is not there."""
        try:
            record = record.named(self.batches.create(record, again=True))
        except Refused as e:
            self.records.remove(record)
            raise self.refuse(e.error) from None
        self.records.write(record)
        return record

    def _submit(self, left: Lines, flying: list[Record]) -> None:
        """Submit requests, and add the records of their batches to those in flight."""
        files = list(parts(left, self.most))
        tokens = {digest: tokens_at_most(line) for digest, line in left.items()}
        self._say_cost(sum(tokens.values()), len(left), len(files), flying)
        for lines in files:
            signals.at_boundary(f"{len(flying)} submitted batches, which the server goes on with")
            file_id = self.batches.upload("".join(lines.values()).encode())
            most = sum(tokens[digest] for digest in lines)
            record = self.records.new(file_id, lines, most, self.config.judge_max_tokens)
            try:
                record = record.named(self.batches.create(record))
            except Refused as e:
                self.records.remove(record)
                self._refused(e, record, others=bool(flying))
                return
            self.records.write(record)
            log.detail(f"the judge's server: batch {record.batch_id} with {len(lines)} requests is submitted")
            flying.append(record)

    def _refused(self, refused: Refused, record: Record, *, others: bool) -> None:
        """What becomes of a batch that the server does not take: it waits for `others`, or for its turn in parts.

        Raises InputError where neither helps.
        """
        if not refused.queue_is_full or (len(record.digests) == 1 and not others):
            raise self.refuse(refused.error)
        if others:
            self.is_full = True
            return
        self.most = (len(record.digests) + 1) // 2
        log.say(
            f"the judge's server takes no batch of {len(record.digests)} requests ({refused.error}); trying smaller"
        )

    def _say_cost(self, tokens: int, requests: int, files: int, flying: list[Record]) -> None:
        """Tell what is about to be asked. Raises InputError where that may exceed --max-cost."""
        limit, share = self.config.max_cost, 1 - self.config.batch_discount
        most = share * self.price(tokens, requests * self.config.judge_max_tokens)
        dollars = f", at most about {most:.4f} dollars" if self.priced else ""
        kind = "batch" if files == 1 else "batches"
        if limit is not None:
            before = self.dollars + sum(self._known.values())
            waiting = share * sum(self.price(r.tokens, len(r.digests) * r.answer_tokens) for r in flying)
            if before + waiting + most > limit * (1 + 1e-9):
                raise InputError(
                    f"--max-cost {limit:g} may be exceeded: {requests} requests in {files} {kind} cost at most about "
                    f"{most:.4f} dollars, the answers so far {before:.4f}, batches in flight at most {waiting:.4f}",
                    hint="nothing was submitted; raise --max-cost, or judge fewer comparisons with --limit",
                )
        log.say(f"submitting {requests} requests in {files} {kind}{dollars}")

    # --- collecting

    def _ended(self, flying: list[Record], meter: log.Progress, before: int) -> list[tuple[Record, Batch]]:
        """The batches that have ended, once there are any; none where another process has collected one."""
        while flying:
            found = [(record, self.batches.look(record.batch_id)) for record in flying]
            ended = [(record, batch) for record, batch in found if batch.has_ended]
            if ended or not all(self.records.path(record).exists() for record in flying):
                return ended
            answered = sum((batch.answered or 0) + (batch.failed or 0) for _, batch in found)
            states = sorted({batch.status for _, batch in found})
            meter.advance(before + answered - meter.done, batches=f"{len(flying)} {'/'.join(states)}")
            plural = "es are" if len(flying) > 1 else " is"
            done = f"{len(flying)} batch{plural} submitted, which the server goes on with"
            self.batches.wait(self.config.judge_batch_poll, done)
        return []

    def _collect(self, record: Record, batch: Batch, wanted: Lines) -> None:
        """Keep the replies of a batch that has ended. Raises Interrupted for one that somebody has cancelled."""
        wanted = {digest: wanted[digest] for digest in record.digests if digest in wanted}
        results = self._download(record, batch, wanted)
        try:
            fatal = self.receive(results, wanted)
        except InputError:  # every answer is kept
            self.records.remove(record)
            raise
        absent = [digest for digest in wanted if digest not in results]
        self.is_full = False
        self.records.remove(record)
        if fatal:
            raise self.refuse(fatal)
        if batch.status == "cancelled" and absent:
            raise Interrupted(
                f"batch {record.batch_id} was cancelled: {len(absent)} of its {len(record.digests)} requests are left",
                hint="rerun the command to ask for these in another batch",
            )
        if absent:
            self._ask_again(record, batch, absent)

    def _ask_again(self, record: Record, batch: Batch, absent: list[str]) -> None:
        """Note that requests of a batch which has ended have no result. Raises InputError where none would have."""
        error = batch.error or ServerError(500, f"batch {record.batch_id}: {batch.status}")
        refused = Refused(error)
        log.warn(f"batch {record.batch_id}: {batch.status}, {len(absent)} requests have no answer: {error}")
        if batch.status == "failed":
            if refused.queue_is_full:
                others = any(other.batch_id for other in self.records.all())
                return self._refused(refused, record, others=others)
            if self.learn(self.parameters, error):
                return None
            if error.kind == FATAL:
                raise self.refuse(error)
        return self.failed(absent, f"batch {batch.status}: {error}")

    def _download(self, record: Record, batch: Batch, wanted: Lines) -> dict[str, Result]:
        """The results of a batch. What the server has answered is paid for, so that a file without it is read again.

        Raises Pending where a file stays incomplete; the answers in it are kept.
        """
        for attempt in range(self.config.judge_retries + 1):
            if attempt:
                self.batches.wait(backoff_s(attempt - 1), "the batches before, whose answers are cached")
                batch = self.batches.look(record.batch_id)
            found: dict[str, Result] = {}
            damaged = 0
            for file_id in batch.files:
                read = read_results(self.batches.download(file_id), self.batches.connection.key)
                damaged += read.damaged
                found |= {digest: result for digest, result in read.found.items() if digest not in found}
            found = {digest: found[digest] for digest in record.digests if digest in found}
            if not damaged and _is_complete(record, batch, found):
                return found
        self.receive({digest: result for digest, result in found.items() if result.answer}, wanted)
        raise Pending(
            f"the files of batch {record.batch_id} are incomplete: {len(found)} of {len(record.digests)} results"
        )


def _is_complete(record: Record, batch: Batch, found: Mapping[str, Result]) -> bool:
    """Whether all results are there that the server says it has. Some servers count nothing, or not all."""
    answered = sum(result.answer is not None for result in found.values())
    counted = (batch.answered or 0) + (batch.failed or 0)
    if answered < (batch.answered or 0) and len(found) < counted:
        return False
    if batch.status != "completed" or len(found) == len(record.digests):
        return True
    return batch.answered is not None and len(found) <= counted < len(record.digests)
