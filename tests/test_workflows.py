"""From text to a trained model: what is read, tokens, batches, the loop, its progress, the loss on held-out text, samples."""

import itertools
import math
import os
import sys

import numpy
import pytest
import torch

import gpt_kernels
from gpt_kernels import cache
from gpt_kernels.errors import UserError
from gpt_kernels.workflows import evaluate, generate, models, text, train

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

SIZES = {"vocab": 61, "context": 16, "width": 16, "layers": 1, "heads": 2}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- text ----


def test_standard_library_is_large_and_the_same_every_time():
    documents = text.standard_library()
    assert sum(len(d.encode()) for d in documents) >= 5_000_000
    assert documents == text.standard_library()
    joined = "".join(documents)
    assert "def main(" in joined and "\0" not in joined


def test_a_small_standard_library_asks_for_a_file(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"only 0.0 MB of text: name a file with --data"):
        text.standard_library()


def test_tests_and_caches_are_no_text(tmp_path, monkeypatch):
    for name in ("b.py", "test/t.py", "x/tests/t.py", "__pycache__/c.py", "site-packages/s.py", "x/y.rst", "x/z.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name + "\n" * 3_000_000)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(d.strip() for d in text.standard_library()) == ["b.py", "x/y.rst"]


@pytest.mark.parametrize(
    "content, words",
    [(b"text\0more", r"a binary file \(a zero byte at 4\)"), (b"text \xff", r"not UTF-8 text \(byte 5: invalid start byte\)")],
)
def test_user_file_that_is_not_text(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=words):
        text.user_text(str(tmp_path / "f"))


def test_user_file_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No such file"):
        text.user_text(str(tmp_path / "absent"))
    path = tmp_path / "secret"
    path.touch()
    path.chmod(0)
    if not os.access(path, os.R_OK):  # root reads everything
        with pytest.raises(UserError, match="Permission denied"):
            text.user_text(str(path))


def test_a_large_file_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_TEXT", 10)
    (tmp_path / "f").write_text("123456789äöü")
    assert text.user_text(str(tmp_path / "f")) == ["123456789"]


@pytest.mark.parametrize("documents", [["abcdefghij" * 10], ["a" * 7, "b" * 50, "c" * 3, "d" * 40], ["x" * 1, "y" * 19]])
def test_split_holds_out_the_last_twentieth(documents):
    training, held_out = text.split(documents)
    assert "".join(training + held_out) == "".join(documents)
    assert len("".join(training)) == sum(map(len, documents)) * 19 // 20


# ---- tokenizer ----


def test_tokenizer_round_trip_and_cache():
    texts = ["the cat sat on the mat\n" * 50, "ünïcode \t  tabs"]
    tokenizer, origin = text.train_tokenizer(texts, 300)
    assert origin == "trained" and tokenizer.get_vocab_size() <= 300
    for said in (*texts, "never seen: 漢字 \r\n"):
        assert tokenizer.decode(tokenizer.encode(said).ids, skip_special_tokens=False) == said
    again, origin = text.train_tokenizer(texts, 300)
    assert origin == "from the cache" and again.to_str() == tokenizer.to_str()
    assert text.train_tokenizer(texts, 301)[1] == text.train_tokenizer(texts[:1], 300)[1] == "trained"


def test_a_damaged_or_refused_cache_costs_only_time():
    texts = ["some text " * 100]
    text.train_tokenizer(texts, 300)
    (file,) = cache.directory().iterdir()
    file.write_bytes(b"{")
    assert text.train_tokenizer(texts, 300)[1].startswith("trained (")
    assert text.train_tokenizer(texts, 300)[1] == "from the cache"  # mended
    cache.directory().chmod(0o777)
    assert "cache refused" in text.train_tokenizer(texts, 300)[1]


def test_encode_puts_an_end_after_each_text():
    tokenizer, _ = text.train_tokenizer(["ab " * 100], 300)
    end = tokenizer.token_to_id(text.END)
    row = text.encode(tokenizer, ["ab ab", "b"])
    assert row.dtype == numpy.int32 and row.tolist() == [*tokenizer.encode("ab ab").ids, end, *tokenizer.encode("b").ids, end]


# ---- model, loop, loss, samples ----


def test_the_loss_of_theirs_and_of_ours_is_the_same():
    theirs = models.gpt2(**SIZES).eval()
    ours = gpt_kernels.GPT.from_hf(theirs).eval()
    ids = torch.randint(61, (3, 16))
    loss = models.next_token_loss(theirs, ids)
    torch.testing.assert_close(models.next_token_loss(ours, ids), loss, rtol=1e-4, atol=1e-5)
    logits = theirs(ids).logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-5)


