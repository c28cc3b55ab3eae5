"""Everything that reads attention: one file an instrument, one accumulator contract (`base`)."""

from regard.instruments.base import (
    HeadMeasure,
    Instrument,
    RowInstrument,
    SeriesInstrument,
    TokenMeasure,
)
from regard.instruments.distance import WAAD, Distance
from regard.instruments.entropy import Entropy
from regard.instruments.influence import FutureInfluence
from regard.instruments.maps import PooledMaps
from regard.instruments.observe import Observation, observe, standard_instruments
from regard.instruments.profile import PatternProfile
from regard.instruments.sinks import Sink, SinkMass, SinkResult, Sinks

__all__ = [
    "WAAD",
    "Distance",
    "Entropy",
    "FutureInfluence",
    "HeadMeasure",
    "Instrument",
    "Observation",
    "PatternProfile",
    "PooledMaps",
    "RowInstrument",
    "SeriesInstrument",
    "Sink",
    "SinkMass",
    "SinkResult",
    "Sinks",
    "TokenMeasure",
    "observe",
    "standard_instruments",
]
