"""Tiny models of the families people have, with random weights."""

import torch
import transformers
from torch import nn

VOCABULARY = 128
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def llama(**changes):
    settings = {**COMMON, **SMALL, "num_key_value_heads": 2, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()


def qwen2():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, **SMALL, num_key_value_heads=2)).eval()


def opt():
    settings = {**COMMON, **SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64}
    settings.pop("intermediate_size")
    return transformers.OPTForCausalLM(transformers.OPTConfig(**settings)).eval()


def gpt2():
    config = transformers.GPT2Config(**COMMON, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON, **SMALL)).eval()


def mixtral():
    config = transformers.MixtralConfig(**COMMON, **SMALL, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def t5():
    settings = {**COMMON, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**settings, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def tied_llama():
    return llama(tie_word_embeddings=True)


FAMILIES = {f.__name__: f for f in (llama, tied_llama, qwen2, opt, gpt2, bert, mixtral, t5)}


class Plain(nn.Module):
    """A model that nobody's library knows: two linears, a norm, a buffer, and an inner product of odd sizes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(20, 33)
        self.norm = nn.LayerNorm(33)
        self.blocks = nn.ModuleList([nn.Linear(33, 33, bias=False), nn.Linear(33, 7)])
        self.register_buffer("shift", torch.randn(20))

    def forward(self, x):
        x = self.norm(self.first(x + self.shift)).relu()
        for block in self.blocks:
            x = block(x)
        return x


def logits(model, seed=0, length=12):
    """The model's logits for two sequences of random tokens."""
    ids = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits
