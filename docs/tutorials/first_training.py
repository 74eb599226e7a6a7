"""Learn to read handwritten digits, with compressed gradients, in one process."""

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16  # 1797 images of 8x8 pixels, as rows of 64 numbers
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 10),
)
optimizer = PowerSGDOptimizer(
    model.parameters(), lr=0.05, momentum=0.9, rank=4, momentum_form="sgd"
)

for epoch in range(1, 6):
    for batch in train[torch.randperm(len(train))].split(50):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    correct = model(images[test]).argmax(dim=1) == labels[test]
    print(f"epoch {epoch}: {100 * correct.float().mean():.1f} % of the test images are right")

stats = optimizer.communication_stats()
print(f"a step sends {stats['bytes_sent']} bytes instead of {stats['bytes_uncompressed']}")
