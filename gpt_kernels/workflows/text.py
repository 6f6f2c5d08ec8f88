"""Text of this machine or of the user, a part of it held out; a byte-level BPE tokenizer trained on the rest; tokens."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import sysconfig
from typing import Any

from .. import cache
from ..errors import UserError

END = "<|endoftext|>"
MOST_TEXT = 8_000_000  # bytes; minutes of training read a small part of it, the tokenizer profits from the rest


def standard_library() -> list[str]:
    """The running Python's own sources and documentation, without tests: the same files in the same order every time."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [
        pathlib.Path(folder, name)
        for folder, folders, names in os.walk(root)
        # os.walk looks at what is left of `folders` to go on
        if folders.sort() is None and not skip & set(pathlib.Path(folder).relative_to(root).parts)
        for name in names
        if name.endswith((".py", ".txt", ".rst"))
    ]
    # by a hash of the name, so that the held-out end is a fair sample of all packages
    files.sort(key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest())
    documents, size = [], 0
    for file in files:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # a few old sources are in latin-1: left out
            documents.append(file.read_text(encoding="utf-8"))
            size += len(documents[-1])
        if size >= MOST_TEXT:
            break
    if size < 5_000_000:
        raise UserError(
            f"this Python's standard library in {root} has only {size / 1e6:.1f} MB of text: name a file with --data"
        )
    return documents


def user_text(name: str) -> list[str]:
    """The first MOST_TEXT bytes of the user's file."""
    try:
        with open(name, "rb") as file:
            data = file.read(MOST_TEXT)
            more = file.read(1) != b""
    except OSError as error:
        raise UserError(f"--data {name}: {error.strerror}") from None
    if b"\0" in data:
        raise UserError(f"--data {name}: a binary file (a zero byte at {data.index(0)}); UTF-8 text is needed")
    try:
        return [data.decode()]
    except UnicodeDecodeError as error:
        if more and error.start >= len(data) - 4:  # a character that the cut at MOST_TEXT went through
            return [data[: error.start].decode()]
        raise UserError(f"--data {name}: not UTF-8 text (byte {error.start}: {error.reason})") from None


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held out): the last 20th of the text is never trained on, by the tokenizer neither."""
    training, left = [], sum(map(len, documents)) * 19 // 20
    held_out = []
    for document in documents:
        training.append(document[:left])
        held_out.append(document[left:])
        left = max(0, left - len(document))
    return [t for t in training if t], [t for t in held_out if t]


def train_tokenizer(texts: list[str], vocab: int) -> tuple[Any, str]:
    """(byte-level BPE tokenizer, where it is from), cached by content, vocabulary size and version."""
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    digest = hashlib.sha256(f"{tokenizers.__version__} {vocab} {len(texts)}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    name = f"tokenizer-{digest.hexdigest()[:32]}.json"
    try:
        if (data := cache.read(name)) is not None:
            return Tokenizer.from_str(data.decode()), "from the cache"
        origin = "trained"
    except Exception as error:  # noqa: BLE001  (a cache that is refused or damaged costs seconds, not the demo)
        origin = f"trained ({error})"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    try:
        cache.write(name, tokenizer.to_str().encode())
    except OSError as error:
        origin = f"trained, not cached ({error})"
    return tokenizer, origin


def encode(tokenizer: Any, texts: list[str]):
    """All tokens of the texts in one numpy row, END between them."""
    import numpy

    end = tokenizer.token_to_id(END)
    rows = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(texts)]
    return numpy.concatenate([numpy.asarray(row, dtype=numpy.int32) for row in rows])
