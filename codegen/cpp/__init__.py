"""Functions as fused C++."""
