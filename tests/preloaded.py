"""What workers of tests need, loaded once: they are forked from a process that has it."""

import contextlib
import gc
import importlib
import warnings

#: torch's compiler is loaded by the first optimizer that is made; frameworks may be missing.
MODULES = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.algorithms.join",
    "torch.distributed.pipelining",
    "efsgd.checkpoint",
    "efsgd.privacy",
    "efsgd.rank",
    "efsgd.testing",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "accelerate",
    "lightning",
    "transformers",
    "transformers.models.gpt2.modeling_gpt2",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

gc.freeze()  # else the first collection in each process would copy all that it shares
