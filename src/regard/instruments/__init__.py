"""Everything that reads attention: one file an instrument, one accumulator contract (`base`)."""

from regard.instruments.base import (
    HeadMeasure,
    Instrument,
    RowInstrument,
    SeriesInstrument,
    TokenMeasure,
)
from regard.instruments.between_heads import HeadDivergence, js_divergence_between_heads
from regard.instruments.causal import CausalTwin, causal_twin
from regard.instruments.context_walk import ContextWalk, context_walk, order_effect
from regard.instruments.distance import WAAD, Distance
from regard.instruments.domains import DomainSensitivity, Dormancy, domain_sensitivity
from regard.instruments.dormant import DormantHeads, dormant_heads
from regard.instruments.entropy import Entropy
from regard.instruments.geometry import BosCosine, QueryKeyAngle, norm_report, qk_angle_report
from regard.instruments.importance import HeadImportance, head_importance
from regard.instruments.influence import FutureInfluence
from regard.instruments.kv_drift import KVDrift
from regard.instruments.maps import PooledMaps
from regard.instruments.massive import CapMassive, DoseResponse, dose_response
from regard.instruments.needles import RetrievalReport
from regard.instruments.norms import HeadOutputNorms
from regard.instruments.observe import Observation, observe, standard_instruments
from regard.instruments.outputs import MeanOutput, mean_outputs
from regard.instruments.probes import DuplicateToken, Induction, PreviousToken, probe_heads
from regard.instruments.profile import PatternProfile
from regard.instruments.retrieval import RetrievalHeads, retrieval_heads
from regard.instruments.rhythm import Rhythm, coupling_report, read_rhythm, split_heads
from regard.instruments.sinks import Sink, SinkMass, SinkResult, Sinks
from regard.instruments.stream import ResidualPeaks, Skyline
from regard.instruments.values import ValueDrain
from regard.instruments.walk import TextWalk, WalkRecorder, embedding_walk, record_walk
from regard.instruments.writers import Writers

__all__ = [
    "BosCosine",
    "CapMassive",
    "CausalTwin",
    "ContextWalk",
    "Distance",
    "DomainSensitivity",
    "Dormancy",
    "DormantHeads",
    "DoseResponse",
    "DuplicateToken",
    "Entropy",
    "FutureInfluence",
    "HeadDivergence",
    "HeadImportance",
    "HeadMeasure",
    "HeadOutputNorms",
    "Induction",
    "Instrument",
    "KVDrift",
    "MeanOutput",
    "Observation",
    "PatternProfile",
    "PooledMaps",
    "PreviousToken",
    "QueryKeyAngle",
    "ResidualPeaks",
    "RetrievalHeads",
    "RetrievalReport",
    "Rhythm",
    "RowInstrument",
    "SeriesInstrument",
    "Sink",
    "SinkMass",
    "SinkResult",
    "Sinks",
    "Skyline",
    "TextWalk",
    "TokenMeasure",
    "ValueDrain",
    "WAAD",
    "WalkRecorder",
    "Writers",
    "causal_twin",
    "context_walk",
    "coupling_report",
    "domain_sensitivity",
    "dormant_heads",
    "dose_response",
    "embedding_walk",
    "head_importance",
    "js_divergence_between_heads",
    "mean_outputs",
    "norm_report",
    "observe",
    "order_effect",
    "probe_heads",
    "qk_angle_report",
    "read_rhythm",
    "record_walk",
    "retrieval_heads",
    "split_heads",
    "standard_instruments",
]
