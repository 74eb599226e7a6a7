"""What each layer costs at a value: bytes, and time."""
