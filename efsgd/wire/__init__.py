"""What travels between workers, and who carries it."""
