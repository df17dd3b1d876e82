"""Token ids to text, one token at a time: never half a character, equal to the whole decode.

Two ways, chosen at start by looking at the tokenizer's decoder:

- `ByteDetokenizer`: tokenizers whose tokens are bytes (byte-level BPE: GPT-2, Llama 3, Qwen,
  gpt-oss, DeepSeek). A token is a look-up; an incremental UTF-8 decoder holds back half
  characters.
- `WindowDetokenizer`: everything else (SentencePiece-like, WordPiece). Decodes a short window
  twice and emits the difference, so that spaces come out as the tokenizer would put them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_HELD_TOKENS = 16  # a character has at most 4 bytes: a window this long does not wait for one


class Detokenizer(Protocol):
    """State of one output."""

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; "" while a character is incomplete."""

    def flush(self) -> str:
        """What was held back, at the end: incomplete bytes become U+FFFD."""


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE vocabularies (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


class ByteTable:
    """The bytes of each token id of a byte-level vocabulary; filled at start, read-only after."""

    def __init__(self, tokens: Sequence[str | None], literal: Sequence[str | None]) -> None:
        """tokens: the vocabulary by id. literal: text of added tokens, which is not in the
        byte alphabet; None elsewhere."""
        alphabet = byte_alphabet()
        self.bytes_of_id: list[bytes] = []
        for token, text in zip(tokens, literal, strict=True):
            if text is not None or token is None:
                self.bytes_of_id.append((text or "").encode())
                continue
            try:
                self.bytes_of_id.append(bytes([alphabet[character] for character in token]))
            except KeyError:  # the decoder passes such a token on as it stands
                self.bytes_of_id.append(token.encode())


class ByteDetokenizer:
    """Detokenizer over a ByteTable; ids in `skipped` (special tokens) have no text."""

    def __init__(self, table: ByteTable, skipped: frozenset[int]) -> None:
        self._bytes_of_id = table.bytes_of_id
        self._skipped = skipped
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or token_id >= len(self._bytes_of_id):
            return ""
        return self._decode(self._bytes_of_id[token_id])

    def flush(self) -> str:
        return self._decode(b"", final=True)


class WindowDetokenizer:
    """Detokenizer over any `decode(ids) -> text`, two short decodes a token.

    `_ids[:_read]` has been given out already and is decoded again as the left context of the
    rest. `context_ids` (the prompt's last tokens) is such a context from the start: without it
    a SentencePiece decoder would strip the space before the first word of an output.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        skipped: frozenset[int],
        context_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._ids = [token_id for token_id in context_ids if token_id not in skipped]
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._advance(final=False)

    def flush(self) -> str:
        return self._advance(final=True) if len(self._ids) > self._read else ""

    def _advance(self, final: bool) -> str:
        given = self._decode(self._ids[: self._read]) if self._read else ""
        text = self._decode(self._ids)
        wait = text.endswith("\ufffd") or len(text) <= len(given)
        if wait and not final and len(self._ids) - self._read < _HELD_TOKENS:
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(given) :]
