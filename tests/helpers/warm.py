"""dpoctl without its imports' five seconds: a server that has imported everything forks a process for each command
line.

`warm.py SOCKET ARGS...` is a command line of dpoctl, or of python where the first word ends in .py. The forked process
has the caller's folder, environment and standard streams, and its exit code is the caller's. Signals are passed on;
what a killed caller leaves is killed.
"""

import atexit
import json
import os
import runpy
import select
import signal
import socket
import sys

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def call(path: str, argv: list[str]) -> int:
    """Run a command line on the server at `path`; returns its exit code, or minus the signal that ended it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = json.dumps({"argv": argv, "cwd": os.getcwd(), "env": dict(os.environ)}).encode()
        socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(request)
        answers = server.makefile()
        pid = int(answers.readline())
        for each in PASSED_ON:
            signal.signal(each, lambda number, _: os.kill(pid, number))
        return int(answers.readline())


def serve(path: str) -> None:
    """Answer calls for ever; in a forked process return, as the caller."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                return _watch(caller)
            caller.close()


def _watch(caller: socket.socket) -> None:
    """Fork the command's process, where this returns, and tell the caller of its beginning and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(caller, 8, 3)
    request = json.loads(caller.makefile("rb").read(int.from_bytes(size, "big")))
    pid = os.fork()
    if pid == 0:
        caller.close()
        return _become(request, streams)
    caller.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, caller], [], [])[0]:  # the caller was killed
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    caller.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n".encode())
    os._exit(0)


def _become(request: dict, streams: list[int]) -> None:
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    argv = request["argv"]
    sys.argv = argv if argv and argv[0].endswith(".py") else ["dpoctl", *argv]


if __name__ == "__main__":
    path, *argv = sys.argv[1:]
    if argv != ["--serve"]:
        code = call(path, argv)
        sys.exit(code if code >= 0 else 128 - code)
    from dpoctl.__main__ import main
    from helpers import faults_warm, rank_faults  # noqa: F401

    serve(path)
    rank_faults.install()
    try:
        main() if sys.argv[0] == "dpoctl" else runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(e.code or 0)  # freeing what was imported would take longer than many a command
