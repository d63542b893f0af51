"""Flow matching that starts at a learned prior."""

__version__ = "0.1.0"
