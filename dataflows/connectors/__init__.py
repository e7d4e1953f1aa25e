"""Inputs and outputs of jobs: files, topics of Kafka, standard input and output, and objects in memory."""

from dataflows.connectors.files import Csv, Jsonl, Stdin, Stdout
from dataflows.connectors.kafka import Kafka, Security
from dataflows.connectors.memory import Memory

__all__ = ["Csv", "Jsonl", "Kafka", "Memory", "Security", "Stdin", "Stdout"]
