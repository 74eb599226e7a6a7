"""What a swap-in for torch.optim.SGD has to do, asked of this package and of its peers."""
