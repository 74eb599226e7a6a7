"""Thin factors and their products."""
