"""nanoGPT's users: a training script that knows nanoGPT's interface alone, on our GPT and on a patched class of its shapes."""

import inspect
import types

import nanogpt
import numpy
import pytest
import torch

import gpt_kernels

OURS = types.SimpleNamespace(GPT=gpt_kernels.GPT, GPTConfig=gpt_kernels.GPTConfig)
SIZES = dict(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def folder(tmp_path):
    draw = numpy.random.default_rng(0)
    draw.integers(0, 10, 4000, dtype=numpy.uint16).tofile(tmp_path / "data.bin")
    return tmp_path


def pair(**options):
    models = []
    for module in (nanogpt, OURS):
        torch.manual_seed(3)
        models.append(module.GPT(module.GPTConfig(**SIZES, **options)).eval())
    return models


def close(actual, expected, rtol=1e-5):
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("bias", (False, True))
def test_the_same_script_trains_the_same(folder, bias):
    """Every loss, from the seed's weights on; then resumed, each from what the other one wrote."""
    losses, _, text = nanogpt.train(nanogpt, folder, bias=bias)
    assert losses[-1] < 0.8 * losses[0]
    ours, model, ours_text = nanogpt.train(OURS, folder, bias=bias)
    close(ours, losses)
    assert torch.equal(ours_text, text) and not any("_orig" in name for name in model.state_dict())
    again, _, _ = nanogpt.train(nanogpt, folder, "resume", iterations=3, bias=bias)
    ours_again, _, _ = nanogpt.train(OURS, folder, "resume", iterations=3, bias=bias)
    close(ours_again, again)


def test_compiled_and_resumed(folder):
    losses, _, _ = nanogpt.train(OURS, folder, iterations=4)
    compiled, model, _ = nanogpt.train(OURS, folder, iterations=4, compile=True)
    close(compiled, losses, rtol=1e-3)
    assert all(name.startswith("_orig_mod.") for name in model.state_dict())
    resumed, _, _ = nanogpt.train(OURS, folder, "resume", iterations=1)
    close(resumed, compiled[4:])


def test_a_patched_class_of_its_shapes_trains_the_same(folder):
    plans = []
    losses, _, text = nanogpt.train(nanogpt, folder)
    patched, model, patched_text = nanogpt.train(
        nanogpt, folder, prepare=lambda model: [plans.append(gpt_kernels.patch(model)), model][1]
    )
    close(patched, losses)
    assert torch.equal(patched_text, text)
    assert {row.op for row in plans[0].swapped} == {"attention", "cross_entropy", "gelu", "dropout", "layer_norm"}
    resumed, _, _ = nanogpt.train(nanogpt, folder, "resume", iterations=1)
    close(resumed, losses[8:])


@pytest.mark.parametrize("name", ["a folder", "gpt2", "owner/small"])
def test_fine_tuning_from_hugging_faces_files(folder, name, monkeypatch):
    """A folder or a name in the local cache, cropped, trained, saved; resumed by model_args that do not name the GELU."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=65, n_positions=24, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0
    )
    hf = transformers.GPT2LMHeadModel(config).eval()
    snapshot = folder / "files"
    if name != "a folder":
        owner = "openai-community/gpt2" if name == "gpt2" else name
        cache = folder / "hub" / f"models--{owner.replace('/', '--')}"
        snapshot = cache / "snapshots" / "abc"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    hf.save_pretrained(snapshot)
    name = str(snapshot) if name == "a folder" else name
    x = torch.randint(0, 65, (2, 16))
    model = gpt_kernels.GPT.from_pretrained(name)
    torch.testing.assert_close(model(x)[0][:, -1], hf(x).logits[:, -1], rtol=1e-5, atol=1e-5)
    assert not model.training and model.config.dropout == 0.1
    model = gpt_kernels.GPT.from_pretrained(name, {"dropout": 0.3})
    assert model.training, "as nanoGPT's: not every process of its train.py calls train()"
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3} == {model.transformer.h[0].attn.dropout}
    losses, model, _ = nanogpt.train(OURS, folder, name, iterations=4)
    assert model.config.block_size == 16 and model.transformer.wpe.weight.shape == (16, 32)
    with pytest.warns(UserWarning, match="approximate='tanh' for 'none'"):
        resumed, _, _ = nanogpt.train(OURS, folder, "resume", iterations=1)
    close(resumed, losses[4:])


@pytest.mark.parametrize("bias", (False, True))
def test_names_weights_and_answers(bias):
    theirs, ours = pair(bias=bias)
    state = ours.state_dict()
    assert list(state) == list(theirs.state_dict())
    assert all(torch.equal(state[name], t) for name, t in theirs.state_dict().items()), "the seed's weights"
    x = torch.randint(0, 65, (2, 16))
    y = torch.where(torch.rand(2, 16) < 0.3, -1, x.roll(-1, 1))
    for targets in (None, y):
        actual, expected = ours(x, targets), theirs(x, targets)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert ours.get_num_params() == theirs.get_num_params() and ours.get_num_params(False) == theirs.get_num_params(False)
    assert ours.estimate_mfu(fwdbwd_per_iter=5, dt=1e-3) == pytest.approx(theirs.estimate_mfu(5, 1e-3), rel=1e-12)
    for top_k in (None, 5, 100):
        texts = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            texts.append(model.generate(x[:, :3], max_new_tokens=30, temperature=0.7, top_k=top_k))
        assert torch.equal(*texts)
    for model in (theirs, ours):
        model.crop_block_size(block_size=8)
    torch.testing.assert_close(ours(x[:, :8])[0], theirs(x[:, :8])[0], rtol=1e-5, atol=1e-6)
    assert ours.config.block_size == 8 and list(ours.state_dict()) == list(theirs.state_dict())


def test_defaults_and_arguments_are_nanogpts():
    config = nanogpt.GPTConfig()
    assert all(getattr(gpt_kernels.GPTConfig(), name) == value for name, value in vars(config).items())
    assert list(vars(gpt_kernels.GPTConfig()))[: len(vars(config))] == list(vars(config)), "by position, too"
    for name in ("forward", "generate", "configure_optimizers", "estimate_mfu", "get_num_params", "crop_block_size"):
        theirs = list(inspect.signature(getattr(nanogpt.GPT, name)).parameters.values())
        ours = list(inspect.signature(getattr(gpt_kernels.GPT, name)).parameters.values())
        assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs], name
        for p, q in zip(ours, theirs, strict=False):
            assert q.default in (inspect.Parameter.empty, p.default), (name, p)
        assert all(p.default is not inspect.Parameter.empty for p in ours[len(theirs) :]), name
    parameters = list(inspect.signature(gpt_kernels.GPT.from_pretrained).parameters)
    assert parameters[:2] == ["model_type", "override_args"]


def test_the_optimizers_groups():
    theirs, ours = (model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu") for model in pair())
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert a["weight_decay"] == b["weight_decay"] and [p.shape for p in a["params"]] == [p.shape for p in b["params"]]


def test_a_config_is_not_changed_by_cropping():
    config = gpt_kernels.GPTConfig(**SIZES)
    model = gpt_kernels.GPT(config)
    model.crop_block_size(8)
    assert config.block_size == 16 and model.config.block_size == 8 and model.transformer.wpe.num_embeddings == 8
