"""launch/model.py against transformers' Llama, and the split and the windows of launch/text.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from console import rate
from model import LanguageModel, ModelConfig
from text import Windows, files_under, read_split, standard_library_files, unigram_entropy
from transformers import LlamaConfig, LlamaForCausalLM

# Our names against Llama's; the part after the layer's number.
LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}


def llama_name(name: str) -> str:
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        part = rest.removesuffix(".weight")
        return f"model.layers.{number}.{LLAMA_NAMES[part]}.weight"
    return {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }[name]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_the_model_is_llama(heads: int, kv_heads: int) -> None:
    torch.manual_seed(heads * 10 + kv_heads)
    config = ModelConfig(vocabulary=61, layers=3, hidden=32, heads=heads, kv_heads=kv_heads, feed_forward=48)
    model = LanguageModel(config)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=config.norm_epsilon,
            rope_theta=config.rotary_base,
            tie_word_embeddings=False,
        )
    )
    theirs = dict(llama.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            theirs.pop(llama_name(name)).copy_(parameter)
    assert not theirs, "every parameter has a counterpart"
    tokens = torch.randint(61, (3, 19))
    targets = torch.randint(61, (3, 19))
    logits = llama(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-5)
    loss = model(tokens, targets)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize(("sizes", "knob"), [({"heads": 5}, "heads=5"), ({"kv_heads": 4}, "kv_heads=4")])
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int], knob: str) -> None:
    with pytest.raises(ValueError, match=knob):
        ModelConfig(**sizes)


def test_the_default_has_about_ten_million_parameters() -> None:
    with torch.device("meta"):
        model = LanguageModel(ModelConfig())
    assert 9e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6


def test_the_standard_library_is_split_by_file() -> None:
    files = standard_library_files()
    assert files == sorted(files)
    assert not any("site-packages" in path.parts for path in files)
    training, held_out = read_split(files)
    assert len(training) + len(held_out) == sum(path.stat().st_size for path in files)
    assert len(held_out) == sum(path.stat().st_size for path in files[9::10])
    assert 2 < unigram_entropy(held_out) < 4


def test_one_file_holds_out_its_end(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(200)))
    training, held_out = read_split(files_under(tmp_path / "text"))
    assert training.tolist() == list(range(180))
    assert held_out.tolist() == list(range(180, 200))
    assert files_under(tmp_path) == files_under(tmp_path / "text")


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data"):
        files_under(tmp_path)
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(ValueError, match="too few"):
        read_split([tmp_path / "short"])
    with pytest.raises(ValueError, match="lower --seq"):
        Windows(torch.zeros(16, dtype=torch.uint8), seq=16, count=1)


def test_unigram_entropy_of_known_texts() -> None:
    assert unigram_entropy(torch.full((9,), 7, dtype=torch.uint8)) == 0
    uniform = torch.arange(256).repeat(3).to(torch.uint8)
    assert unigram_entropy(uniform) == pytest.approx(torch.log(torch.tensor(256.0)).item())


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_windows_are_text_and_its_continuation(seed: int | None) -> None:
    text = torch.arange(200, dtype=torch.uint8)
    windows = Windows(text, seq=8, count=50, seed=seed)
    starts = [int(row["tokens"][0]) for row in windows]
    for row, start in zip(windows, starts, strict=True):
        assert row["tokens"].tolist() == list(range(start, start + 8))
        assert row["targets"].tolist() == list(range(start + 1, start + 9))
    assert starts == [int(row["tokens"][0]) for row in Windows(text, seq=8, count=50, seed=seed)]
    if seed is None:
        assert (starts[0], starts[-1]) == (0, 191), "the whole text is covered"
    else:
        assert starts != sorted(starts)


@pytest.mark.parametrize(
    ("value_per_s", "text"),
    [(0, "0.00 B/s"), (0.9996, "1.00 B/s"), (999.4, "999 B/s"), (999.6, "1.00 kB/s"), (2.5e9, "2.50 GB/s")],
)
def test_rates_are_printed_in_three_digits(value_per_s: float, text: str) -> None:
    assert rate(value_per_s, "B") == text
