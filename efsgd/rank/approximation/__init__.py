"""What of a layer is missed at a value, and how large that is in the mean over the workers."""
