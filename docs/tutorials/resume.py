"""Train on several workers; after a crash, go on from the last checkpoint."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import consolidated_state_dict

checkpoint = Path(sys.argv[1])  # a file that all workers can read
crashes = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" and "--crash" in sys.argv

dist.init_process_group("gloo")
worker, world_size = dist.get_rank(), dist.get_world_size()

images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
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
epochs_done = 0

if checkpoint.exists():  # every worker loads the same file
    saved = torch.load(checkpoint)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    epochs_done = saved["epochs_done"]
    if worker == 0:
        print(f"resumed after epoch {epochs_done}", flush=True)

for epoch in range(epochs_done + 1, 6):
    # The order of an epoch depends on its number alone: it is the same after a crash.
    generator = torch.Generator().manual_seed(epoch)
    shuffled = train[torch.randperm(len(train), generator=generator)]
    for step, batch in enumerate(shuffled[worker::world_size].split(50 // world_size)):
        if crashes and worker == 1 and epoch == 3 and step == 10:
            print("worker 1 is killed in epoch 3", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()

    averaged = consolidated_state_dict(optimizer)  # every worker calls it
    if worker == 0:
        state = {"model": model.state_dict(), "optimizer": averaged, "epochs_done": epoch}
        unfinished = checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(checkpoint)  # complete or not there, whenever a worker dies
        correct = model(images[test]).argmax(dim=1) == labels[test]
        accuracy = 100 * correct.float().mean()
        print(f"epoch {epoch}: {accuracy:.1f} % of the test images are right", flush=True)

dist.destroy_process_group()
