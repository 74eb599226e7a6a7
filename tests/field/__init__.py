"""What real programs do to an optimizer, in any order."""
