"""What each layer costs at a value: bytes, and time."""

__all__: list[str] = []
