"""Inputs and outputs of jobs: files, standard input and output, and objects in memory."""

from dataflows.connectors.files import Csv, Jsonl, Stdin, Stdout
from dataflows.connectors.memory import Memory

__all__ = ["Csv", "Jsonl", "Memory", "Stdin", "Stdout"]
