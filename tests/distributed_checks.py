"""What tests/test_distributed.py has several processes of one machine do, over gloo: a function a check, the same in each.

A check compares with one process by accuracy.py's rule, the loss and every gradient, and returns how many tensors it compared.
"""

import copy
import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gpt_kernels.distributed
from gpt_kernels import GPT, GPTConfig, cases, names, sharding
from gpt_kernels.accuracy import MODEL_GRADIENT, MODEL_OUTPUT, assert_close_to_truth, relative_error

V, T, BATCH = 96, 16, 4


# ---- processes ----


def run(checks, processes, kept=None):
    """{check: number of compared tensors, or the traceback of the first process that failed}, of checks by name. kept: a folder
    for the checks instead of one that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_worker, (checks, processes, folder, kept or folder), nprocs=processes, join=False)
        try:
            while not context.join():
                pass
        except Exception as error:
            return {check: f"the processes ended: {error}" for check in checks}
        found = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(processes)]
    return {c: next((r[c] for r in found if not isinstance(r[c], int)), found[0][c]) for c in checks}


def _worker(rank, checks, processes, folder, kept):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    results = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            results[check] = globals()[check](os.path.join(kept, check))
        except Exception:
            results[check] = f"process {rank} of {processes}\n{traceback.format_exc()}"
        # a check that only some processes came through leaves the others in a collective: all end here
        if not _all_well(results[check]):
            results |= {c: results.get(c, f"not run, {check} failed:\n{results[check]}") for c in checks}
            break
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def _all_well(result):
    well = torch.tensor(int(isinstance(result, int)))
    dist.all_reduce(well, dist.ReduceOp.MIN)
    return bool(well)


def world():
    return dist.get_world_size()


# ---- the ops on DTensors ----


def full(t):
    if not sharding.spread(t):
        return t
    if torch.__version__ < "2.13" and any(type(p).__name__ == "_StridedShard" for p in t.placements):
        return _of_three(t.to_local().contiguous())  # which full_tensor() cannot put together there
    return t.full_tensor()


def _of_three(local):
    """The whole of three matrices in one, each cut."""
    parts = [torch.empty_like(local) for _ in range(world())]
    dist.all_gather(parts, local)
    return torch.cat([part.unflatten(0, (3, -1)) for part in parts], 1).flatten(0, 1)


def placements_of(x, mesh):
    """Of a first argument, in words and for the mesh: whole, a sum of parts, cut in each dimension."""
    from torch.distributed.tensor import Replicate, Shard

    yield "whole", [Replicate()]
    for d in range(x.dim()):
        yield f"cut in {d}", [Shard(d)]


def check_example(example, mesh, places):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.experimental import implicit_replication

    def leaves(dtype=None):
        return [
            a.detach().to(dtype or a.dtype).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in example.args
        ]

    def wanted(args):
        return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def results(call, args, dy):
        y = call(*args)
        grads = torch.autograd.grad(y, wanted(args), dy.to(y.dtype), allow_unused=True, materialize_grads=True)
        return y.detach(), *grads

    random = []
    drawn, sharding.Parts.random = sharding.Parts.random, lambda self, s: random.append(self.cut) or drawn(self, s)
    try:
        args = leaves()
        others = [[Replicate()], [Shard(0)]]
        given = [
            distribute_tensor(a.detach(), mesh, places if i == 0 else others[i % 2 if a.dim() else 0]).requires_grad_(
                a.requires_grad
            )
            if isinstance(a, torch.Tensor)
            else a
            for i, a in enumerate(args)
        ]
        with implicit_replication():  # of what an example's function holds itself
            y = example.ours(*given)
        assert sharding.spread(y), "the result is no DTensor"
        dy = torch.randn(y.shape)
        dist.broadcast(dy, 0)
        # an output gradient that lies otherwise than the output
        way = [Replicate()] if places[0] != Replicate() or not y.dim() else [Shard(y.dim() - 1)]
        grads = torch.autograd.grad(
            y, wanted(given), distribute_tensor(dy.to(y.dtype), mesh, way), allow_unused=True, materialize_grads=True
        )
    finally:
        sharding.Parts.random = drawn
    assert y.shape == example.eager(*example.args).shape
    if any(any(d is not None for d in cut) for cut in random):
        assert full(y).isfinite().all()  # another mask than one process draws
        return 1
    truth = results(example.eager, leaves(torch.float64), dy)
    eager = results(example.eager, leaves(), dy)
    for i, (a, t, e) in enumerate(zip((full(y.detach()), *map(full, grads)), truth, eager, strict=True)):
        name = f"{'gradient' * bool(i)} {i - 1 if i else 'output'}"
        assert_close_to_truth(a, t, e, example.factors[min(i, len(example.factors) - 1)], name)
    return len(truth)


def ops_on_dtensors(folder):
    """every op's examples, its first argument whole and cut in each dimension, the others whole or cut"""
    mesh, compared = init_device_mesh("cpu", (world(),)), 0
    for family in names.families():
        for example in cases.of(family).small(torch.float32):
            for what, places in placements_of(example.args[0], mesh):
                try:
                    compared += check_example(example, mesh, places)
                except Exception as error:
                    raise AssertionError(f"{family}, {example.what or example.args[0].shape}, {what}: {error}") from error
    return compared


