"""A rank of torchrun that runs several command lines one after the other, since a start costs more than a small run."""

import json
import sys

from dpoctl.cli.app import run

if __name__ == "__main__":
    codes = [run(command) for command in json.loads(sys.argv[1])]
    print("CODES", codes, flush=True)
    sys.exit(max(codes))
