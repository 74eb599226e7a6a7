"""Few bits for each number, and means of what is sent so."""
