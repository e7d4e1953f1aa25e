"""Kafka topics as inputs and outputs, with kafka-python; see `Kafka`."""

from dataflows.connectors.kafka.security import Security
from dataflows.connectors.kafka.topic import Kafka

__all__ = ["Kafka", "Security"]
