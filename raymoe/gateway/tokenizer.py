"""The checkpoint's tokenizer and chat template, as the gateway uses them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raymoe.errors import CheckpointError, RequestError
from raymoe.gateway.detokenize import (
    ByteDetokenizer,
    ByteTable,
    Detokenizer,
    WindowDetokenizer,
)
from raymoe.gateway.fields import read_json
from raymoe.grammar.state import GrammarStart, grammar_start

LONG = 16_384  # characters: milliseconds of work
_BLANKS = tuple(c for c in map(chr, range(0x3001)) if c.isspace())  # there are none above
_CONTEXT_TOKENS = 6  # of the prompt, enough for any decoder's view to the left


class GatewayTokenizer:
    """Text to ids and back. Thread-safe: nothing in it changes after the start."""

    def __init__(self, hf_tokenizer: Any) -> None:
        self._hf = hf_tokenizer
        self._backend = getattr(hf_tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a tokenizer.json may ask for either
            self._backend.no_truncation()
            self._backend.no_padding()
        added = hf_tokenizer.added_tokens_decoder
        self.special_ids = frozenset(map(int, hf_tokenizer.all_special_ids)) | {
            int(token_id) for token_id, token in added.items() if token.special
        }
        self._table = self._byte_table()
        self._longest_bytes = self._longest_token()

    @classmethod
    def load(cls, path: str) -> GatewayTokenizer:
        """From a checkpoint directory or hub id. Raises CheckpointError; never runs its code."""
        from transformers import AutoTokenizer

        try:
            found = cls(AutoTokenizer.from_pretrained(path, trust_remote_code=False))
        except Exception as error:  # of two libraries: any kind
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointError(f"{path} has no tokenizer that loads: {first_line}") from error
        if len(found._hf) <= len(found.special_ids):
            # transformers makes an empty one of the model's kind where there are no files
            raise CheckpointError(
                f"{path} has no tokenizer: put its files (tokenizer.json, tokenizer_config.json) "
                "beside config.json"
            )
        return found

    def grammar_start(self, vocab: int, eos_ids: Iterable[int]) -> GrammarStart:
        """How outputs that follow a grammar begin, for logits [V = `vocab`].

        Raises CheckpointError for a tokenizer that is not of the `tokenizers` library.
        """
        if self._backend is None:
            raise CheckpointError("it is not one of the tokenizers library")
        return grammar_start(self._backend, vocab, eos_ids)

    @property
    def follows_grammars(self) -> bool:
        """Whether `grammar_start` can be had."""
        return self._backend is not None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        if self._backend is not None and len(text) >= LONG:
            # `encode` keeps Python's lock to its end, half a second for a million characters, so
            # that a thread is of no use. This one does not, and takes half the time.
            batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return tuple(batch[0].ids)
        if self._backend is not None:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)
        return tuple(self._hf.encode(text, add_special_tokens=add_special_tokens))

    def least_tokens(self, text: str) -> int:
        """As many tokens `text` has at least, known without encoding it (a second for a million of
        them); 0 where that cannot be told."""
        if not self._longest_bytes:
            return 0
        # blanks do not count: a special token may take in all that stand beside it
        return -(-(len(text) - sum(map(text.count, _BLANKS))) // self._longest_bytes)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The whole text of `ids`; incomplete characters become U+FFFD."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()])

    def detokenizer(
        self, context_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> Detokenizer:
        """For one output that follows `context_ids` (the prompt's ids; its end is enough)."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if self._table is not None:
            return ByteDetokenizer(self._table, skipped)
        return WindowDetokenizer(self._decode_raw, skipped, context_ids[-_CONTEXT_TOKENS:])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, special tokens in full; empty for an unknown id."""
        if self._table is not None:
            table = self._table.bytes_of_id
            return table[token_id] if token_id < len(table) else b""
        token = self._hf.convert_ids_to_tokens(token_id)
        if isinstance(token, str) and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])  # SentencePiece's byte fallback
        if isinstance(token, str):  # its own space shows, which a decode at the start strips
            return token.replace("\u2581", " ").encode()
        return b""

    def token_text(self, token_id: int) -> str:
        """For logprobs: the token's text, or "bytes:\\xe4" when it is not a whole character."""
        data = self.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation. Raises RequestError when the template is missing
        or refuses the messages."""
        if not self.has_chat_template:
            raise RequestError(
                "this model's tokenizer has no chat template; use /v1/completions", "messages"
            )
        conversation = [_template_message(message) for message in messages]
        if "developer" not in str(self._hf.chat_template):  # OpenAI's newer name of "system"
            for message in conversation:
                if message["role"] == "developer":
                    message["role"] = "system"
        try:
            text = self._hf.apply_chat_template(
                conversation,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **dict(template_arguments or {}),
            )
        except Exception as error:  # templates are programs: they can fail in any way
            raise RequestError(
                f"the model's chat template does not accept these messages: {error}", "messages"
            ) from error
        return str(text)

    def _decode_raw(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return str(
            self._hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def _byte_table(self) -> ByteTable | None:
        """The table when the decoder is byte-level and agrees with it on the vocabulary."""
        if self._backend is None or self._backend.decoder is None:
            return None
        decoder = json.loads(self._backend.decoder.__getstate__())
        kinds = [d["type"] for d in decoder.get("decoders", [])] or [decoder["type"]]
        if kinds != ["ByteLevel"]:
            return None
        added = {int(i): str(t.content) for i, t in self._hf.added_tokens_decoder.items()}
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        tokens: list[str | None] = [None] * size
        for token, token_id in vocab.items():
            tokens[token_id] = token
        table = ByteTable(tokens, [added.get(i) for i in range(size)])
        return table if self._agrees(table, size) else None

    def _longest_token(self) -> int:
        """Bytes; 0 for a tokenizer that may drop or change some of the text."""
        backend = self._backend
        if backend is None or self._table is None or backend.normalizer is not None:
            return 0
        before = backend.pre_tokenizer
        if before is not None and b"Removed" in before.__getstate__():
            return 0
        return max(map(len, self._table.bytes_of_id), default=0)

    def _agrees(self, table: ByteTable, size: int) -> bool:
        """Compares with the library on every 97th token, one by one."""
        return all(
            table.bytes_of_id[i].decode("utf-8", "replace") == self._decode_raw([i])
            for i in range(0, size, 97)
        )


def _template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates expect it: tool-call arguments as an object, not as JSON."""
    result = dict(message)
    if result.get("tool_calls"):
        result["tool_calls"] = [_template_tool_call(call) for call in result["tool_calls"]]
    return result


def _template_tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = read_json(function["arguments"] or "{}")
        except ValueError as error:
            raise RequestError(
                f"a tool call's arguments are not JSON: {error}", "messages[].tool_calls"
            ) from None
    return {**call, "function": function}
