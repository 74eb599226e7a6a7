"""Who decides on ranks."""
