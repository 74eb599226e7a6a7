"""What goes with other parts of torch."""
