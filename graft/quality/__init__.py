"""What compressing the KV cache costs: an arm for each plan beside the full cache, on held text and in memory."""

from graft.quality.arms import Candidate
from graft.quality.losses import Estimate, Losses
from graft.quality.measuring import Options, measure, measured
from graft.quality.metrics import Bootstrap, Interval
from graft.quality.report import Quality, Result
from graft.quality.texts import Documents, own_documents, read_documents

__all__ = [
    "Bootstrap",
    "Candidate",
    "Documents",
    "Estimate",
    "Interval",
    "Losses",
    "Options",
    "Quality",
    "Result",
    "measure",
    "measured",
    "own_documents",
    "read_documents",
]
