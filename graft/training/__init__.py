"""Training: draft heads on the target's text, hidden states and distributions; routers of feed-forwards."""

from graft.training.export import export_heads
from graft.training.options import TrainOptions
from graft.training.routers import RouterOptions, train_routers
from graft.training.run import train_heads

__all__ = ["RouterOptions", "TrainOptions", "export_heads", "train_heads", "train_routers"]
