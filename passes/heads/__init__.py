"""What passes that add draft heads share: checkpoints, the equations as graphs, and what a family of heads has."""
