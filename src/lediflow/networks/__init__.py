"""The networks: one family, the hourglass diffusion transformer (HDiT, arXiv 2401.11605)."""
