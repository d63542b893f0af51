"""Does the learned prior help? What is measured of a trained model, and the verdicts."""
