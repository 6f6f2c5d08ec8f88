"""Tensor parallelism for `GPT`, by PyTorch's own: torch.distributed.tensor.parallel over a device mesh.

DDP, fully_shard and context_parallel take a GPT as it is. Cutting matrices needs a plan, which is this file's; other models
have plans of their own, and the functions of gpt_kernels take the DTensors that come of them (sharding.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .models.gpt import GPT


class PackedLinear(nn.Linear):
    """Of three matrices in one, each cut over a mesh: a process's own rows. x: a DTensor, whole; returns a Tensor.

    On local parts, since the rules of torch 2.10 for its products do not know such a cut."""

    def forward(self, x: Any) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        x = x.to_local(grad_placements=[Partial()])
        parts = (p.to_local() if isinstance(p, DTensor) else p for p in (self.weight, self.bias))
        return nn.functional.linear(x, *parts)


def tensor_parallel(model: GPT, mesh: Any) -> GPT:
    """Cuts the model's matrices over a one-dimensional DeviceMesh of n processes, in place, and returns it.

    Megatron's plan with sequence parallelism: each process has 1/n of the heads, of the MLP's hidden width and of the
    vocabulary, and between those of the sequence. All parameters become DTensors with the values, names and shapes of before,
    c_attn's too, whose rows are q's, k's and v's one after another and are cut in each of the three. idx and targets are the
    same on all processes, and so are logits and loss.

    Under torch 2.10 full_tensor() of c_attn's parameters fails in torch, which cannot put together what is cut so.

    fully_shard does not go on top of it: it cuts c_attn's rows once more without regard to what they are, and the gradient
    would be another (the forward raises RuntimeError). Over more processes than n, average gradients, by DDP's hook or
    all_reduce.

    Sequence lengths are multiples of n (RuntimeError). No generation with a cache. With dropout, let each process have a
    seed of its own once the model is made: what is dropped are its own heads and tokens. Raises TypeError for another model,
    ValueError for a mesh of more dimensions, and for heads or a hidden width that n does not divide.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleOutput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )
    from torch.distributed.tensor.placement_types import _StridedShard
    from torch.nn import Parameter

    if not isinstance(model, GPT):
        raise TypeError(f"tensor_parallel: model must be a gpt_kernels.GPT, got {type(model).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"tensor_parallel: mesh must have one dimension, got {mesh.ndim}: take one of them, mesh['tp']")
    n, config = mesh.size(), model.config
    for what, size in (("n_head", config.n_head), ("n_inner", config.n_inner)):
        if size % n:
            raise ValueError(f"tensor_parallel: {what} {size} must be a multiple of the mesh's {n} processes")

    class PackedColwise(ColwiseParallel):
        """Of three matrices in one, cut in each."""

        def _apply(self, module, device_mesh):
            def partition(name, module, device_mesh):
                for key, p in list(module.named_parameters(recurse=False)):
                    cut = distribute_tensor(p.detach(), device_mesh, [_StridedShard(0, split_factor=3)])
                    module.register_parameter(key, Parameter(cut, requires_grad=p.requires_grad))

            def inputs(module, args, device_mesh):
                return self._prepare_input_fn(self.input_layouts, self.desired_input_layouts, module, args, device_mesh)

            module.__class__ = PackedLinear
            return distribute_module(module, device_mesh, partition, inputs)

    def fitting(module, args):
        # of a module around the model nothing is to be seen but that the parameters are others
        own = all(hasattr(p, "_cut_in_three") for block in model.transformer.h for p in block.attn.c_attn.parameters())
        if not own and FSDPModule.__subclasses__():
            raise RuntimeError(
                "tensor_parallel: c_attn's parameters were replaced since, by fully_shard it seems, under which their gradient "
                "would be wrong: their rows are q's, k's and v's, each cut by itself, which it does not know; all_reduce the "
                "gradients instead"
            )
        if args[0].shape[1] % n:
            raise RuntimeError(
                f"GPT: under tensor_parallel a sequence length must be a multiple of {n}, got {args[0].shape[1]}"
            )

    tied, rows, tokens = model.tied, Shard(0), Shard(1)
    plan: dict[str, Any] = {
        "transformer.wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "transformer.wpe": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        "transformer.h.*.ln_1": SequenceParallel(use_local_output=True),
        "transformer.h.*.attn.c_attn": PackedColwise(input_layouts=tokens),
        "transformer.h.*.attn.c_proj": RowwiseParallel(output_layouts=tokens),
        "transformer.h.*.ln_2": SequenceParallel(use_local_output=True),
        "transformer.h.*.mlp.c_fc": ColwiseParallel(input_layouts=tokens),
        "transformer.h.*.mlp.c_proj": RowwiseParallel(output_layouts=tokens),
        "transformer.ln_f": SequenceParallel(use_local_output=True),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    for block in model.transformer.h:
        for p in block.attn.c_attn.parameters():
            p._cut_in_three = True
    # all of the sequence where the last position is asked for
    gathered = PrepareModuleOutput(output_layouts=tokens, desired_output_layouts=Replicate())
    parallelize_module(model.transformer.ln_f, mesh, gathered)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    model.transformer.wte.register_forward_pre_hook(fitting, prepend=True)
    return model
