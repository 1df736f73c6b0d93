"""Runs the model alone on a recorded log: ``python tests/replay.py build/sim/<run>/log.jsonl``.

Exit status 0 and the number of comparisons when card and model agree, 1 and the difference when they do not, 2 when the
file is no log.
"""

import sys
import time

from ringwall.sim.log import read_log
from ringwall.sim.scoreboard import Difference
from ringwall.sim.session import replay


def main(arguments):
    """Replay the log named by the only argument; return the exit status."""
    if len(arguments) != 1:
        print("usage: python tests/replay.py log.jsonl", file=sys.stderr)
        return 2
    begin = time.perf_counter()
    try:
        header, events = read_log(arguments[0])
        print(f"commit {header.commit}, seed {header.seed}, {', '.join(f'{k} {v}' for k, v in header.parameters.items())}")
        board = replay(header, events).board
    except (OSError, ValueError) as error:
        print(f"{arguments[0]} is no log that can be replayed: {error}", file=sys.stderr)
        return 2
    except Difference as difference:
        print(difference)
        return 1
    seconds = time.perf_counter() - begin
    print(f"{board.events} events, {board.comparisons} comparisons, {board.differences} differences, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
