"""Distances and shares between two sets of features or images; nothing here knows models or datasets."""
