"""Which rank each layer is sent with."""
