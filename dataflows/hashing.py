"""The seed of string hashes: the same in every process that computes results."""

from __future__ import annotations

HASH_SEED = "0"
"""river walks over sets in places, so sums depend on the hash seed; all workers use this one."""
