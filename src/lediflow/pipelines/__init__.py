"""Trained networks behind one call: from a seed to images."""
