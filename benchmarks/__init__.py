"""Measurements of what a step costs, beside SGD and beside other implementations of PowerSGD."""