def dropout_of_parts(folder):
    """parts of a tensor have masks of their own, whole ones the same; the gradient has the output's"""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, each = init_device_mesh("cpu", (world(),)), 512
    for places in ([Shard(0)], [Replicate()]):
        torch.manual_seed(dist.get_rank())  # as of processes that nobody has told of one another
        x = distribute_tensor(torch.ones(world() * each), mesh, places).requires_grad_()
        y = gpt_kernels.dropout(x, 0.5)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(full(dx), full(y.detach()))
        of_all = [torch.empty(y.to_local().shape) for _ in range(world())]
        dist.all_gather(of_all, y.detach().to_local().contiguous())
        alike = [torch.equal(of_all[0], other) for other in of_all[1:]]
        assert not any(alike) if places == [Shard(0)] else all(alike), places
        for one in of_all:
            assert abs((one == 0).float().mean() - 0.5) < 0.15
    return 2


# ---- a GPT ----


def tiny(seed=0, **overrides):
    """A GPT of which every rule has something to cut; weights ten times the usual, so that nothing is linear."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=V, block_size=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = GPT(GPTConfig(**{**sizes, **overrides}))
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=float(p.detach().mean()), std=0.2)
    return model


def batch(seed=1):
    torch.manual_seed(seed)
    idx = torch.randint(V, (BATCH, T + 1))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def one_process(model, idx, targets):
    """{"loss", every gradient by its name} of a plain model."""
    model = copy.deepcopy(model)
    loss = model(idx, targets)[1]
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def compare(actual, model, idx, targets):
    """{"loss", gradients} against one process in the model's dtype and in float64; the number of tensors. Names are DDP's and
    the compiler's, too."""
    truth, eager = (one_process(m, idx, targets) for m in (copy.deepcopy(model).double(), model))
    actual = {name.removeprefix("module."): t for name, t in actual.items()}
    assert actual.keys() == truth.keys(), actual.keys() ^ truth.keys()
    for name, t in truth.items():
        factor = MODEL_OUTPUT if name == "loss" else MODEL_GRADIENT
        assert_close_to_truth(full(actual[name]), t, eager[name], factor, name)
    return len(truth)


def gradients(model):
    return {name: full(p.grad) for name, p in model.named_parameters()}


def part(*tensors):
    """This process's sequences of a batch."""
    each = BATCH // world()
    return tuple(t[dist.get_rank() * each :][:each] for t in tensors)


def mean_over_processes(loss):
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / world()


def data_parallel(folder):
    """`DistributedDataParallel`, a part of the batch on each process"""
    model, (idx, targets) = tiny(), batch()
    ours = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    loss = ours(*part(idx, targets))[1]
    loss.backward()
    return compare({"loss": mean_over_processes(loss)} | gradients(ours), model, idx, targets)


def shard(model, mesh=None, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fully_sharded(folder):
    """FSDP2 (`fully_shard`), parameters cut, a part of the batch on each process"""
    model, (idx, targets) = tiny(), batch()
    ours = shard(copy.deepcopy(model))
    loss = ours(*part(idx, targets))[1]
    loss.backward()
    return compare({"loss": mean_over_processes(loss)} | gradients(ours), model, idx, targets)


def tensor_parallel(folder):
    """tensor and sequence parallel `GPT`, by `gpt_kernels.distributed.tensor_parallel`"""
    model, (idx, targets) = tiny(), batch()
    ours = gpt_kernels.distributed.tensor_parallel(copy.deepcopy(model), init_device_mesh("cpu", (world(),)))
    loss = ours(idx, targets)[1]
    loss.backward()
    assert all(sharding.spread(p) for p in ours.parameters()) and ours.tied
    for name, p in model.named_parameters():
        assert torch.equal(p, full(ours.get_parameter(name))), name
    with torch.no_grad():  # the last position alone is the whole sequence's last
        torch.testing.assert_close(ours(idx)[0], model(idx)[0], rtol=1e-4, atol=1e-4)
    return compare({"loss": loss.detach()} | gradients(ours), model, idx, targets)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


def fully_sharded_tensor_parallel_is_refused(folder):
    """`fully_shard` over `tensor_parallel`: an error instead of a wrong gradient"""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1, world()), mesh_dim_names=("dp", "tp"))
    for how in ("each block", "one block", "around the model"):
        ours = gpt_kernels.distributed.tensor_parallel(tiny(), mesh["tp"])
        around = Around(ours)
        if how == "each block":
            shard(ours, mesh["dp"])
        elif how == "one block":
            fully_shard(ours.transformer.h[0], mesh=mesh["dp"])
        else:
            fully_shard(around, mesh=mesh["dp"])
        try:
            (around if how == "around the model" else ours)(*batch())
        except RuntimeError as error:
            assert "by fully_shard it seems" in str(error), error
        else:
            raise AssertionError("it ran")
    return 1


