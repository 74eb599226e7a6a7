"""Learn to read handwritten digits, with compressed gradients, on several workers."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer

dist.init_process_group("gloo")  # "nccl" where every worker has a GPU
worker, world_size = dist.get_rank(), dist.get_world_size()

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16  # 1797 images of 8x8 pixels, as rows of 64 numbers
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]
train = train[worker::world_size]  # this worker's share

torch.manual_seed(worker)  # workers may start as they like, and draw batches as they like
model = torch.nn.Sequential(
    torch.nn.Linear(64, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 10),
)
optimizer = PowerSGDOptimizer(
    model.parameters(), lr=0.05, momentum=0.9, rank=4, momentum_form="sgd"
)
optimizer.broadcast_parameters()  # all start from the parameters of worker 0

for epoch in range(1, 6):
    for batch in train[torch.randperm(len(train))].split(25):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()  # gradients of this worker's batch
        optimizer.step()  # compress, average over the workers, decompress, update
    if worker == 0:
        correct = model(images[test]).argmax(dim=1) == labels[test]
        print(f"epoch {epoch}: {100 * correct.float().mean():.1f} % of the test images are right")

if worker == 0:
    stats = optimizer.communication_stats()
    print(
        f"a step sends {stats['bytes_sent']} bytes instead of {stats['bytes_uncompressed']}, "
        f"in {stats['collectives']} collectives"
    )
dist.destroy_process_group()