def test_a_seed_makes_a_model_and_its_batches():
    one, two, other = (models.gpt2(**SIZES, seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)
    tokens = torch.arange(1000, dtype=torch.int32)
    first, again = (list(itertools.islice(train.batches(tokens, 4, 16, seed=5), 3)) for _ in range(2))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], first[1])
    for ids in first:
        assert ids.shape == (4, 16) and ids.dtype == torch.int64
        assert torch.equal(ids - ids[:, :1], torch.arange(16).expand(4, 16)), "each a piece of the text"


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    model = torch.nn.Linear(1, 1)
    optimizer, schedule = train.optimizer_for(model, steps=100, lr=0.5)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.05) and max(rates) == pytest.approx(0.5, rel=0.03) and rates.index(max(rates)) < 15
    assert rates[-1] == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["theirs", "patched", "ours"])
def test_training_learns_what_held_out_text_shows(kind, dtype):
    """A text that repeats itself: the loss falls far below that of guessing, on what was not trained on, too."""
    tokens = torch.arange(2000) % 7
    model = models.gpt2(**SIZES)
    if kind == "patched":
        gpt_kernels.patch(model)
    elif kind == "ours":
        model = gpt_kernels.GPT.from_hf(model)
    before = evaluate.held_out_loss(model, tokens[-200:], batch=2, context=16)
    assert before == pytest.approx(math.log(61), rel=0.1) and not model.training
    steps = list(train.train(model.train(), train.batches(tokens[:-200], 4, 16), 30, lr=2e-2, dtype=dtype))
    assert len(steps) == 30 and all(seconds > 0 for _, seconds in steps)
    after = evaluate.held_out_loss(model, tokens[-200:], batch=2, context=16, dtype=dtype)
    assert steps[-1][0] < 1 and after < 1 and all(p.dtype == torch.float32 for p in model.parameters())


def test_no_batch_is_drawn_beyond_the_last_step():
    drawn = []
    data = (drawn.append(1) or torch.zeros(1, 16, dtype=torch.int64) for _ in itertools.count())
    assert len(list(train.train(models.gpt2(**SIZES), data, 3, lr=1e-3))) == len(drawn) == 3


def test_held_out_loss_is_the_mean_of_its_windows():
    model, tokens = models.gpt2(**SIZES).eval(), torch.randint(61, (16 * 5 + 3,))
    with torch.no_grad():
        each = [models.next_token_loss(model, w[None]).item() for w in tokens[:80].view(5, 16)]
    assert evaluate.held_out_loss(model, tokens, batch=2, context=16) == pytest.approx(sum(each) / 5)
    assert evaluate.held_out_loss(model, tokens, batch=2, context=16, most=3) == pytest.approx(sum(each[:3]) / 3)
    assert evaluate.perplexity(2.0) == pytest.approx(math.exp(2)) and math.isfinite(evaluate.perplexity(1e9))


def test_a_sample_is_of_its_seed():
    model = models.gpt2(**SIZES).eval()
    first, again, other = (generate.sample(model, [1, 2, 3], 9, seed=s) for s in (1, 1, 2))
    assert len(first) == 9 and first == again and first != other and all(0 <= t < 61 for t in first)
    assert generate.tokens_per_second(model, [1, 2, 3], 4) > 0


class Terminal:
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return True


def test_progress(capsys, monkeypatch):
    """Lines where there is no terminal: the first step and each fifth; on one, a bar."""
    with train.Progress("ours", steps=10, tokens=100) as progress:
        for n in range(10):
            progress.step(loss=5.0 - n / 10, seconds=0.5)
        progress.doing("more")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [f"ours step {n}/10" for n in (1, 2, 4, 6, 8, 10)]
    assert lines[0].endswith("loss 5.000, 200 tokens/s")
    monkeypatch.setattr(sys, "stderr", Terminal(sys.stderr))
    with train.Progress("ours", steps=2, tokens=100) as progress:
        progress.step(loss=1.0, seconds=0.5)
        progress.doing("held-out loss")
    streams = capsys.readouterr()
    assert not streams.out and "1/2" in streams.err and "held-out loss" in streams.err
