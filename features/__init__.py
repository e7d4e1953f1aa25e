"""Features on streams: declared by key, aggregate and window; computed exactly, as of any moment, in plain Python."""

from features.aggregates import (
    Aggregate,
    Count,
    EWMean,
    First,
    LastValue,
    Max,
    Mean,
    Min,
    MostFrequent,
    NUnique,
    Quantile,
    Rate,
    River,
    Std,
    Sum,
    TimeSince,
    Var,
)
from features.durations import duration, duration_text
from features.lookup import Lookup, LookupTable
from features.spec import Derived, Entity, Fields, Last
from features.state import EntityFeatures
from features.windows import Hopping, LastEvents, Lifetime, Session, Sliding, Tiled, Tumbling, Window

__all__ = [
    "Aggregate",
    "Count",
    "Derived",
    "EWMean",
    "Entity",
    "EntityFeatures",
    "Fields",
    "First",
    "Hopping",
    "Last",
    "LastEvents",
    "LastValue",
    "Lifetime",
    "Lookup",
    "LookupTable",
    "Max",
    "Mean",
    "Min",
    "MostFrequent",
    "NUnique",
    "Quantile",
    "Rate",
    "River",
    "Session",
    "Sliding",
    "Std",
    "Sum",
    "Tiled",
    "TimeSince",
    "Tumbling",
    "Var",
    "Window",
    "duration",
    "duration_text",
]
