"""Prompt sets: GenEval-style training prompts of our own making, and the official files, fetched from their homes."""
