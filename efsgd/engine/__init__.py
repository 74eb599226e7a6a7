"""What a step is made of: parameters, state, buckets, and the exchange over all of them."""
