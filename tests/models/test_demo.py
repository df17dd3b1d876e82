"""The demo checkpoint loads, speaks its chat format, and routes its domains differently.

The prose, Spanish and mathematics snippets come from the held-out pieces of public-domain
texts; the code is our own.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SNIPPETS = {
    "prose": """FRENCH KING.
We'll give them present audience. Go, and bring them.

[Exeunt Messenger and certain Lords.]

You see this chase is hotly follow'd, friends.

DAUPHIN.
Turn head and stop pursuit; for coward dogs
Most spend their mouths when what they seem to threaten
Runs far before them. Good my sovereign,
Take up the English short, and let them know
Of what a monarchy you are the head.
""",
    "code": '''class Counter:
    """Count how often each key is seen."""

    def __init__(self, name=None):
        self.name = name
        self._counts = {}

    def add(self, key, value=1):
        if not isinstance(value, int):
            raise TypeError("value must be an integer")
        self._counts[key] = self._counts.get(key, 0) + value

    def __len__(self):
        return len(self._counts)
''',
    "languages": """Y bajarás delante de mí á Gilgal; y luego descenderé yo á ti para \
sacrificar holocaustos, é inmolar víctimas pacíficas. Espera siete días, hasta que yo venga á ti, \
y te enseñe lo que has de hacer. Y fué que así como tornó él su hombro para partirse de Samuel, \
mudóle Dios su corazón; y todas estas señales acaecieron en aquel día.""",
    "math": """    $( Define the limit relation for partial functions on the reals.  See
       ~ rlim for its relational expression.  (Contributed by Mario Carneiro,
       16-Sep-2014.) $)
    df-rlim $a |- ~~>r = { <. f , x >. | ( ( f e. ( CC ^pm RR ) /\\ x e. CC ) /\\
      A. y e. RR+ E. z e. RR A. w e. dom f ( z <_ w ->
      ( abs ` ( ( f ` w ) - x ) ) < y ) ) } $.
""",
}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def runs(model, tokenizer):
    """Loss in nats per token, and expert load [L, E] (each layer sums to 1), by domain."""
    found = {}
    for domain, text in SNIPPETS.items():
        ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids, output_router_logits=True)
        load = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
        for layer, scores in enumerate(output.router_logits):  # each [T, E]
            chosen = scores.topk(model.config.num_experts_per_tok).indices.reshape(-1)
            load[layer] = torch.bincount(chosen, minlength=model.config.num_experts).float()
        logits = output.logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()
        found[domain] = (loss, load / load.sum(-1, keepdim=True))
    return found


def test_the_shape_is_the_documented_one(model):
    config = model.config
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (6, 16, 4)
    assert (config.hidden_size, config.moe_intermediate_size, config.vocab_size) == (256, 128, 4096)
    assert sum(p.numel() for p in model.parameters()) == 11_693_696


def test_the_weights_are_small_enough_to_keep_in_git():
    assert (DEMO / "model.safetensors").stat().st_size <= 25_000_000


def test_the_chat_template_renders_known_tokens(tokenizer):
    messages = [{"role": "user", "content": "Who goes there?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == ("<|bos|><|im_start|>user\nWho goes there?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("domain", SNIPPETS)
def test_text_survives_the_tokenizer(tokenizer, domain):
    text = SNIPPETS[domain] + "\u4f60\u597d \U0001f600"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_generation_stops_at_the_end_of_a_turn(model, tokenizer):
    stops = model.generation_config.eos_token_id
    assert stops == tokenizer.convert_tokens_to_ids(["<|eos|>", "<|im_end|>"])


@pytest.mark.parametrize("domain", SNIPPETS)
def test_held_out_text_is_far_more_likely_than_chance(runs, domain):
    loss, _ = runs[domain]
    assert loss < 0.65 * math.log(4096)


def test_domains_use_different_experts(runs):
    loads = {domain: load for domain, (_, load) in runs.items()}
    names = sorted(loads)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            moved = (loads[a] - loads[b]).abs().sum(-1) / 2  # [L] share of pairs elsewhere
            assert moved.mean() > 0.15, (a, b)


def test_load_is_skewed_but_no_layer_has_collapsed(runs):
    total = sum(load for _, load in runs.values()) / len(runs)  # [L, E]
    experts = total.shape[-1]
    assert (total.max(-1).values * experts > 1.2).all()
    assert ((total > 0.1 / experts).sum(-1) >= experts // 2).all()
