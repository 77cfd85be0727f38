"""Scores against scores, beside published results."""
