"""Mixtures of experts: the parts of a captured one."""
