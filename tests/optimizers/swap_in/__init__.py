"""What makes an optimizer a swap-in for torch.optim.SGD, line by line.

Lines are grouped and numbered, A1 to H5. Every test names its line, in its docstring or its id, and
each file says in its docstring what the lines of its group are about.
"""
