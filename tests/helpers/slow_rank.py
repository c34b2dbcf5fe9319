"""A rank of two whose long single-rank parts take longer than --rank-timeout: SLOW names them, with seconds.

`python slow_rank.py ARGUMENT...` is `dpoctl ARGUMENT...`; SLOW is a JSON object from the name of a part to the seconds
that it takes longer on rank 0.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpoctl.cli import app


def slowed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The function; on rank 0 its first call creates the file `slow-PART` and waits."""
    seconds = json.loads(os.environ["SLOW"]).get(part, 0)

    def slow(*args: Any, **more: Any) -> Any:
        if seconds and os.environ.get("RANK") == "0" and not Path(f"slow-{part}").exists():
            Path(f"slow-{part}").touch()
            time.sleep(seconds)
        return function(*args, **more)

    return slow


def main() -> int:
    from dpoctl.outputs import claims
    from dpoctl.training import checkpoints, setup

    claims.describe_input = slowed(claims.describe_input, "hash")
    setup.load_policy = slowed(setup.load_policy, "load")
    setup.can_pack = slowed(setup.can_pack, "probe")
    checkpoints.sync_file = slowed(checkpoints.sync_file, "save")
    checkpoints._damage = slowed(checkpoints._damage, "verify")
    return app.run(sys.argv[1:])


if __name__ == "__main__":
    from dpoctl.runtime.rendezvous import exit_without_teardown

    code = main()
    exit_without_teardown(code)
    sys.exit(code)
