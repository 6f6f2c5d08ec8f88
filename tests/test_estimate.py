"""estimate is true: memory of a real step to the byte, torch's own count of FLOPs, this CPU's time within a stated factor."""

import inspect
import json
import sys
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import gpt_kernels
from gpt_kernels import GPT, GPTConfig, cli
from gpt_kernels.estimate import DEVICES, Cost, Counter, Device, counted, estimate
from gpt_kernels.models.config import PRESETS
from gpt_kernels.patch import is_patched

B, T, V = 2, 24, 97
module = sys.modules["gpt_kernels.estimate"]  # the name gpt_kernels.estimate is the function


@pytest.fixture(autouse=True)
def no_clock(monkeypatch, request):
    """The CPU's rates are not measured where time is not the matter."""
    if "real_clock" not in request.fixturenames:
        fixed = Device("made up", dict.fromkeys(("float32", "bfloat16", "float16"), 1e11), 1e10, None, "a test")
        monkeypatch.setattr(module, "this_cpu", lambda dtype: fixed)


@pytest.fixture
def real_clock():
    pass


def gpt2(p=0.0, **sizes):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": 40, **sizes}
    config = transformers.GPT2Config(resid_pdrop=p, attn_pdrop=p, embd_pdrop=p, bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config).train()


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def bert(p=0.0):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).train()


def own(p=0.0):
    config = GPTConfig(vocab_size=V, block_size=40, n_layer=2, n_head=2, n_embd=32, dropout=p)
    return GPT(config).train()


class Plain(nn.Module):
    """Any module that takes token ids; two weights are one."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Embedding(V, 32), nn.LayerNorm(32), nn.Dropout(0.1)
        self.head = nn.Linear(32, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.drop(self.norm(self.embed(x))))


MODELS = {
    "gpt2": gpt2, "gpt2 with dropout": lambda: gpt2(0.1), "llama": llama, "bert": bert, "bert with dropout": lambda: bert(0.1),
    "ours": own, "ours with dropout": lambda: own(0.1), "plain": Plain,
}  # fmt: skip


def batch_of(model, rows=B, length=T, vocab=V):
    ids, other = torch.randint(vocab, (2, rows, length))
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        return ((ids, other) if isinstance(model, GPT) else (ids,)), {}
    return (), {"input_ids": ids, "labels": other} | ({"use_cache": False} if "use_cache" in names else {})


def told(model, batch=B, seq=T, **options):
    return estimate(model, batch, seq, **{"show": False, **options})


# ---- true ----


@pytest.mark.skipif(gpt_kernels.dispatch.kernel_of("gelu_fwd", "cpu") is None, reason="ours is eager without the C++ kernels")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_step_saves_and_counts_what_was_estimated(name, dtype):
    model = MODELS[name]().to(dtype)
    found = told(model)
    args, kwargs = batch_of(model)
    for side in ("eager", "ours")[isinstance(model, GPT) :]:  # beside a GPT stands another model
        if side == "ours":
            gpt_kernels.patch(model)
        counter = Counter()
        assert found.sides[side].activations == counted(model, args, kwargs, counter) > 0
        real, estimated = counter.ops, found.sides[side].ops
        assert sum(c.flops for c in real.values()) == found.sides[side].total.flops > 0
        ours = {op: c.calls for op, c in real.items() if op.startswith("gpt_kernels::")}
        assert {op: c.calls for op, c in estimated.items() if op.startswith("gpt_kernels::")} == ours
        assert bool(ours) == (side == "ours" or name.startswith("ours"))
        products = ("mm", "addmm", "bmm", "baddbmm")
        assert {op: estimated.get(op) and estimated[op].calls for op in products} == {
            op: real.get(op) and real[op].calls for op in products
        }
        assert found.sides[side].total.bytes == pytest.approx(sum(c.bytes for c in real.values()), rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert with dropout", "ours"])
def test_flops_are_torchs_own_count(name):
    """And attention's, which its counter does not know on a CPU, by its own formulas."""
    model = MODELS[name]()
    args, kwargs = batch_of(model)
    with FlopCounterMode(display=False) as counter:
        result = model(*args, **kwargs)
        (result.loss if hasattr(result, "loss") else result[1]).backward()
    heads, D = (2, 16) if name == "ours" else (4, 8)
    shape = (B, heads, T, D)
    # with dropout, eager's attention on a CPU is products that the counter does know
    attention = 2 * (sdpa_flop_count(*[shape] * 3) + sdpa_backward_flop_count(*[shape] * 4))
    sides = told(model).sides
    known = attention if "dropout" in name else 0
    assert sides["ours" if name == "ours" else "eager"].total.flops == counter.get_total_flops() + attention - known
    ops = sides["ours"].ops  # key heads that serve several query heads, too
    assert ops["gpt_kernels::attention_fwd"].flops + ops["gpt_kernels::attention_bwd"].flops == attention


