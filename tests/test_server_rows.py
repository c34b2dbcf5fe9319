"""sample and make-prefs with --engine server: every row once whatever the server does, kills, signals, and resumes."""

import fcntl
import signal

import pytest

from helpers.chain import lines_in, wait_until
from helpers.generation_server import GenerationServer
from helpers.ranks import start_ranks

LATE_S, IMPATIENT = 3.0, ("--timeout", "2")  # a busy machine takes more than a second
FAULTS = [(0.06, "500"), (0.06, "429"), (0.05, "closed"), (0.05, "garbage"), (0.05, "no ids"), (0.03, "late")]
N = 16
SAMPLE = f"sample --model lm --prompts train.jsonl --n {N} --max-new-tokens 8 --engine server --timeout 60".split()
SIDE_FILES = (".partial", ".progress", ".answers", ".plan.json")


def served_by(server, out: str, *more: str) -> list[str]:
    return [*SAMPLE, "--base-url", server.url, "--out", out, *more]  # a later option replaces an earlier one


def side_files(world, out: str) -> list[str]:
    return [suffix for suffix in SIDE_FILES if (world.folder / (out + suffix)).exists()]


@pytest.fixture(scope="module")
def lm(world):
    return world.folder / "lm"


@pytest.fixture(scope="module")
def calm(world, lm):
    """The bytes of 384 rows of a server that does nothing wrong."""
    with GenerationServer(lm) as server:
        world.run(*served_by(server, "calm.jsonl"))
        assert server.served.total() == len(server.served) == 24 * N and server.most_in_flight > 8
    assert side_files(world, "calm.jsonl") == []
    return world.digest("calm.jsonl")


@pytest.mark.slow
def test_hundreds_of_rows_through_faults_and_a_restart(world, lm, calm):
    with GenerationServer(lm, faults=FAULTS, restarts={190: {}}) as server:
        server.late_s = LATE_S
        world.run(*served_by(server, "faults.jsonl", *IMPATIENT))
        assert set(server.served.values()) == {1}
        faults = sum(server.kinds[kind] for _, kind in FAULTS)
        assert 0.25 < faults / (24 * N) < 0.35 and all(server.kinds[kind] for _, kind in FAULTS)
    assert world.digest("faults.jsonl") == calm and side_files(world, "faults.jsonl") == []
    rows = world.rows("faults.jsonl")
    assert len({(row["prompt_id"], row["k"]) for row in rows}) == len(rows) == 24 * N
    assert all(row["completion_ids"] and row["tokenizer"] for row in rows)
    cost = world.manifest("faults.jsonl")["cost"]
    assert cost["asked"] == 24 * N and cost["retries"] >= faults


@pytest.mark.slow
def test_a_thousand_rows_through_faults_and_a_restart(world, lm):
    for out, faults, restarts in (("calm-1008.jsonl", [], {}), ("faults-1008.jsonl", FAULTS, {500: {}})):
        with GenerationServer(lm, faults=faults, restarts=restarts) as server:
            server.late_s = LATE_S
            world.run(*served_by(server, out, "--n", "42", *IMPATIENT))
            assert set(server.served.values()) == {1} and server.served.total() == 1008
            assert all(server.kinds[kind] for _, kind in faults)
    assert world.digest("faults-1008.jsonl") == world.digest("calm-1008.jsonl")


def test_killed_and_resumed(world, lm, calm):
    """Only what was in flight is asked for twice; the rows of the batch before stay."""
    answers = world.folder / "killed.jsonl.answers"
    with GenerationServer(lm, delay_s=0.01) as server:
        command = served_by(server, "killed.jsonl", "--engine-batch-size", "160", "--concurrency", "8")
        process = world.popen(*command, command=world.warm)
        wait_until(lambda: server.served.total() > 230 and lines_in(answers) > 40, process)
        process.kill()
        process.communicate()
        wait_until(lambda: unlocked(world.folder / ".killed.jsonl.lock"))
        kept = lines_in(answers) - 1
        assert 40 <= kept <= 160  # of the second batch alone
        answers.write_bytes(answers.read_bytes()[:-7])  # the last line was not finished
        _, err = world.run(*command)
        assert f"{kept - 1} answers that the server gave before are used" in " ".join(err.split())
        twice = [key for key, times in server.served.items() if times > 1]
        assert server.served.total() == 24 * N + len(twice) and 1 <= len(twice) <= 1 + 8
    assert world.digest("killed.jsonl") == calm and side_files(world, "killed.jsonl") == []


def unlocked(path) -> bool:
    try:
        with open(path) as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@pytest.mark.slow
