"""Data sets of the examples: what is bundled with Python packages, and readers of files."""
