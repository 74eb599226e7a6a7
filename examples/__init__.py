"""Training with efsgd on real data, on any number of workers."""
