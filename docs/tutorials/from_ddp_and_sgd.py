"""Learn to read handwritten digits with compressed gradients and the rule of SGD."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer

dist.init_process_group("gloo")
worker, world_size = dist.get_rank(), dist.get_world_size()

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]
train = train[worker::world_size]

torch.manual_seed(worker)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 10),
)
optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9, rank=4, momentum_form="sgd")
optimizer.broadcast_parameters()
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.1)

for epoch in range(1, 6):
    for batch in train[torch.randperm(len(train))].split(25):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    scheduler.step()
    if worker == 0:
        correct = model(images[test]).argmax(dim=1) == labels[test]
        print(f"epoch {epoch}: {100 * correct.float().mean():.1f} % of the test images are right")

if worker == 0:
    print(f"a step sends {optimizer.communication_stats()['ratio']:.1f} times less")
dist.destroy_process_group()
