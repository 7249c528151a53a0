"""Turns one quantised GGUF file into the folder that vLLM loads: bf16 safetensors, tokenizer, configs.

Called once per machine and model by `model_files`, which owns where the folder lies and that it appears whole.
vLLM no longer reads GGUF, and transformers loads it but refuses to save it: hence this. It knows llama.cpp's
`llama` architecture with a byte-level BPE tokenizer, as the packaged model has them; the rest is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.errors import EngineFailed

# llama.cpp's tensor names → transformers' names; the second table stands under `blk.N.` / `model.layers.N.`.
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

# A plain ChatML template cannot show tools. With tools, this stands in for it, in the Hermes format that vLLM's
# parser of that name reads; without tools the model's own template runs unchanged.
_TOOLS_TEMPLATE = r"""
{{- '<|im_start|>system\n' }}
{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\n\n' }}{%- endif %}
{{- 'You may call these functions:\n<tools>' }}
{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '\n</tools>\nTo call one, answer with its name and arguments:\n<tool_call>\n' }}
{{- '{"name": <name>, "arguments": <arguments>}\n</tool_call><|im_end|>\n' }}
{%- for message in messages %}{%- if not (loop.first and message['role'] == 'system') %}
{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}
{%- for call in message['tool_calls'] or [] %}
{{- '\n<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
{{- (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def write_model_folder(gguf_file: Path, folder: Path) -> None:
    """Dequantise a GGUF file to a model folder; a few seconds of one core and the model's size in memory.

    Args:
        gguf_file: a single-file GGUF of the `llama` architecture.
        folder: an existing, empty folder.

    Raises:
        EngineFailed: the file holds an architecture, tokenizer or tensor that is not known here.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    found = (
        meta.get("general.architecture"),
        meta.get("tokenizer.ggml.model"),
        meta.get("tokenizer.ggml.pre"),
    )
    if found != ("llama", "gpt2", "smollm"):
        raise EngineFailed(
            f"{gguf_file.name}: architecture, tokenizer and pre-tokenizer are {found}; "
            "only ('llama', 'gpt2', 'smollm') can be converted. Name a safetensors folder instead."
        )
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    _write_json(folder / "config.json", _config(meta, tied=tied))
    _write_json(folder / "generation_config.json", _generation_config(meta))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    _write_tokenizer(meta, folder / "tokenizer.json")
    _write_weights(reader.tensors, meta, folder / "model.safetensors")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "num_hidden_layers": meta["llama.block_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": meta["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": meta["llama.rope.freq_base"],
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    template = meta["tokenizer.chat_template"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": f"{{%- if tools %}}{_TOOLS_TEMPLATE}{{%- else %}}{template}{{%- endif %}}",
    }


def _write_tokenizer(meta: dict[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # llama.cpp's `smollm` pre-tokenizer: digits one by one, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(path))


def _write_weights(tensors: list[Any], meta: dict[str, Any], path: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q.weight": meta["llama.attention.head_count"],
        "attn_k.weight": meta["llama.attention.head_count_kv"],
    }
    weights = {}
    for tensor in tensors:
        kind = tensor.name.split(".", 2)[-1]
        values = dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.startswith("blk.") and kind in heads:
            values = _unpermute(values, heads[kind])
        # Unquantised tensors are read-only views of the file; torch wants memory of its own.
        weights[_transformers_name(tensor.name)] = torch.tensor(values).to(torch.bfloat16)
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes 0600: other users' replicas could not read the cache


def _transformers_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, kind = name.split(".", 2)
        if kind in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[kind]}"
    elif name in _TOP_NAMES:
        return _TOP_NAMES[name]
    raise EngineFailed(f"tensor {name} of the GGUF file is not known; this architecture cannot be converted")


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's reordering of Q and K rows: interleaved pairs back to transformers' two halves.

    Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py, of which this is the inverse.

    Args:
        weight: array of shape (heads * head_size, hidden).
        heads: query heads for Q, key-value heads for K.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
