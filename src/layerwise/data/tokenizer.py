"""Text to tokens: tokenizers trained on the training split, plain bytes, or a ready file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from layerwise.data.spec import TokenizerSpec
from layerwise.errors import BadInput

SPECIALS = ("<pad>", "<eos>", "<unk>", "<mask>", "<cls>", "<sep>")
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|padding|>"),
    "eos": ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
    "cls": ("<cls>", "[CLS]", "<s>"),
    "sep": ("<sep>", "[SEP]", "</s>"),
}
DOCUMENTS_AT_ONCE = 512
FILE_AT_MOST = 100_000_000
"""Bytes of a tokenizer.json; those of a quarter of a million tokens have about a third of it."""


def make_tokenizer(spec: TokenizerSpec, documents: Iterable[str]) -> Tokenizer:
    """The tokenizer of a spec; `documents` train it where it is trained. Equal documents give an equal tokenizer.

    Special tokens have the first ids, in the order of `SPECIALS`. Byte-level kinds (`bpe`, `bytes`) turn every text into
    tokens and back without loss.
    """
    if spec.kind == "bytes":
        return for_texts(_bytes())
    return for_texts(_wordpiece(spec, documents) if spec.kind == "wordpiece" else _bpe(spec, documents))


def for_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer itself, set to turn a whole text into tokens, and nothing but the text.

    Text that spells out `<eos>` means these characters, not the end of a document. What a file says about cutting and padding
    (that of a sentence encoder cuts at 128 tokens) is for its own use and is switched off.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _bpe(spec: TokenizerSpec, documents: Iterable[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(documents, _trainer(spec.vocab, _alphabet()))
    return made


def _trainer(vocab: int, alphabet: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False)


def _wordpiece(spec: TokenizerSpec, documents: Iterable[str]) -> Tokenizer:
    """BERT's tokenizer: words are cut into the longest pieces of a vocabulary, `##` marking those inside a word.

    The library's own WordPiece trainer gives another vocabulary every time (its ties follow a hash map's order). Here byte
    pair merges propose the pieces, and the most frequent ones at the start and inside of words are kept.
    """
    documents = list(documents)
    normalizer, splitter = normalizers.BertNormalizer(lowercase=spec.lowercase), pre_tokenizers.BertPreTokenizer()
    proposer = Tokenizer(models.BPE(unk_token="<unk>"))
    proposer.normalizer, proposer.pre_tokenizer = normalizer, splitter
    proposer.train_from_iterator(documents, _trainer(spec.vocab, []))
    words = Counter(word for document in documents for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(document)))
    pieces: Counter[str] = Counter()
    for (word, count), encoding in zip(words.items(), proposer.encode_batch(list(words)), strict=True):
        for i, piece in enumerate(encoding.tokens):
            pieces["##" * (i > 0) + piece] += count
        # Single characters keep every word spellable; they come before all others.
        pieces.update({"##" * (i > 0) + character: 1 << 40 for i, character in enumerate(word)})
    kept = sorted(pieces, key=lambda piece: (-pieces[piece], piece))[: max(spec.vocab - len(SPECIALS), 0)]
    kept = [piece for piece in kept if piece not in SPECIALS]
    vocabulary = {piece: i for i, piece in enumerate([*SPECIALS, *kept])}
    made = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, splitter, decoders.WordPiece()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIALS])
    return made


def read_tokenizer(path: str) -> Tokenizer:
    """The tokenizer in a tokenizer.json, set as `for_texts` does.

    Raises:
        BadInput: the file is none.
    """
    try:
        if (size := Path(path).stat().st_size) > FILE_AT_MOST:
            raise BadInput(f"{path} is too large for a tokenizer: it has {size:,} bytes, at most {FILE_AT_MOST:,} are read")
        return for_texts(Tokenizer.from_file(path))
    except BaseException as error:  # the library raises bare Exception, and what its Rust panics become
        if isinstance(error, KeyboardInterrupt | SystemExit | BadInput):
            raise
        raise BadInput(f"{path} is not a tokenizer: {error}") from error


def is_panic(error: BaseException) -> bool:
    """Whether the Rust code of the library broke down, which it reports as no ordinary exception."""
    return type(error).__name__ == "PanicException"


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Ids of pad, eos, mask, cls and sep by the names they usually have."""
    found: dict[str, int | None] = {}
    for role, names in NAMES.items():
        ids = [i for n in names if (i := tokenizer.token_to_id(n)) is not None]
        found[role] = ids[0] if ids else None
    return found


def encoded(tokenizer: Tokenizer, documents: list[str]) -> Iterator[np.ndarray]:
    """The ids of each document, without special tokens.

    Raises:
        BadInput: the tokenizer, which came from a file, breaks down over a document (a regular expression without end in it).
    """
    if _is_bytes(tokenizer):
        for document in documents:
            yield np.frombuffer(document.encode("utf-8"), dtype=np.uint8).astype(np.uint32) + len(SPECIALS)
        return
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        try:
            made = tokenizer.encode_batch(documents[start : start + DOCUMENTS_AT_ONCE], add_special_tokens=False)
        except BaseException as error:
            if isinstance(error, Exception) or is_panic(error):
                raise BadInput(f"the tokenizer cannot read a text: {error}") from error
            raise
        for encoding in made:
            yield np.array(encoding.ids, dtype=np.uint32)


def _alphabet() -> list[str]:
    """The 256 characters that stand for bytes in the byte-level scheme."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _bytes() -> Tokenizer:
    """One token a byte: byte b has id b + the number of specials."""
    # The byte-level scheme shows printable bytes as themselves and the others as code points from 256 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    shown = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocabulary = {name: i for i, name in enumerate(SPECIALS)} | {shown[b]: len(SPECIALS) + b for b in range(256)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIALS])
    return made


def _is_bytes(tokenizer: Tokenizer) -> bool:
    # A trained alphabet can be as large, but stands in the order of the characters that show the bytes: byte 0 is not first.
    return (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.get_vocab_size() == 256 + len(SPECIALS)
        and tokenizer.token_to_id("<sep>") == len(SPECIALS) - 1
        and tokenizer.token_to_id(chr(256)) == len(SPECIALS)
    )
