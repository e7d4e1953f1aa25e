"""`python -m dataflows.worker JOB INPUTS`: one worker process, started by the launcher and by nobody else."""

from __future__ import annotations

import json
import sys

from dataflows.runtime import work

if __name__ == "__main__":
    work(sys.argv[1], *json.loads(sys.argv[2]))
