"""From a model to rows and a report: quality, network evaluations, time."""
