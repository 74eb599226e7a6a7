"""The papers' algorithms, as exchanges: generators that pause at their collectives."""