def llama(**overrides):
    """A patched Hugging Face Llama with grouped heads, and its unpatched copy."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=4, initializer_range=0.2, pad_token_id=0, **overrides)
    model = transformers.LlamaForCausalLM(config)
    ours = copy.deepcopy(model)
    plan = gpt_kernels.patch(ours)
    assert plan.swapped, plan
    return ours, model


def llama_step(model, idx):
    loss = model(input_ids=idx, labels=idx).loss
    loss.backward()
    return loss.detach()


def compare_llama(loss, found, model, idx):
    """Of a distributed patched Llama against one unpatched process. Its norms and its loss are float32 in every dtype: there is
    no truth in float64."""
    own = {"loss": llama_step(model, idx)} | {name: p.grad for name, p in model.named_parameters()}
    found = {"loss": loss} | {name.removeprefix("module."): g for name, g in found.items()}
    assert found.keys() == own.keys()
    for name, e in own.items():
        error = relative_error(full(found[name]), e.double())
        assert error < 2e-5, f"{name}: {error}"
    return len(found)


def llama_tensor_parallel(folder):
    """a patched Hugging Face Llama by `ColwiseParallel` and `RowwiseParallel`, grouped heads cut"""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ours, model = llama()
    plan = {f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"model.layers.*.self_attn.o_proj": RowwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    parallelize_module(ours, init_device_mesh("cpu", (world(),)), plan)
    idx = batch()[0]
    return compare_llama(llama_step(ours, idx), gradients(ours), model, idx)


def llama_fully_sharded(folder):
    """a patched Hugging Face Llama by FSDP2 (`fully_shard`)"""
    from torch.distributed.fsdp import fully_shard

    ours, model = llama()
    for layer in ours.model.layers:
        fully_shard(layer)
    fully_shard(ours)
    idx = batch()[0]
    loss = llama_step(ours, *part(idx))
    return compare_llama(mean_over_processes(loss), gradients(ours), model, idx)


def llama_data_parallel(folder):
    """a patched Hugging Face Llama by DDP"""
    ours, model = llama()
    ours = nn.parallel.DistributedDataParallel(ours)
    idx = batch()[0]
    loss = llama_step(ours, *part(idx))
    return compare_llama(mean_over_processes(loss), gradients(ours), model, idx)


def trained(model, optimizer, steps, of):
    """The losses of some steps on this process's part of batches."""
    losses = []
    for step in range(steps):
        loss = model(*of(*batch(seed=10 + step)))[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_processes(loss))
    return torch.stack(losses)


def with_state(model):
    """(model, its optimizer) with a state that is more than zeros."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trained(model, optimizer, 2, lambda *tensors: tensors)
    return optimizer


def checkpoint_saved(folder):
    """a checkpoint of an FSDP2 `GPT` and its optimizer (torch.distributed.checkpoint)"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = shard(tiny())
    optimizer = with_state(model)
    parameters, state = get_state_dict(model, optimizer)
    folder = os.path.join(os.path.dirname(folder), "checkpoint")
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    torch.save(trained(model, optimizer, 2, lambda *tensors: tensors), folder + ".losses")
    return len(parameters)


def checkpoint_loaded(folder):
    """that checkpoint on another number of processes, and unsharded: training goes on as it would have"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder = os.path.join(os.path.dirname(folder), "checkpoint")
    compared = 0
    for model in (tiny(seed=7), shard(tiny(seed=7))):
        optimizer = with_state(model)
        parameters, state = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)
        losses = trained(model, optimizer, 2, lambda *tensors: tensors)
        torch.testing.assert_close(losses, torch.load(folder + ".losses"), rtol=1e-5, atol=1e-5)
        compared += len(parameters)
    return compared


def in_context(balanced, function, *sequences):
    """function() under context_parallel over all processes, with the sequences cut in dimension 1; their own places first."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    before, _cp_options.enable_load_balance = _cp_options.enable_load_balance, balanced
    try:
        mesh = init_device_mesh("cpu", (world(),))
        with context_parallel(mesh, buffers=list(sequences), buffer_seq_dims=[1] * len(sequences)):
            return function()
    finally:
        _cp_options.enable_load_balance = before


def sequence_cut(model, balanced, folder):
    """Of a GPT, whose parameters every process has whole: gradients are sums over the processes."""
    (idx, targets), ours = batch(), copy.deepcopy(model)

    def step():
        assert idx.shape[1] == T // world()
        loss = ours(idx, targets)[1]
        loss.backward()
        return loss

    loss = in_context(balanced, step, idx, targets)
    found = gradients(ours)
    for g in found.values():
        dist.all_reduce(g)
        g /= world()
    return compare({"loss": mean_over_processes(loss)} | found, model, idx, targets)


def context_parallel(folder):
    """`context_parallel`, rows in the order of the sequence"""
    return sequence_cut(tiny(), False, folder)


def context_parallel_balanced(folder):
    """`context_parallel`, rows in its balanced order, torch's default"""
    return sequence_cut(tiny(), True, folder)


if __name__ == "__main__":
    for check, result in run(sys.argv[2:], int(sys.argv[1])).items():
        print(check, result)
