"""model.py against torch's own layers, formulas written out here, and transformers if installed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import model as M
from model import ModelConfig, Transformer

TINY = {"vocab_size": 96, "context_length": 128, "d_model": 32, "num_layers": 2, "num_heads": 4}


def tiny(seed=0, **flags):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**{**TINY, **flags})).eval()


def random_ids(*shape, vocab=96, seed=1):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


# ---- against transformers -----------------------------------------------------------------------

HF_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
HF_MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "llama-tied-linear": ("Llama", {"tie_word_embeddings": True,
                                    "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16,
                               "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2,
                               "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", None),
}


def import_transformers():
    """transformers asks for a package named kernels and must not find our kernels.py."""
    path, ours = sys.path[:], sys.modules.pop("kernels", None)
    sys.path[:] = [p for p in path if not Path(p, "kernels.py").exists()]
    try:
        transformers = pytest.importorskip("transformers")
        importlib.import_module("transformers.integrations.hub_kernels")
        return transformers
    finally:
        sys.path[:] = path
        if ours:
            sys.modules["kernels"] = ours


def hf_model(name, directory):
    """A random tiny checkpoint of that architecture, written by transformers."""
    transformers = import_transformers()
    kind, extra = HF_MODELS[name]
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4,
                                         n_positions=128)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = getattr(transformers, kind + "Config")(**{**HF_SIZES, **extra})
        model = getattr(transformers, kind + "ForCausalLM")(config)
    torch.manual_seed(0)
    for p in model.parameters():  # their initial biases are 0 and norms 1: too forgiving
        torch.nn.init.normal_(p, std=0.1 if p.dim() == 2 else 0.3)
        if p.dim() == 1:
            p.data += 1
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("name", HF_MODELS)
def test_transformers_agree_both_ways(name, tmp_path):
    theirs = hf_model(name, tmp_path / "theirs")
    ours, ids = Transformer.from_pretrained(tmp_path / "theirs").eval(), random_ids(2, 40)
    want = theirs(ids)
    want_loss = torch.nn.functional.cross_entropy(want.logits[:, :-1].flatten(0, 1),
                                                  ids[:, 1:].flatten())
    torch.testing.assert_close(ours(ids), want.logits, atol=1e-5, rtol=1e-5)
    want_loss.backward()
    ours.loss(ids[:, :-1], ids[:, 1:]).backward()
    torch.testing.assert_close(ours.embed.weight.grad, theirs.get_input_embeddings().weight.grad,
                               atol=1e-5, rtol=1e-5)
    prompt = ids[:1, :20]
    greedy = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64,
                             do_sample=False, pad_token_id=0)
    assert ours.generate(prompt.tolist(), 64, temperature=0)[0].tokens == greedy[0, 20:].tolist()

    transformers = import_transformers()
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(again) is type(theirs)
    torch.testing.assert_close(again.eval()(ids).logits, want.logits, atol=1e-5, rtol=1e-5)
