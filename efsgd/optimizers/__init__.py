"""The optimizers, as torch.optim knows them."""
