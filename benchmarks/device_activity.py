"""What a step asks of a GPU: kernels, and waits of the host."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import Runner

LABEL = "the step that is counted"
# Each makes the host wait for the device, and so do copies to pageable memory, which wait within.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def device_activity(runner: Runner) -> dict[str, int]:
    """Counts in one step, after one that is not counted.

    Returns:
        `kernels` that were launched, and `waits` of the host for the device.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for label in ("warm-up", LABEL):
            runner.prepare()
            torch.cuda.synchronize()
            with record_function(label):
                runner.step()
            torch.cuda.synchronize()
    events = profiler.events() or []
    step = next(event.time_range for event in events if event.name == LABEL)
    kernels = waits = 0
    for event in events:
        if event.time_range.start < step.start:
            continue
        if event.device_type == DeviceType.CUDA:
            # The labels appear on the device's time line, too.
            kernels += not event.name.startswith(("Memcpy", "Memset", LABEL))
        else:
            waits += event.name in WAITS and event.time_range.end <= step.end
    return {"kernels": kernels, "waits": waits}
