"""GPT and a patched Llama in PyTorch's engines: compiled, exported, packaged ahead of time, cast, checkpointed by a policy."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import gpt_kernels
from gpt_kernels import library
from gpt_kernels.accuracy import SAME_FORMULA

pytestmark = pytest.mark.skipif(library.cpu is None, reason="the C++ kernels were not built")
V = 64


@pytest.fixture(autouse=True)
def undetermined():
    torch.use_deterministic_algorithms(False)  # inductor fills no memory
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gpt():
    torch.manual_seed(0)
    return gpt_kernels.GPT(
        gpt_kernels.GPTConfig(vocab_size=V, block_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    )


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2))
    model.config.use_cache = False
    plan = gpt_kernels.patch(model)
    assert plan.swapped
    return model


MODELS = {"GPT": gpt, "a patched Llama": llama}
models = pytest.mark.parametrize("name", MODELS)


def loss_of(name, model, ids):
    return model(ids, ids)[1] if name == "GPT" else model(input_ids=ids, labels=ids).loss


def logits_of(name, model, ids):
    return model(ids, ids)[0] if name == "GPT" else model(input_ids=ids).logits


def step(call, model, ids):
    model.zero_grad()
    loss = call(model, ids)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def close(actual, expected, factor=1.0):
    apart = factor * SAME_FORMULA[torch.float32]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=20 * apart, atol=apart * max(1.0, e.abs().max().item()))


def batch(rows, T=16):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(rows))


@models
def test_compiled_in_one_graph_and_not_again_for_new_batches(name):
    model, call = MODELS[name](), partial(loss_of, name)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in (2, 3):
        close(step(compiled, model, batch(rows)), step(call, model, batch(rows)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (4, 7, 5):
            close(step(compiled, model, batch(rows)), step(call, model, batch(rows)))


@models
def test_dynamic_lengths_in_one_graph(name):
    model, call = MODELS[name](), partial(loss_of, name)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, T in ((2, 16), (3, 9)):
        close(step(compiled, model, batch(rows, T)), step(call, model, batch(rows, T)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, T in ((5, 24), (4, 33)):
            close(step(compiled, model, batch(rows, T)), step(call, model, batch(rows, T)))


@pytest.mark.slow
@models
def test_inductor(name):
    model, call = MODELS[name](), partial(loss_of, name)
    close(step(torch.compile(call, fullgraph=True), model, batch(2)), step(call, model, batch(2)))


class Logits(torch.nn.Module):
    def __init__(self, name, model):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids):
        return logits_of(self.name, self.model, ids)


def exported(name):
    """(the exported program of the logits, batches dynamic; the module)"""
    module = Logits(name, MODELS[name]().eval())
    with torch.no_grad():
        program = torch.export.export(module, (batch(3),), dynamic_shapes={"ids": {0: torch.export.Dim("rows", min=2, max=64)}})
    return program, module


@models
def test_export(name):
    program, module = exported(name)
    ours = {str(n.target) for n in program.graph.nodes if "gpt_kernels" in str(n.target)}
    assert any("attention" in op for op in ours), ours
    with torch.no_grad():
        for rows in (3, 5):
            close([program.module()(batch(rows))], [module(batch(rows))])


LOADED = """
import sys, torch, gpt_kernels
package, saved = sys.argv[1:]
import torch._inductor.codecache  # which torch 2.10 forgets
model = torch._inductor.aoti_load_package(package)
for ids, logits in torch.load(saved):
    torch.testing.assert_close(model(ids), logits, rtol=1e-3, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
@models
def test_aotinductor_round_trip(name, tmp_path):
    """A package, loaded where nothing but gpt_kernels is imported."""
    program, module = exported(name)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    with torch.no_grad():
        torch.save([(batch(rows), module(batch(rows))) for rows in (3, 4)], tmp_path / "saved.pt")
    run = subprocess.run(
        [sys.executable, "-c", LOADED, package, tmp_path / "saved.pt"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr


@models
def test_autocast(name):
    model, call = MODELS[name](), partial(loss_of, name)

    def cast(model, ids):
        with torch.autocast("cpu", torch.bfloat16):
            return call(model, ids)

    own = step(call, model, batch(2))
    found = step(cast, model, batch(2))
    assert all(a.dtype == e.dtype for a, e in zip(found, own, strict=True))
    torch.testing.assert_close(found[0], own[0], rtol=0.05, atol=0.05)


OPS = torch.ops.gpt_kernels


def test_selective_checkpointing_by_our_ops():
    """A policy names our ops as it names torch's: attention is kept, all else is computed again."""
    model, counted = gpt(), []

    def policy(ctx, op, *args, **kwargs):
        counted.append(op)
        return CheckpointPolicy.MUST_SAVE if op == OPS.attention_fwd.default else CheckpointPolicy.PREFER_RECOMPUTE

    own = step(lambda m, ids: m(ids, ids)[1], model, batch(2))
    again = copy.deepcopy(model)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    for block in again.transformer.h:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    close(step(lambda m, ids: m(ids, ids)[1], again, batch(2)), own)
    assert {OPS.attention_fwd.default, OPS.layer_norm_fwd.default} <= set(counted)
