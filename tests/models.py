"""Small models and prompts for the tests: one of each architecture, and tokens that differ in the subject."""

import torch
import transformers

from mechunlearn.facts.prompts import Prompts

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2_SIZES = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
GPT2_SIZES |= {"bos_token_id": 0, "eos_token_id": 1}
GROUPED = {**SIZES, "num_key_value_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
CONFIGS = {
    "llama": transformers.LlamaConfig(**GROUPED),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "qwen2": transformers.Qwen2Config(
        **GROUPED,
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=16),
    "gemma": transformers.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=16),
    "gemma2": transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4),
    "gemma3_text": transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4),
    "gemma3": transformers.Gemma3Config(
        text_config={**GROUPED, "head_dim": 8, "sliding_window": 4, "model_type": "gemma3_text"},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=96,
    ),
    "mistral3": transformers.Mistral3Config(
        text_config={**GROUPED, "head_dim": 8, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral"},
        image_token_index=96,
    ),
    "llama4_text": transformers.Llama4TextConfig(
        **{**GROUPED, "intermediate_size": 24},
        intermediate_size_mlp=48,
        head_dim=8,
        moe_layers=[],
        attention_chunk_size=4,
        no_rope_layers=[1, 0, 1],
        floor_scale=2,
    ),
    "olmo": transformers.OlmoConfig(**GROUPED, clip_qkv=1.0),
    "olmo2": transformers.Olmo2Config(**GROUPED),
    "olmo3": transformers.Olmo3Config(
        **GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "smollm3": transformers.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1]),
    "granite": transformers.GraniteConfig(
        **GROUPED, residual_multiplier=0.7, logits_scaling=3.0, attention_multiplier=0.2, embedding_multiplier=4.0
    ),
    "starcoder2": transformers.Starcoder2Config(**GROUPED, sliding_window=4),
    "stablelm": transformers.StableLmConfig(**GROUPED, use_qkv_bias=True, qk_layernorm=True, partial_rotary_factor=0.5),
    "cohere": transformers.CohereConfig(**GROUPED, logit_scale=0.3),
    "glm4": transformers.Glm4Config(**GROUPED, head_dim=8, attention_bias=True, partial_rotary_factor=0.5),
    "exaone4": transformers.Exaone4Config(
        **GROUPED,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi": transformers.PhiConfig(**SIZES),
    "phi3": transformers.Phi3Config(**GROUPED),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gpt2": transformers.GPT2Config(**GPT2_SIZES),
    "gptj": transformers.GPTJConfig(**GPT2_SIZES, rotary_dim=4),
}


def auto_class(config):
    """The class of transformers that reads a model: Mistral 3 is no causal language model to it."""
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if known else transformers.AutoModelForImageTextToText


def loaded(folder) -> torch.nn.Module:
    """A stored model."""
    return auto_class(transformers.AutoConfig.from_pretrained(folder)).from_pretrained(folder)


def random_hf(family: str) -> torch.nn.Module:
    """A randomly initialised model with noise on every weight, so that norms and biases matter too."""
    return noisy(CONFIGS[family])


def noisy(config) -> torch.nn.Module:
    """A randomly initialised model of a configuration with noise on every weight."""
    torch.manual_seed(0)
    hf = auto_class(config).from_config(config).eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hf


def token_prompts(vocabulary: int = 97, facts: int = 4, length: int = 7, seed: int = 0) -> Prompts:
    """Random clean and corrupt tokens that differ in the subject, for models without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(2, vocabulary, (facts, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2:4] = torch.randint(2, vocabulary, (facts, 2), generator=generator)
    answer = torch.randint(2, vocabulary // 2, (facts,), generator=generator)
    return Prompts.from_tokens(clean, corrupt, answer, answer + vocabulary // 3, torch.tensor([[2, 3]] * facts))
