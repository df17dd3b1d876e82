"""Token by token gives the same text as all at once, and never half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raymoe.errors import CheckpointError
from raymoe.gateway.detokenize import ByteDetokenizer, WindowDetokenizer, byte_alphabet
from raymoe.gateway.tokenizer import GatewayTokenizer
from tests.gateway.tiny_tokenizer import SPECIALS, TEXT, tiny_tokenizer

TINY = tiny_tokenizer()
TEXTS = [
    "Hello world, how are you?",
    "  two  spaces\n\n\tand tabs ",
    "日本語の文章、한국어, العربية",
    "🙂👩‍👩‍👧‍👦🇩🇪 é e\u0301 \U0010ffff",
    TEXT,
    "",
]


def sentencepiece_like() -> GatewayTokenizer:
    """As Llama 2 and Gemma have it: spaces as U+2581, bytes where a character is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set("\u2581" + TEXT.replace(" ", "")))
    words = ["\u2581Hello", "\u2581world", "\u2581how", "\u2581are", "\u2581you"]
    vocab = [(piece, -10.0) for piece in pieces + letters] + [(word, -1.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return GatewayTokenizer(wrapped)


SP = sentencepiece_like()


def wordpiece() -> GatewayTokenizer:
    pieces = ["[UNK]", *sorted(set("abcdefghijklmnopqrstuvwxyzH,?.")), "##lo", "##l", "wor", "##ld"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in "l"]
    vocab = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return GatewayTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def whole(tokenizer: GatewayTokenizer, ids: tuple[int, ...]) -> str:
    """The library's own decode of everything."""
    return str(tokenizer._backend.decode(list(ids), skip_special_tokens=True))


def test_the_two_ways_are_chosen_by_the_decoder() -> None:
    assert isinstance(TINY.detokenizer(), ByteDetokenizer)
    assert isinstance(SP.detokenizer(), WindowDetokenizer)
    assert isinstance(wordpiece().detokenizer(), WindowDetokenizer)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [TINY, SP], ids=["bytes", "pieces"])
def test_a_text_comes_back_piece_by_piece(tokenizer: GatewayTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text == whole(tokenizer, ids)
    assert tokenizer.decode(ids) == text


def test_words_keep_their_spaces() -> None:
    tokenizer = wordpiece()
    ids = tokenizer.encode("Hello world, how are you?")
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == whole(tokenizer, ids)
    assert "world" in "".join(pieces)


@given(st.lists(st.integers(0, 354), max_size=40))
def test_any_ids_decode_as_the_library_does(ids: list[int]) -> None:
    detokenizer = TINY.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == whole(TINY, tuple(ids))


@given(st.text("Helo wrd\u0301é日🙂\n\u2581", max_size=60))
def test_any_text_comes_back_through_a_window(text: str) -> None:
    ids = SP.encode(text)
    detokenizer = SP.detokenizer()
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == whole(SP, ids)


def test_special_tokens_have_no_text_unless_asked_for() -> None:
    ids = (*TINY.encode("a"), 0, *TINY.encode("b"))
    assert TINY.decode(ids) == "ab"
    assert TINY.decode(ids, skip_special_tokens=False) == "a<|end|>b"
    assert SP.decode((1, *SP.encode("world"), 2)) == "world"


def test_tokens_marked_special_count_even_outside_the_map() -> None:
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken("<think>", special=False), AddedToken("｜x▁y｜", special=True)]
    )
    ours = GatewayTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    ids = (65, 256, 257, 66)
    assert ours.decode(ids) == "A<think>B" == whole(ours, ids)
    assert ours.decode(ids, skip_special_tokens=False) == "A<think>｜x▁y｜B"


def test_an_output_keeps_the_space_after_its_prompt() -> None:
    prompt, output = SP.encode("Hello"), SP.encode("world")
    alone, after = SP.detokenizer(), SP.detokenizer(prompt)
    assert "".join([*map(alone.push, output), alone.flush()]) == "world"
    assert "".join([*map(after.push, output), after.flush()]) == " world"


def test_half_a_character_is_held_and_shown_as_such_at_the_end() -> None:
    ids = TINY.encode("é")
    detokenizer = TINY.detokenizer()
    assert [detokenizer.push(ids[0]), detokenizer.flush()] == ["", "\ufffd"]
    # A byte that no character starts with comes out with what follows it.
    (stray,) = (i for i, data in enumerate(TINY._table.bytes_of_id) if data == b"\xa9")  # type: ignore[union-attr]
    detokenizer = TINY.detokenizer()
    text = detokenizer.push(ids[0]) + detokenizer.push(ids[0]) + detokenizer.push(stray)
    assert text == "\ufffdé"


def test_a_window_gives_up_on_a_character_that_never_ends() -> None:
    high = SP.encode("\u00e9")[-1]
    detokenizer = SP.detokenizer()
    text = "".join(detokenizer.push(high) for _ in range(40))
    assert text
    assert len(text + detokenizer.flush()) == 40


def test_ids_beyond_the_vocabulary_have_no_text() -> None:
    assert TINY.decode((511, *TINY.encode("a"))) == "a"
    assert TINY.token_bytes(511) == b""


def test_single_tokens() -> None:
    ids = TINY.encode("é")
    assert [TINY.token_text(token_id) for token_id in ids] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert TINY.token_text(0) == "<|end|>"
    (space_world,) = TINY.encode(" world")
    assert TINY.token_text(space_world) == " world"
    assert TINY.token_bytes(space_world) == b" world"
    assert SP.token_bytes(SP.encode("world")[0]) == b" world"
    assert SP.token_bytes(3 + 0xE9) == b"\xe9"


def test_every_byte_has_its_own_character() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())


def test_specials_are_where_the_fixture_says() -> None:
    assert [TINY.token_text(i) for i in range(5)] == SPECIALS


@given(st.text(max_size=40))
def test_a_text_has_at_least_as_many_tokens_as_said(text: str) -> None:
    for one in (text, text * 5, f"{text}<|end|> {text}"):
        assert TINY.least_tokens(one) <= len(TINY.encode(one))


def test_a_folder_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(CheckpointError, match="put its files"):
        GatewayTokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "none"}}')
    with pytest.raises(CheckpointError, match="no tokenizer that loads"):
        GatewayTokenizer.load(str(tmp_path))
