"""From a config to trained networks: typed settings, the stages, one loop, checkpoints."""
