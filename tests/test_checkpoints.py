"""Conversion between DeepSeek's format and transformers': names, configs, outputs, the way there and back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, JanusForConditionalGeneration, JanusProcessor

from original_janus import (
    FIXTURES,
    HF_CODEBOOK,
    KEPT,
    copy_folder,
    everything,
    fixture_of,
    weight,
    write_as_bin,
    write_original,
)
from stage_grpo.checkpoints import configs, convert, names
from stage_grpo.checkpoints.layout import CODES_USED, layout_of, unit_codebook
from stage_grpo.checkpoints.shards import weight_files
from stage_grpo.policy import load_policy, load_tokenizer

IDS = {"bos": 100000, "eos": 100001, "pad": 100015, "image": 100581, "boi": 100016}


# What belongs where


@pytest.mark.parametrize(
    ("name", "hidden", "inner", "layers", "heads", "num_tensors"),
    [("pro_1b", 2048, 5632, 24, 16, 882), ("pro_7b", 4096, 11008, 30, 32, 936)],
)
def test_every_tensor_of_janus_pro_maps_one_to_one(name, hidden, inner, layers, heads, num_tensors):
    fixture = fixture_of(name)
    original = {key: tuple(shape) for key, shape in fixture["tensors"].items()}
    assert len(original) == num_tensors
    config = configs.to_transformers_config(fixture["config"], IDS)
    text = config.text_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (hidden, inner, layers)
    assert (text.num_attention_heads, text.vocab_size, text.max_position_embeddings) == (heads, 102400, 16384)
    layout = layout_of(config)

    assert layout.original | layout.original_only == original
    assert not layout.original.keys() & layout.original_only.keys()
    forward = {key: names.to_transformers(key) for key in layout.original}
    reached = [new for new_names in forward.values() for new in new_names]
    assert len(reached) == len(set(reached)) and set(reached) == layout.transformers.keys()
    for key, new_names in forward.items():
        places = [names.to_original(new) for new in new_names]
        assert places == [(key, i, len(new_names)) for i in range(len(new_names))]
        counts = sum(math.prod(layout.transformers[new]) for new in new_names)
        assert counts == math.prod(original[key]), key


def test_names_worked_by_hand():
    assert names.to_transformers("vision_model.vision_tower.blocks.11.attn.qkv.bias") == [
        f"model.vision_model.encoder.layers.11.self_attn.{part}_proj.bias" for part in "qkv"
    ]
    assert names.to_transformers("gen_vision_model.decoder.conv_blocks.3.res.2.norm1.weight") == [
        "model.vqmodel.decoder.up.3.block.2.norm1.weight"
    ]
    assert names.to_transformers("gen_vision_model.encoder.mid.1.proj_out.bias") == [
        "model.vqmodel.encoder.mid.attn_1.proj_out.bias"
    ]
    assert names.to_transformers("gen_aligner.layers.2.weight") == ["model.generation_aligner.hidden_layers.0.weight"]
    assert names.to_transformers("vision_model.vision_tower.cls_token") == []
    assert names.to_original("lm_head.weight") == ("language_model.lm_head.weight", 0, 1)
    assert names.to_original("model.vision_model.encoder.layers.0.self_attn.v_proj.weight") == (
        "vision_model.vision_tower.blocks.0.attn.qkv.weight",
        2,
        3,
    )
    assert names.to_original("model.vision_model.head.weight") is None


@pytest.mark.parametrize("name", ["pro_1b", "pro_7b", "tiny"])
def test_config_survives_the_way_there_and_back(name):
    original = fixture_of(name)["config"]
    ids = IDS if name != "tiny" else {key: i for i, key in enumerate(IDS)}
    config = configs.to_transformers_config(original, ids)
    back = configs.to_original_config(config)
    assert configs.to_transformers_config(back, ids).to_dict() == config.to_dict()
    for section in (f"{name}_config" for name in configs.SECTIONS):
        assert back[section] == original[section]
    assert original["language_config"].items() <= (back["language_config"] | {"torch_dtype": back_dtype(name)}).items()


def back_dtype(name):
    return "float32" if name == "tiny" else "bfloat16"


def test_config_of_the_released_7b_leaves_the_sizes_to_llamas_defaults():
    original = fixture_of("pro_7b")["config"]
    released = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
    short = configs.to_transformers_config(original | {"language_config": released}, IDS)
    assert short.to_dict() == configs.to_transformers_config(original, IDS).to_dict()
    vision = short.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1024, 24, 16)
    assert (vision.num_image_tokens, vision.projection_dim, vision.depth) == (576, 4096, 2)
    assert (short.vq_config.num_embeddings, short.vq_config.embed_dim, short.vq_config.num_patches) == (16384, 8, 24)
    assert (short.image_token_id, short.text_config.pad_token_id) == (100581, 100015)
    assert short.tie_word_embeddings is False and short.text_config.tie_word_embeddings is False


def test_layers_beyond_the_selected_one_are_not_built():
    original = fixture_of("pro_1b")["config"]
    for select, layers in [(-1, 24), (-2, 23), (5, 5)]:
        original["vision_config"]["params"]["select_layer"] = select
        assert configs.to_transformers_config(original, IDS).vision_config.num_hidden_layers == layers


def test_rotary_settings_survive():
    original = fixture_of("tiny")["config"]
    scaling = {"rope_type": "linear", "factor": 2.0}
    original["language_config"] |= {"rope_theta": 1234.0, "rope_scaling": scaling}
    config = configs.to_transformers_config(original, dict.fromkeys(IDS, 1))
    assert config.text_config.rope_parameters == {"rope_theta": 1234.0, **scaling}
    back = configs.to_original_config(config)["language_config"]
    assert back["rope_theta"] == 1234.0 and back["rope_scaling"] == scaling


# What the converted model computes


@torch.no_grad()
def test_converted_model_computes_what_deepseeks_code_computes(converted):
    theirs = {key: torch.from_numpy(value) for key, value in np.load(FIXTURES / "janus_parity.npz").items()}
    random = np.random.RandomState(0)
    input_ids = torch.from_numpy(random.randint(0, 96, (2, 7)))
    pixels = torch.from_numpy(random.uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32))
    codes = torch.from_numpy(random.randint(0, 64, (2, 16)))
    model = JanusForConditionalGeneration.from_pretrained(converted).eval()

    embedded = [model.get_input_embeddings()(input_ids), model.prepare_embeddings_for_image_generation(codes)]
    hidden = model.model.language_model(inputs_embeds=torch.cat(embedded, dim=1)).last_hidden_state
    encoded = model.model.vqmodel.encode(pixels)
    ours = {
        "text_logits": model(input_ids=input_ids).logits,
        "image_logits": model.model.generation_head(hidden[:, -17:]),
        "vision": model.model.get_image_features(pixels).pooler_output,
        "encode_quantized": encoded.quantized_last_hidden_state,
        "decode": model.model.vqmodel.decode(codes),
    }
    assert torch.equal(encoded.image_tokens, theirs.pop("encode_codes"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    # With the rows as they were stored, transformers' encoder picks other codes: hence unit rows.
    model.model.vqmodel.quantize.embedding.weight.copy_(weight(names.CODEBOOK, (64, 8)))
    assert not torch.equal(model.model.vqmodel.encode(pixels).image_tokens, encoded.image_tokens)


def test_tokenizer_and_template_are_deepseeks(converted):
    fixture = fixture_of("tiny")
    processor = JanusProcessor.from_pretrained(converted)
    for tokenizer in (AutoTokenizer.from_pretrained(converted), processor.tokenizer):
        assert tokenizer(fixture["text"])["input_ids"] == fixture["ids"]
        assert (tokenizer.boi_token, tokenizer.image_token) == ("<begin_of_image>", "<image_placeholder>")
    question, turns = fixture["chats"]
    ask = [{"role": "user", "content": [{"type": "text", "text": "a red circle "}]}]
    assert processor.apply_chat_template(ask, add_generation_prompt=True) == question
    assert processor.apply_chat_template([*ask, {"role": "assistant", "content": ""}]) == question
    talk = [("user", "hi"), ("assistant", "ho"), ("user", "again")]
    messages = [{"role": role, "content": text} for role, text in talk]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == turns
    picture = [{"role": "User", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    assert processor.apply_chat_template(picture) == "<|User|>: <image_placeholder>\nwhat?\n\n"
    images = processor.image_processor
    assert tuple(images.image_mean) == (0.5, 0.5, 0.5) and images.size["height"] == 64 and images.min_size == 14


def test_ids_reach_config_and_generation_config(converted):
    model = JanusForConditionalGeneration.from_pretrained(converted)
    ids = {token: fixture_of("tiny")["ids"][0] + i for i, token in enumerate(["bos", "eos", "pad", "image", "boi"])}
    generation = model.generation_config
    for holder in (model.config.text_config, generation):
        assert [holder.bos_token_id, holder.eos_token_id, holder.pad_token_id] == [ids["bos"], ids["eos"], ids["pad"]]
    assert model.config.image_token_id == ids["image"]
    assert generation.generation_kwargs == {"boi_token_id": ids["boi"]} and generation.guidance_scale == 5.0


# There and back


def test_round_trip_gives_the_same_bytes(weights, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    source = write_original(tmp_path / "original", half)
    write_as_bin(source, half, num_files=3)
    there = convert(source, tmp_path / "there", max_shard_bytes=3_000_000)
    back = convert(there, tmp_path / "back", to="original", max_shard_bytes=2_000_000)

    assert len(weight_files(source)) == 3 and len(weight_files(there)) > 2 and len(weight_files(back)) > 3
    again = everything(back)
    assert again.keys() == half.keys()
    for name, tensor in half.items():
        assert again[name].dtype == torch.bfloat16
        assert torch.equal(again[name].view(torch.int16), tensor.view(torch.int16)), name
    for folder, key in [(there, "dtype"), (back, "torch_dtype")]:
        assert json.loads((folder / "config.json").read_text())[key] == "bfloat16"
    # One tensor of the converted model is float32, see `unit_codebook`.
    assert {name for name, tensor in everything(there).items() if tensor.dtype != torch.bfloat16} == {HF_CODEBOOK}
    loaded = JanusForConditionalGeneration.from_pretrained(there, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_files_for_deepseeks_code_come_back(converted, tmp_path):
    back, files = convert(converted, tmp_path / "back", to="original"), fixture_of("tiny")["files"]
    read = {name: json.loads((back / name).read_text()) for name in files}
    assert read["preprocessor_config.json"] == files["preprocessor_config.json"]
    assert read["processor_config.json"] == files["processor_config.json"]
    for name in ("add_bos_token", "model_max_length", "tokenizer_class"):
        assert read["tokenizer_config.json"][name] == files["tokenizer_config.json"][name]
    theirs, ours = files["special_tokens_map.json"], read["special_tokens_map.json"]
    assert set(ours.pop("additional_special_tokens")) == set(theirs.pop("additional_special_tokens"))
    assert ours == theirs
    vocabularies = [part["tokenizer.json"]["model"]["vocab"] for part in (files, read)]
    assert vocabularies[0] == vocabularies[1]


def test_manifest_says_where_everything_went(converted):
    manifest = json.loads((converted / "conversion.json").read_text())
    assert (manifest["num_source_tensors"], manifest["num_tensors"]) == (420, 414)
    kept = set(load_file(converted / KEPT))
    assert set(manifest["kept_in_original_only"]) == kept == set(layout_only()) | {names.CODEBOOK}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= manifest["source"].keys()
    assert all(len(entry["sha256"]) == 64 for entry in manifest["source"].values())
    assert {"torch", "transformers", "stage-grpo"} <= manifest["versions"].keys()


def layout_only():
    return [name for name in fixture_of("tiny")["tensors"] if not names.to_transformers(name)]


def test_way_back_without_the_kept_tensors(converted, tmp_path):
    copy = copy_folder(converted, tmp_path / "trained", without=[KEPT])
    back = convert(copy, tmp_path / "back", to="original")
    made = json.loads((back / "conversion.json").read_text())["made_of_zeros"]
    tensors = everything(back)
    assert set(made) == set(layout_only()) and tensors.keys() == fixture_of("tiny")["tensors"].keys()
    assert all(not tensors[name].any() for name in made) and tensors[CODES_USED].shape == (65536,)
    # The codebook comes back with unit rows, which DeepSeek's code makes of any rows anyway.
    assert torch.equal(tensors[names.CODEBOOK], torch.nn.functional.normalize(weight(names.CODEBOOK, (64, 8)), dim=-1))


def test_codebook_trained_since_is_not_overwritten(converted, tmp_path):
    copy = copy_folder(converted, tmp_path / "trained")
    tensors = load_file(copy / "model.safetensors")
    tensors[HF_CODEBOOK] = tensors[HF_CODEBOOK].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    back = everything(convert(copy, tmp_path / "back", to="original"))
    assert torch.equal(back[names.CODEBOOK], tensors[HF_CODEBOOK])


def test_unit_codebook():
    rows = torch.tensor([[3.0, 4.0], [0.0, -2.0]])
    assert torch.equal(unit_codebook(rows), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    unit = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.bfloat16)
    assert unit_codebook(unit) is unit
    assert unit_codebook(rows.bfloat16()).dtype == torch.float32


def test_rotary_tables_of_old_files_are_kept(weights, tmp_path):
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    source = write_original(tmp_path / "original", {**weights, name: torch.arange(6.0)})
    there = convert(source, tmp_path / "there")
    assert torch.equal(everything(convert(there, tmp_path / "back", to="original"))[name], torch.arange(6.0))


def test_model_with_tied_text_head_survives(checkpoint, tmp_path):
    there = convert(checkpoint, tmp_path / "original", to="original")
    assert json.loads((there / "config.json").read_text())["language_config"]["tie_word_embeddings"] is True
    back = convert(there, tmp_path / "back")
    ours, theirs = everything(back), everything(Path(checkpoint))
    assert ours.keys() == theirs.keys()
    codebook = ours.pop(HF_CODEBOOK)
    assert torch.equal(codebook, unit_codebook(theirs[HF_CODEBOOK]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    policy, before = load_policy(back), load_policy(checkpoint)
    assert policy.config.to_dict() == before.config.to_dict() | {"_name_or_path": str(back)}
    assert load_tokenizer(policy)("a red ring")["input_ids"] == load_tokenizer(before)("a red ring")["input_ids"]