def test_what_is_not_a_parameter_nor_the_batch_is_counted_once():
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            y = x @ self.weight  # saves x and weight, which do not count
            return (y[:2].sin() + y[2:].cos()).sum()  # saves two views of y: one storage

    assert counted(Twice(), (x,), {}, Counter()) == 4 * 8 * 4


WIDE, THREE = torch.ones(20).expand(50, 20), torch.tensor([3, 4, 4])


@pytest.mark.parametrize(
    "call, expected",
    [
        (lambda x: x + x, 3 * 4000),  # whoever is read twice is read twice
        (lambda x: x + 1, 2 * 4000),
        (lambda x: x.add_(1), 2 * 4000),
        (lambda x: x.t()[3:].unsqueeze(0), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x.zero_(), 4000),
        (lambda x: x.copy_(WIDE), 4000 + 80),
        (lambda x: x.clone(), 2 * 4000),
        (lambda x: torch.mm(x, x.t()), 2 * 4000 + 4 * 50 * 50),
        (lambda x: torch.mm(x, x.t(), out=torch.empty(50, 50)), 2 * 4000 + 4 * 50 * 50),
        (lambda x: torch.nn.functional.embedding(THREE, x), 2 * 3 * 80 + 3 * 8),
        (lambda x: gpt_kernels.gelu(x), 2 * 4000),
    ],
)
def test_traffic(call, expected):
    x, counter = torch.randn(50, 20), Counter()
    with counter:
        call(x)
    assert sum(c.bytes for c in counter.ops.values()) == expected


