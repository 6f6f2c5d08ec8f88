"""A GPT on text files with several processes, on one machine or many: DDP, FSDP2 or tensor parallel, with checkpoints.

    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 20
    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 40        # goes on from the checkpoint in --out

Many machines run the same line, each with the address of one of them:

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 examples/train_distributed.py

What it learns from are bytes: of --text, or of Python's own library, which is wherever Python is. A checkpoint is sharded: each
process writes its own part, and another number of processes can read it.
"""

import argparse
import os
import pathlib
import sysconfig

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gpt_kernels
import gpt_kernels.distributed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp", "tp"), default="fsdp", help="how the work is divided (default: fsdp)"
    )
    parser.add_argument("--text", nargs="*", help="files to learn from (default: Python's library)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all (default: 100)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a process (default: 4)")
    parser.add_argument("--seq", type=int, default=128, help="tokens of a sequence (default: 128)")
    parser.add_argument("--width", type=int, default=128, help="of the model (default: 128)")
    parser.add_argument("--layers", type=int, default=4, help="(default: 4)")
    parser.add_argument(
        "--out", default="train-distributed-out", help="folder of the checkpoint (default: train-distributed-out)"
    )
    return parser.parse_args()


def text(files: list[str] | None) -> torch.Tensor:
    paths = map(pathlib.Path, files) if files else sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in paths)), dtype=torch.uint8)


def main() -> None:
    options = arguments()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world, device = dist.get_rank(), dist.get_world_size(), "cpu"
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)

    torch.manual_seed(0)  # the same weights on every process
    config = gpt_kernels.GPTConfig(
        vocab_size=256, block_size=options.seq, n_embd=options.width, n_layer=options.layers, n_head=options.width // 32
    )
    model = gpt_kernels.GPT(config).to(device)
    if options.parallel == "ddp":
        model = DistributedDataParallel(model)
    elif options.parallel == "fsdp":
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    else:
        gpt_kernels.distributed.tensor_parallel(model, init_device_mesh("cuda" if gpu else "cpu", (world,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    folder, done = pathlib.Path(options.out), torch.zeros((), dtype=torch.int64)
    if (folder / ".metadata").exists():
        parameters, state = get_state_dict(model, optimizer)
        dcp.load({"model": parameters, "optimizer": state, "done": done}, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)

    data, own = text(options.text), 0 if options.parallel == "tp" else rank  # tensor parallel: one batch for all
    for step in range(int(done), options.steps):
        draw = torch.Generator().manual_seed(step * world + own)
        starts = torch.randint(len(data) - options.seq - 1, (options.batch,), generator=draw)
        rows = torch.stack([data[i : i + options.seq + 1] for i in starts]).long().to(device)
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        dist.all_reduce(shown)
        if rank == 0 and (step % 10 == 0 or step + 1 == options.steps):
            print(f"step {step}: loss {shown.item() / world:.4f}", flush=True)
    parameters, state = get_state_dict(model, optimizer)
    done.fill_(max(options.steps, int(done)))
    dcp.save({"model": parameters, "optimizer": state, "done": done}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
