"""Train a small classifier on two workers.

torchrun --standalone --nproc-per-node 2 docs/train.py
"""

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer

dist.init_process_group("gloo")  # "nccl" where every worker has a GPU
worker, world_size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same task and the same model on every worker
inputs = torch.randn(1024, 64)
targets = (inputs @ torch.randn(64, 10)).argmax(dim=1)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 256),
    torch.nn.ReLU(),
    torch.nn.Linear(256, 10),
)

inputs, targets = inputs[worker::world_size], targets[worker::world_size]  # this worker's share

optimizer = PowerSGDOptimizer(model.parameters(), lr=0.05, momentum=0.9, rank=4)
optimizer.broadcast_parameters()

for step in range(101):
    optimizer.zero_grad()
    loss = cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    if worker == 0 and step % 20 == 0:
        print(f"step {step:3d}  loss on worker 0: {loss.item():.3f}")

if worker == 0:
    stats = optimizer.communication_stats()
    print(
        f"{stats['collectives']} collectives per step, {stats['bytes_sent']} bytes instead of "
        f"{stats['bytes_uncompressed']}: {stats['ratio']:.1f} times less"
    )

dist.destroy_process_group()