def test_a_signal_then_another_server(world, lm, calm):
    with GenerationServer(lm, delay_s=0.01) as server:
        command = served_by(server, "stopped.jsonl", "--engine-batch-size", "80")
        process = world.popen(*command, command=world.warm)
        wait_until(lambda: server.served.total() > 120, process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75 and "rerun the command to resume" in err, err
        before = server.served.total()
        server.version = "0.33.0"
        _, err = world.run(*command, code=2)
        assert "was started with engine version vllm 0.32.0, now it is vllm 0.33.0" in " ".join(err.split())
        server.version, server.weights = "0.32.0", "second"
        _, err = world.run(*command, code=2)
        assert "another model than at the start" in " ".join(err.split())
        assert server.served.total() == before
        server.weights = "w"
    with GenerationServer(lm) as moved:  # the same model at another address
        command[command.index("--base-url") + 1] = moved.url
        world.run(*command)
        assert before + moved.served.total() == 24 * N
    assert world.digest("stopped.jsonl") == calm


@pytest.mark.slow
def test_a_server_that_goes_away(world, lm, calm):
    """Of many connections some would be new, whose answers count only once the model is verified."""
    with GenerationServer(lm, delay_s=0.01, restarts={190: {}}, away_s=600) as server:
        command = served_by(server, "away.jsonl", "--retries", "1", "--engine-batch-size", "160", "--concurrency", "4")
        _, err = world.run(*command, code=75)
        assert "completions are pending" in err and "the other answers are kept" in " ".join(err.split())
        server.start()
        world.run(*command)
        assert set(server.served.values()) == {1}
    assert world.digest("away.jsonl") == calm


@pytest.mark.slow
def test_ranks_that_are_killed(world, lm, calm):
    """Each rank of torchrun keeps the answers to the requests of its own shard."""
    with GenerationServer(lm, delay_s=0.02) as server:
        command = served_by(server, "ranks.jsonl", "--concurrency", "4")
        ranks = start_ranks(world, *command, command=world.warm)
        wait_until(lambda: len(kept := kept_by(world)) == 2 and min(kept) > 30, *ranks)
        for rank in ranks:
            rank.kill()
            rank.communicate()
        wait_until(lambda: all(map(unlocked, world.folder.glob(".ranks*.lock"))))
        before = sum(kept_by(world))
        ranks = start_ranks(world, *command, command=world.warm)
        for rank in ranks:
            _, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
        assert 24 * N <= server.served.total() <= 24 * N + 8 and before > 60
    assert world.digest("ranks.jsonl") == calm and not list(world.folder.glob("ranks*.answers"))


def kept_by(world) -> list[int]:
    """How many answers each rank has kept."""
    return [lines_in(path) - 1 for path in world.folder.glob("ranks*.answers")]


def test_preferences_of_a_servers_samples(world, lm):
    with GenerationServer(lm, faults=[(0.1, "500"), (0.1, "closed")]) as server:
        world.run(
            "make-prefs --model lm --prompts train.jsonl --scorer classifier --max-new-tokens 8 --engine server "
            f"--base-url {server.url} --completions-out samples2.jsonl --out prefs2.jsonl"
        )
        assert len(server.served) == 96 and set(server.served.values()) == {1}
    samples = {(row["prompt_id"], row["k"]): row for row in world.rows("samples2.jsonl")}
    assert len(samples) == 96
    for pair in world.rows("prefs2.jsonl"):
        assert pair["chosen_ids"] == samples[pair["prompt_id"], pair["chosen_k"]]["completion_ids"]
        assert pair["chosen_score"] > pair["rejected_score"]


def test_an_evaluation_of_a_servers_samples(world, lm):
    """KL and rewards of the server's tokens, with dpoctl's own log-probs."""
    command = "evaluate --model lm --ref lm --prompts test.jsonl --scorer classifier --max-new-tokens 6 --engine server"
    with GenerationServer(lm, faults=[(0.1, "500")]) as server:
        _, err = world.run(command, f"--base-url {server.url} --n 3 --out evaluated.jsonl")
        assert len(server.served) == 36 and set(server.served.values()) == {1}
        assert "log-probs of the engine differ" in err
        _, err = world.run(command, f"--base-url {server.url} --model classifier --out two.jsonl", code=2)
        assert "the one model that is served" in " ".join(err.split())
    (row,) = world.rows("evaluated.jsonl")
    assert row["n"] == 36 and abs(row["kl"]) < 1e-4 and 0 <= row["reward"] <= 1
    assert side_files(world, "evaluated.jsonl") == []
