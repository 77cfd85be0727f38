"""Detectors with learned weights, for rewards that look for objects in photographs."""
