"""Training draft heads: the target's text and its distributions, hidden states stored once, a loop that resumes."""

from graft.training.options import TrainOptions
from graft.training.run import train_heads

__all__ = ["TrainOptions", "train_heads"]
