"""`python -m tests.benchmarks.kafka_load BROKERS TOPIC RATE SECONDS`: transactions at a steady rate, stamped when sent.

Prints how many were sent.
"""

from __future__ import annotations

import sys
import time
from random import Random

from kafka import KafkaProducer

TICK_S = 0.002


def main(brokers: str, topic: str, rate: float, seconds: float) -> None:
    """Send in ticks; a tick that comes late sends what is due."""
    rng = Random(7)
    producer = KafkaProducer(bootstrap_servers=brokers, linger_ms=1, batch_size=1 << 18)
    sent, began = 0, time.monotonic()
    while (passed := time.monotonic() - began) < seconds:
        due = int(passed * rate)
        for number in range(sent, due):
            customer = rng.randrange(5_000)
            row = (
                f'{{"tx_id":{number},"ts":{int(time.time() * 1000)},"customer":{customer},'
                f'"terminal":{rng.randrange(10_000)},"amount":{rng.expovariate(0.02):.2f},'
                f'"fraud":{str(rng.random() < 0.01).lower()}}}'
            )
            producer.send(topic, row.encode(), str(customer).encode())
        sent = due
        time.sleep(TICK_S)
    producer.flush(60)
    producer.close()
    sys.stdout.write(f"{sent}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
