"""`millrace`, which is `python -m dataflows`."""

from __future__ import annotations

import os
import sys

from dataflows.hashing import HASH_SEED

REPEATING = frozenset({"audit", "dataset", "models", "score", "state"})
"""Commands that carry out again in their own process what workers did."""


def main() -> None:
    """The command's entry point.

    Strings must be hashed as in workers by what repeats their work. The interpreter takes the seed when it starts, so
    it starts again; before anything large is imported.
    """
    if sys.argv[1:2] and sys.argv[1] in REPEATING and os.environ.get("PYTHONHASHSEED") != HASH_SEED:
        os.environ["PYTHONHASHSEED"] = HASH_SEED
        os.execv(sys.executable, [sys.executable, "-m", "dataflows", *sys.argv[1:]])
    from dataflows.cli import main as command

    command()


if __name__ == "__main__":
    main()
