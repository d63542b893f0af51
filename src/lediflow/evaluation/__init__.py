"""Measure what the models give: features, distances, time."""
