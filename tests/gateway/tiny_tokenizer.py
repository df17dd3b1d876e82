"""A small byte-level BPE tokenizer with a chat template, trained in a moment."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raymoe.gateway import GatewayTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello world, how are you today? "
    "Der schnelle braune Fuchs. def main(): return 42 while true. "
) * 4
CHAT_TEMPLATE = (
    "{%- if tools %}<|system|>tools: {% for tool in tools %}{{ tool.function.name }} "
    "{% endfor %}<|end|>{% endif -%}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' and not message.tool_call_id %}"
    "{{ raise_exception('a tool message needs an id') }}{% endif -%}"
    "<|{{ message.role }}|>{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}"
    "[{{ call.function.name }}({% for k, v in call.function.arguments.items() %}"
    "{{ k }}={{ v }}{% endfor %})]{% endfor -%}"
    "<|end|>{% endfor -%}"
    "{%- if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> GatewayTokenizer:
    """512 tokens, every byte among them; <|end|> is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    wrapped.chat_template = chat_template
    return GatewayTokenizer(wrapped)