def test_nothing_is_computed_nor_changed():
    class Refuses(Plain):
        def forward(self, x):
            assert type(x).__name__ == "FakeTensor"
            return super().forward(x)

    model, state = Refuses().eval(), torch.get_rng_state()
    gpt_kernels.patch(model)
    before = [(p, p.clone()) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = told(model)
    assert is_patched(model) and not model.training and not found.training
    assert all(torch.equal(p, value) and p.grad is None for p, value in before) and torch.equal(torch.get_rng_state(), state)
    assert found.parameters == V * 32 + 64, "tied weights count once"
    assert found.sides["ours"].activations <= found.sides["eager"].activations


def test_this_cpus_time_is_predicted_within_a_factor(real_clock):
    """Of 2 on a quiet machine (docs/explain.md); of 4 in a test beside others, on one thread and in the best of some steps."""
    model, ids = gpt2(n_embd=256, vocab_size=4096, n_positions=256), torch.randint(4096, (2, 256))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = told(model, 2, 256)
        for side in ("eager", "ours"):
            if side == "ours":
                gpt_kernels.patch(model)
            taken = []
            for _ in range(4):
                begin = time.perf_counter()
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                taken.append(time.perf_counter() - begin)
            assert 1 / 4 < min(taken) / found.sides[side].total.seconds < 4, side
    finally:
        torch.set_num_threads(threads)


# ---- devices, models, words ----


def test_the_prediction_is_the_devices_roofline():
    counter = Counter(DEVICES["a100"], "bfloat16")
    with counter:
        a = torch.ones(512, 512, dtype=torch.bfloat16)
        a @ a
        a + a
    assert counter.ops["mm"].seconds == max(2 * 512**3 / 312e12, 3 * 512 * 512 * 2 / 2039e9)
    assert counter.ops["add"].seconds == 3 * 512 * 512 * 2 / 2039e9


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_has_its_source_and_is_faster_in_16_bits(device):
    d = DEVICES[device]
    assert d.source and d.memory > 2e10 and d.flops["bfloat16"] == d.flops["float16"] > d.flops["float32"] > 1e13
    found = told(own(), device=device, dtype="bfloat16")
    assert (
        found.device is d and not found.training and 0 < found.sides["ours"].total.seconds < found.sides["eager"].total.seconds
    )
    assert "predicted" in str(found) and d.source in str(found)


def test_a_name_a_configuration_and_a_config_of_hf():
    transformers = pytest.importorskip("transformers")
    named = told("gpt2", 1, 16, device="a100")
    assert named.model == "gpt2" and named.parameters == 124439808 and named.sides.keys() == {"eager", "ours"}
    config = GPTConfig.preset("gpt2", n_layer=1)
    found = told(config, 1, 16, device="a100")
    hf = told(transformers.GPT2Config(n_layer=1), 1, 16, device="a100")
    assert found.sides["eager"].activations == hf.sides["eager"].activations
    assert found.sides["eager"].total.flops == hf.sides["eager"].total.flops == hf.sides["ours"].total.flops
    assert hf.model == "GPT2LMHeadModel" and "swapped" in hf.swapped and found.swapped == "ours is gpt_kernels.GPT"
    assert "gpt2-xl" in PRESETS


def test_without_transformers_ours_stands_alone(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found = told(GPTConfig(vocab_size=V, n_layer=1, n_head=2, n_embd=32), 1, 16)
    assert found.sides.keys() == {"ours"} and "no eager: " in str(found) and "transformers is not installed" in str(found)


def test_a_large_model_takes_no_memory_and_does_not_fit():
    found = told(GPTConfig.preset("gpt2-xl", n_layer=2, block_size=8192), 64, 8192, device="l4")
    assert found.memory("eager") > 24e9 and "more than its 22.4 GiB" in str(found)
    assert found.memory("ours") == 2 * found.weights + found.moments + found.sides["ours"].activations


def test_json(tmp_path):
    data = json.loads(told(own()).to_json())
    assert data["label"] == "predicted" and data["sides"]["ours"]["ops"]["gpt_kernels::attention_fwd"]["calls"] == 2
    assert data["sides"]["ours"]["memory"] > data["sides"]["ours"]["activations"] > 0


def test_ops_that_are_not_shown_are_summed():
    found = told(gpt2())
    for side in found.sides.values():
        assert side.total.calls == sum(c.calls for c in side.ops.values())
    assert found._others("eager", list(found.sides["eager"].ops)) == Cost()
    assert "others" in str(found) and "mm" in str(found)


@pytest.mark.parametrize(
    "model, options, error, words",
    [
        ("gpt5", {}, ValueError, "estimate: unknown model 'gpt5', expected one of gpt2, gpt2-medium"),
        ("gpt2", {"device": "tpu"}, ValueError, "estimate: unknown device 'tpu', expected one of cpu, a100, h100"),
        ("gpt2", {"dtype": "int8"}, ValueError, "estimate: unknown dtype 'int8', expected one of float32"),
        ("gpt2", {"batch": -1}, ValueError, "estimate: batch must be a whole number of at least 1, got -1"),
        ("gpt2", {"seq": 0}, ValueError, "estimate: seq must be a whole number of at least 1, got 0"),
        ("gpt2", {"seq": 1.5}, ValueError, "estimate: seq must be a whole number of at least 1, got 1.5"),
        ("gpt2", {"batch": True}, ValueError, "estimate: batch must be a whole number"),
        ("gpt2", {"seq": 1025}, ValueError, "estimate: seq 1025 is above the model's 1024 positions"),
        (3, {}, TypeError, "estimate: expected a torch.nn.Module, a GPTConfig, a transformers config or a name, got int"),
        (nn.Linear(2, 2).double(), {}, ValueError, "the model's parameters are float64"),
    ],
)
def test_errors(model, options, error, words):
    with pytest.raises(error, match=words):
        told(model, **options)


def test_after_an_error_inside_everything_is_as_before():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            raise KeyError("broken")

    with pytest.raises(KeyError):
        told(Broken())
    assert gpt_kernels.where("gelu_fwd")["CPU"].reason != "pushed by use_backend"


# ---- the command ----


def test_command(capsys):
    arguments = ["estimate", "gpt2", "--batch", "2", "--seq", "16", "--device", "h100", "--dtype", "bfloat16"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "gpt2, batch 2 x 16 tokens, bfloat16" in out and "NVIDIA H100" in out and "time, predicted" in out
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["name"] == DEVICES["h100"].name


def test_command_on_a_folder_of_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    config.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "config.json"):
        assert cli.main(["estimate", str(place), "--seq", "16", "--device", "a100", "--dtype", "bfloat16"]) == 0
        assert "LlamaForCausalLM, batch 1 x 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("gpt5",), "gpt_kernels estimate: unknown model 'gpt5', expected one of gpt2"),
        (("gpt2", "--device", "tpu"), "gpt_kernels estimate: unknown device 'tpu'"),
        (("gpt2", "--seq", "4096"), "gpt_kernels estimate: seq 4096 is above the model's 1024 positions"),
        (("gpt2", "--batch", "-1"), "--batch: must be at least 1, got -1"),
        (("gpt2", "--seq", "0"), "--seq: must be at least 1, got 0"),
        ((), "required: MODEL"),
    ],
)
def test_bad_arguments_end_with_code_2(capsys, arguments, words):
    try:
        code = cli.main(["estimate", *arguments])
    except SystemExit as stop:
        code = stop.code
    message = capsys.readouterr().err
    assert code == 2 and words in message and "Traceback" not in message
