"""train.main under torchrun, with first-step gradients kept, or a crash at a step: see test_distributed.py."""

import os
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import gmt
import train
from common import run_folder

mask_gradients = gmt.Masker.mask_gradients


def keep_gradients(self, step, **kwargs):
    """Store the accumulated gradients of the first step, before masking."""
    if step == 0 and "GRADIENTS" in os.environ and os.environ["RANK"] == "0":
        torch.save({n: p.grad.clone() for n, p in self.eligible.items()}, os.environ["GRADIENTS"])
    return mask_gradients(self, step, **kwargs)


backward = train.backward


def gradients_lie_in_buckets(model, *args):
    """Under DDP there is one copy of the gradients, in the buckets, before and after each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def places():
        return [(p.grad.data_ptr(), p.grad.untyped_storage().data_ptr()) for p in parameters]

    before = places()
    sums = backward(model, *args)
    assert places() == before, "a gradient has moved"
    storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in parameters}
    assert sum(storages.values()) == sum(p.grad.nbytes for p in parameters), "gradients lie outside of the buckets"
    assert len(storages) < len(parameters) / 2
    return sums


write = run_folder.Log.write


def crash(self, line):
    """Die after the step has been logged, before anything else."""
    write(self, line)
    if line["step"] == int(os.environ.get("CRASH_AT", "0")) and os.environ.get("RANK", "0") == "0":
        os._exit(9)


def exact_norm(self, x):
    """RMSNorm in the dtype of x. transformers' one rounds an fp64 model's activations to fp32: a last bit that differs
    between two splits then flips a rounding, and AdamW makes it 1e-8 of a weight."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


load_trainable_model = train.load_trainable_model


def load_with_unused_weight(*args):
    """The model, and a matrix of ones that no step uses."""
    model = load_trainable_model(*args)
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(4, 5, dtype=model.dtype)))
    return model


def main(words: list[str]) -> None:
    """A training with the changes above; or several, parted by "+", since the start of processes takes longest."""
    if "float64" in words:
        LlamaRMSNorm.forward = exact_norm
    gmt.Masker.mask_gradients = keep_gradients
    run_folder.Log.write = crash
    if "APART" in os.environ:  # as on machines that share no file system
        os.chdir(os.path.join(os.environ["APART"], os.environ["RANK"]))
        run_folder.refuse_separate_folders.__defaults__ = (0,)
    if "UNUSED" in os.environ:
        train.load_trainable_model = load_with_unused_weight
    end_training, Accelerator.end_training = Accelerator.end_training, lambda self: None  # the process group stays
    while "+" in words:
        end = words.index("+")
        train.main(words[:end])
        AcceleratorState._reset_state()
        words = words[end + 1 :]
    Accelerator.end_training = end_training
    train.main(words)


if __name__ == "__main__":
    if "BUCKETS" in os.environ:
        train.backward = gradients_lie_in_buckets
    main(sys.argv[1:])
