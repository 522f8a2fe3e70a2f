"""Text for masked-language-model pre-training: documents, batches, and their corruption.

A token is a byte. Beside the 256 bytes the vocabulary holds ``PAD``, which fills sequences up to
the length of the batch, and ``MASK``, which stands where a byte was hidden.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BYTES = 256
PAD = 256
MASK = 257
VOCABULARY = 258

CHOSEN = 0.15  # of the tokens are to be predicted,
MASKED = 0.8  # of these this share is hidden,
RANDOM = 0.1  # this share replaced by a random byte, and the rest left as it is

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class TextError(ValueError):
    """Text that cannot be trained on; the message names the file."""


# ------------------------------------------------------------------------------------- documents


def python_documents() -> list[bytes]:
    """The English that comes with Python: each help topic, and each module's docstrings."""
    from pydoc_data.topics import topics

    documents = [text for _, text in sorted(topics.items())]
    documents += module_docstrings(Path(sysconfig.get_paths()["stdlib"]))
    return [text.encode("utf-8", errors="replace") for text in documents]


def module_docstrings(folder: Path) -> list[str]:
    """All docstrings of each module under ``folder``, one text a module. Nothing is imported."""
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts):
            docstrings = "\n\n".join(_docstrings(path))
            if docstrings:
                texts.append(docstrings)
    return texts


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module's own deprecated escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates and test data among the modules
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def file_documents(paths: Iterable[Path]) -> list[bytes]:
    """Each UTF-8 file as one document. Raises :class:`TextError` for one that is not usable."""
    return [_file_document(path) for path in paths]


def _file_document(path: Path) -> bytes:
    try:
        document = path.read_bytes()
        document.decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not document.strip():
        raise TextError(f"{path} is empty")
    return document


# --------------------------------------------------------------------------------------- batches


class Pieces:
    """Stretches of text, from which windows of a given length are drawn.

    A window lies within one piece; a piece shorter than a window is padded.
    """

    def __init__(self, pieces: Iterable[bytes]) -> None:
        pieces = [piece for piece in pieces if piece]
        self.tokens = torch.from_numpy(np.frombuffer(b"".join(pieces), np.uint8).copy())
        self.lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
        self.starts = self.lengths.cumsum(0) - self.lengths

    def sample(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """``count`` windows, each as likely as any other: (count, length) int64."""
        windows = (self.lengths - length + 1).clamp(min=1)  # in each piece
        ends = windows.cumsum(0)
        pick = torch.randint(int(ends[-1]), (count,), generator=generator)
        piece = torch.searchsorted(ends, pick, right=True)
        offset = pick - (ends - windows)[piece]
        column = torch.arange(length)
        inside = column < (self.lengths[piece] - offset)[:, None]
        place = (self.starts[piece] + offset)[:, None] + column
        tokens = self.tokens[place.clamp(max=len(self.tokens) - 1)].long()
        return torch.where(inside, tokens, PAD)


class Corpus:
    """Documents, with the last tenth of every one held out."""

    def __init__(self, documents: list[bytes]) -> None:
        cuts = [len(document) - len(document) // 10 for document in documents]
        pairs = list(zip(documents, cuts, strict=True))
        self.train = Pieces(document[:cut] for document, cut in pairs)
        self.held_out = Pieces(document[cut:] for document, cut in pairs)
        self.documents = len(documents)
        self.size = sum(len(document) for document in documents)
        self.digest = hashlib.sha256(b"\xff".join(documents)).hexdigest()  # no 0xff in UTF-8

    def unigram_entropy(self) -> float:
        """Nats a held-out byte costs whoever knows only how often each byte occurs in training.

        Every byte is counted once more than it occurs, so that one never seen costs a finite price.
        """
        count = torch.bincount(self.train.tokens, minlength=BYTES).double() + 1
        price = -(count / count.sum()).log()
        return price[self.held_out.tokens.long()].mean().item()


class Batch(NamedTuple):
    tokens: Tensor  # (batch, length) int64, corrupted
    padding: Tensor | None  # (batch, length) bool, True where there is no token; None without any
    chosen: Tensor  # (predictions,) int64, places in the flattened batch
    targets: Tensor  # (predictions,) int64, the bytes that were there

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))


def make_batch(pieces: Pieces, count: int, length: int, key: str) -> Batch:
    """A corrupted batch: a pure function of its arguments. ``key`` names it, say ``"0/17"``."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    tokens = pieces.sample(count, length, generator)
    corrupted, chosen = corrupt(tokens, generator)
    padding = tokens == PAD
    places = chosen.flatten().nonzero().squeeze(1)
    return Batch(corrupted, padding if padding.any() else None, places, tokens.flatten()[places])


def corrupt(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Corrupted tokens, and which were chosen for prediction (a bool tensor of the same shape).

    Choice and replacement as in BERT (Devlin et al., arXiv:1810.04805): 15 % of the bytes are
    chosen; of these 80 % become ``MASK``, 10 % a random byte, and 10 % stay. Specials are never
    chosen.
    """
    choice = torch.rand(tokens.shape, generator=generator)
    action = torch.rand(tokens.shape, generator=generator)
    substitute = torch.randint(BYTES, tokens.shape, generator=generator)
    chosen = (choice < CHOSEN) & (tokens < BYTES)
    corrupted = torch.where(chosen & (action < MASKED), MASK, tokens)
    replaced = chosen & (action >= MASKED) & (action < MASKED + RANDOM)
    return torch.where(replaced, substitute, corrupted), chosen
