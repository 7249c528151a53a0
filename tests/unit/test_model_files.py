"""Where a model's files come from, and how a packaged GGUF becomes a folder that vLLM loads."""

import base64
import hashlib
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from actors.engines import model_files
from actors.engines.gguf_files import write_model_folder
from actors.engines.model_files import resolve_model
from actors.errors import EngineFailed

HIDDEN, HEADS, KV_HEADS, LAYERS = 8, 4, 2, 1
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "H", "i", "Hi", "Ġ", "1", "2", "12"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K (`LlamaModel.permute`)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, 16),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, *, pre: str = "smollm", tensors: dict[str, np.ndarray] | None = None) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * 7)
    writer.add_token_merges(["H i", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values in (tensors or weights()).items():
        stored = values
        if "attn_q" in name:
            stored = permuted(values, HEADS)
        elif "attn_k" in name:
            stored = permuted(values, KV_HEADS)
        writer.add_tensor(name, np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_model_folder(write_gguf(tmp_path / "tiny.gguf"), folder)
    return folder


def test_weights_come_out_in_bf16_under_transformers_names_in_their_own_order(model_folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    loaded = load_file(model_folder / "model.safetensors")
    expected = weights()
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    assert loaded.keys() == pairs.keys()
    for ours, theirs in pairs.items():
        assert loaded[ours].dtype == torch.bfloat16
        assert torch.equal(loaded[ours], torch.tensor(expected[theirs]).to(torch.bfloat16)), ours


def test_the_config_says_what_the_model_is(model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["max_position_embeddings"] == 64
    assert config["vocab_size"] == len(TOKENS)
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2


def test_the_tokenizer_merges_splits_digits_and_keeps_control_tokens_whole(model_folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>Hi 12", add_special_tokens=False).ids == [1, 5, 6, 7, 8]
    assert tokenizer.decode([5, 6, 7]) == "Hi 1"


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "add"}}]])
def test_the_template_shows_tools_and_is_the_models_own_without_them(model_folder: Path, tools) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = json.loads((model_folder / "tokenizer_config.json").read_text())["chat_template"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = environment.from_string(template).render(
        messages=messages, tools=tools, add_generation_prompt=True
    )
    if tools is None:
        assert text == "<|im_start|>Be brief.<|im_end|><|im_start|>Hi<|im_end|>"
    else:
        assert '"add"' in text
        assert text.count("Be brief.") == 1
        assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_an_unknown_tokenizer_or_tensor_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="llama-bpe"):
        write_model_folder(write_gguf(tmp_path / "a.gguf", pre="llama-bpe"), tmp_path)
    odd = {"blk.0.ssm_conv.weight": np.zeros((8, 8), np.float32)}
    with pytest.raises(EngineFailed, match=r"blk\.0\.ssm_conv\.weight"):
        write_model_folder(write_gguf(tmp_path / "b.gguf", tensors=odd), tmp_path)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `tiny-model` 1.0 that holds one GGUF file; the path of that file."""
    site = tmp_path / "site"
    info = site / "tiny_model-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tiny_model").mkdir()
    gguf = write_gguf(site / "tiny_model" / "tiny.gguf")
    digest = base64.urlsafe_b64encode(hashlib.sha256(gguf.read_bytes()).digest()).decode().rstrip("=")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"tiny_model/tiny.gguf,sha256={digest},{gguf.stat().st_size}\n")
    monkeypatch.syspath_prepend(site)
    return gguf


def test_a_packaged_model_is_prepared_once_and_named_by_its_hash(package: Path, tmp_path: Path) -> None:
    first = resolve_model("package:tiny-model", tmp_path / "cache")
    made = (Path(first.model) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("package:tiny-model", tmp_path / "cache") == first
    assert (Path(first.model) / "model.safetensors").stat().st_mtime_ns == made
    assert first.revision == f"1.0-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"
    assert first.revision in first.model
    assert (Path(first.tokenizer) / "tokenizer.json").is_file()


def test_two_replicas_that_ask_at_once_prepare_it_once(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = []

    def slowly(gguf: Path, folder: Path) -> None:
        prepared.append(folder)
        time.sleep(0.2)
        write_model_folder(gguf, folder)

    monkeypatch.setattr(model_files, "write_model_folder", slowly)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model("package:tiny-model", tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prepared) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


def test_what_a_killed_preparation_left_is_no_model(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(_gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model_files, "write_model_folder", dies)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("package:tiny-model", tmp_path / "cache")
    files = resolve_model("package:tiny-model", tmp_path / "cache")
    assert (Path(files.model) / "model.safetensors").is_file()
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {Path(files.model).name, f"{Path(files.model).name}.lock"}


def test_a_file_that_is_not_what_was_installed_is_refused(package: Path, tmp_path: Path) -> None:
    package.write_bytes(package.read_bytes() + b"x")
    with pytest.raises(EngineFailed, match="reinstall"):
        resolve_model("package:tiny-model", tmp_path / "cache")


def test_a_missing_package_names_the_extra_that_brings_it(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match=r"shoal\[local\]"):
        resolve_model("package:no-such-model", tmp_path)


def test_a_folder_is_used_as_it_is_and_its_revision_follows_its_weights(
    model_folder: Path, tmp_path: Path
) -> None:
    before = resolve_model(str(model_folder), tmp_path)
    assert before.model == before.tokenizer == str(model_folder)
    assert resolve_model(str(model_folder), tmp_path) == before
    data = bytearray((model_folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model_folder / "model.safetensors").write_bytes(data)
    assert resolve_model(str(model_folder), tmp_path).revision != before.revision


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(EngineFailed, match="safetensors"):
        resolve_model(str(tmp_path), tmp_path)


def test_a_hub_id_is_passed_on_with_its_revision(tmp_path: Path) -> None:
    pinned = resolve_model("org/name@abc123", tmp_path)
    assert (pinned.model, pinned.hub_revision, pinned.revision) == ("org/name", "abc123", "abc123")
    floating = resolve_model("org/name", tmp_path)
    assert (floating.hub_revision, floating.revision) == (None, "")


@pytest.mark.parametrize("model", ["/no/such/folder", "./missing", "~/missing", "just-a-name", "a/b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="allowed are"):
        resolve_model(model, tmp_path)
