"""Rewards: one contract, one file a reward, imported by name when used."""
