"""The fraud job with a forest: what an audit costs with a large model that learns slowly."""

from __future__ import annotations

from river import forest

from examples.fraud.job import job as fraud

job = fraud.changed(name="bench_forest", model=forest.ARFClassifier(n_models=10, seed=1))
