"""Optimizer groups and the learning-rate schedule."""
