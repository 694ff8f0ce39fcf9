"""The layouts of the papers' own files: every tensor lands where its name says, several files make one model, and
positions of another grid are resized as EVA's code does it.

Trusted after mutation: 14 planted bugs (the base's table counts, a tensor given twice passes, bilinear positions,
corners aligned, a grid on its side, a CLS row of the grid, a norm without a name, an image tower that is refused,
another kind of config.json that is not read, an alias that counts) turned red.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from safetensors.torch import save_file
from vkernels_video.model import VideoLLM, preset
from vkernels_video.model.checkpoint import CheckpointError, read, recognise, resized, translate


def eva_block(name: str, c: int, mlp: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.norm1.weight": (c,), f"{name}.norm1.bias": (c,), f"{name}.norm2.weight": (c,),
        f"{name}.norm2.bias": (c,), f"{name}.attn.q_bias": (c,), f"{name}.attn.v_bias": (c,),
        f"{name}.attn.qkv.weight": (3 * c, c), f"{name}.attn.proj.weight": (c, c), f"{name}.attn.proj.bias": (c,),
        f"{name}.mlp.fc1.weight": (mlp, c), f"{name}.mlp.fc1.bias": (mlp,), f"{name}.mlp.fc2.weight": (c, mlp),
        f"{name}.mlp.fc2.bias": (c,),
    }  # fmt: skip


def test_st_llm_layout(tmp_path):
    """Names as the published QA weights have them; one tensor of each kind is followed to its place."""
    model = VideoLLM.from_preset("tiny_st_llm_qa", seed=1)
    own = model.state_dict()
    p = "model.stllm_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{p}visual_encoder.cls_token": (1, 1, 72), f"{p}visual_encoder.pos_embed": (1, 10, 72),
        f"{p}visual_encoder.patch_embed.proj.weight": (72, 3, 14, 14),
        f"{p}visual_encoder.BTAdapter_cls": (1, 1, 72), f"{p}visual_encoder.BTAdapter_position.weight": (8, 72),
        f"{p}ln_vision.weight": (72,), f"{p}ln_vision.bias": (72,), f"{p}query_tokens": (1, 4, 64),
        f"{p}llama_proj.weight": (128, 64), f"{p}llama_proj.bias": (128,),
        f"{p}mvm_decoder.head.weight": (128, 128), f"{p}mvm_decoder.head.bias": (128,),
        f"{p}mvm_decoder.norm.weight": (128,), f"{p}mvm_decoder.norm.bias": (128,),
        f"{p}embed_tokens.weight": (259, 128),
    }  # fmt: skip
    for i in range(4):
        shapes |= eva_block(f"{p}visual_encoder.blocks.{i}", 72, 128)
    for i in range(2):
        shapes |= eva_block(f"{p}visual_encoder.BTAdapter_S.{i}", 72, 128)
        temporal = {
            k: v
            for k, v in eva_block(f"{p}visual_encoder.BTAdapter_T.{i}", 72, 128).items()
            if "attn" in k or "norm1" in k
        }
        shapes |= temporal | {f"{p}visual_encoder.BTAdapter_T.{i}.temporal_fc.weight": (72, 72)}
        shapes |= {f"{p}visual_encoder.BTAdapter_T.{i}.temporal_fc.bias": (72,)}
    for name, tensor in own.items():
        if name.startswith("projector.qformer.") and "query_tokens" not in name:
            old = name.replace("projector.qformer.", f"{p}Qformer.bert.").replace(
                "embeddings.layernorm", "embeddings.LayerNorm"
            )
            old = old.replace("attention.attention.", "attention.self.")
            shapes[old] = tuple(tensor.shape)
        elif name.startswith("decoder."):
            short = name.removeprefix("decoder.")
            shapes[short if short.startswith("lm_head") else f"model.{short}"] = tuple(tensor.shape)
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    unused = [r"encoder\.(post_layernorm|visual_projection)"]
    loaded = VideoLLM.from_pretrained(tmp_path, config="tiny_st_llm_qa", allow_missing=unused).state_dict()
    v = f"{p}visual_encoder."
    for new, old in {
        "encoder.class_embedding": state[f"{v}cls_token"].flatten(),
        "encoder.position_embedding.weight": state[f"{v}pos_embed"][0],
        "encoder.layers.3.self_attn.k_proj.weight": state[f"{v}blocks.3.attn.qkv.weight"][72:144],
        "encoder.layers.3.self_attn.v_proj.bias": state[f"{v}blocks.3.attn.v_bias"],
        "encoder.layers.0.self_attn.out_proj.weight": state[f"{v}blocks.0.attn.proj.weight"],
        "encoder.btadapter_cls_token": state[f"{v}BTAdapter_cls"],
        "encoder.btadapter_time_embed.weight": state[f"{v}BTAdapter_position.weight"],
        "encoder.btadapter_S_layers.1.layer_norm2.bias": state[f"{v}BTAdapter_S.1.norm2.bias"],
        "encoder.btadapter_T_layers.1.temporal_fc.weight": state[f"{v}BTAdapter_T.1.temporal_fc.weight"],
        "projector.qformer.encoder.layer.2.crossattention.attention.key.weight": state[
            f"{p}Qformer.bert.encoder.layer.2.crossattention.self.key.weight"
        ],
        "projector.qformer.embeddings.layernorm.bias": state[f"{p}Qformer.bert.embeddings.LayerNorm.bias"],
        "projector.ln_vision.weight": state[f"{p}ln_vision.weight"],
        "mvm.head.bias": state[f"{p}mvm_decoder.head.bias"],
        "decoder.layers.1.mlp.up_proj.weight": state["model.layers.1.mlp.up_proj.weight"],
        "decoder.lm_head.weight": state["lm_head.weight"],
        "decoder.embed_tokens.weight": state["model.embed_tokens.weight"],  # not the alias
    }.items():
        assert torch.equal(loaded[new], old), new


@pytest.mark.parametrize("old", ["btadapter", "timesFPN"])
def test_bt_adapter_layout_in_three_files(tmp_path, old):
    model = VideoLLM.from_preset("tiny_bt_llava", seed=3)
    parts: dict[str, dict[str, Tensor]] = {"tower": {}, "projector": {}, "llm": {}}
    for name, tensor in model.state_dict().items():
        kind, rest = name.split(".", 1)
        if kind == "encoder":
            parts["tower"]["model.vision_tower." + rest.replace("btadapter", old)] = tensor
        elif kind == "projector":
            parts["projector"][f"model.mm_projector.{rest}"] = tensor
        else:
            parts["llm"][rest if rest.startswith("lm_head") else f"model.{rest}"] = tensor
    torch.save({"state_dict": parts["tower"] | parts["projector"]}, tmp_path / "bt.pth")
    save_file(parts["llm"], tmp_path / "model.safetensors")
    loaded = VideoLLM.from_pretrained(tmp_path / "bt.pth", tmp_path / "model.safetensors", config="tiny_bt_llava")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def languagebind(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """The encoder of clips, in the names of LanguageBind's video tower."""
    state = {}
    for name, tensor in encoder.state_dict().items():
        short = name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.")
        if short == "position_embedding":
            short = "position_embedding.weight"
        where = "" if short.startswith(("pre_", "layers")) else "embeddings."
        state[f"{prefix}{where}{'encoder.' if short.startswith('layers') else ''}{short}"] = tensor
    return state | {f"{prefix}post_layernorm.weight": torch.zeros(64)}


def test_languagebind_layout():
    encoder = VideoLLM.from_preset("tiny").encoder
    state = languagebind(encoder, "vision_model.") | {"logit_scale": torch.zeros(())}
    source = recognise(state)
    assert source.name == "LanguageBind"
    made, unused = translate(state, source)
    assert sorted(unused) == ["logit_scale", "vision_model.post_layernorm.weight"]
    assert made.keys() == {f"encoder.{name}" for name in encoder.state_dict()}


def eva_names(encoder: torch.nn.Module) -> dict[str, Tensor]:
    """A trunk and its branch in the names mmaction has for EVA's: one packed map of queries, keys and values."""
    own, state = encoder.state_dict(), {}
    places = {
        "class_embedding": "cls_token", "position_embedding.weight": "pos_embed", "layers.": "blocks.",
        "patch_embedding.": "patch_embed.proj.", "btadapter_cls_token": "btadapter_cls", "_layers.": ".",
        "btadapter_time_embed.": "btadapter_position.", "post_layernorm.": "norm.", "visual_projection.": "head.",
        "layer_norm": "norm", "self_attn.out_proj.": "attn.proj.", "self_attn.q_proj.bias": "attn.q_bias",
        "self_attn.v_proj.bias": "attn.v_bias",
    }  # fmt: skip
    for name, tensor in own.items():
        if name.endswith("q_proj.weight"):
            parts = [own[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, tensor = name.replace("self_attn.q_proj", "attn.qkv"), torch.cat(parts)
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        for ours, theirs in places.items():
            if not (ours == "layers." and name.startswith("btadapter")):
                name = name.replace(ours, theirs)
        state[f"backbone.{name}"] = tensor[None] if name == "pos_embed" else tensor
    state["backbone.cls_token"] = state["backbone.cls_token"][None, None]
    return state


def test_bt_adapter_beside_eva(tmp_path):
    """mmaction's names; the head has a bias there, which a trunk without one does not drop."""
    config = preset("tiny_st_llm_qa")
    config = replace(config, encoder=replace(config.encoder, projection_bias=True), connector="linear", qformer=None)
    model = VideoLLM(config).init_weights(6)
    state = eva_names(model.encoder)
    assert {"backbone.btadapter_T.1.attn.qkv.weight", "backbone.btadapter_S.0.norm2.bias", "backbone.head.bias"} <= set(
        state
    )
    assert state["backbone.pos_embed"].shape == (1, 10, 72)
    file = tmp_path / "eva.pth"
    torch.save({"state_dict": state | {"text_backbone.transformer.x": torch.ones(1)}, "meta": {}}, file)
    rest = ["^projector", "^decoder", "^mvm"]
    loaded = VideoLLM.from_pretrained(file, config=config, allow_missing=rest).encoder.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.encoder.state_dict().items())
    plain = replace(config, encoder=replace(config.encoder, projection_bias=False))
    with pytest.raises(CheckpointError, match=r"got 1 unexpected: encoder\.visual_projection\.bias"):
        VideoLLM.from_pretrained(file, config=plain, allow_missing=rest)


def test_resizing_positions_by_hand():
    """4 x 4 places to 2 x 2: each new one lies between two old ones, where the cubic with a = -3/4 weighs four
    neighbours -3/32, 19/32, 19/32, -3/32; beyond the border the last one counts again."""
    near = torch.tensor([[16.0, 19.0, -3.0, 0.0], [0.0, -3.0, 19.0, 16.0]]) / 32
    grid = torch.tensor([[0.0, 1.0, 4.0, 9.0], [2.0, -1.0, 3.0, 0.0], [5.0, 5.0, 5.0, 1.0], [1.0, 0.0, 7.0, 2.0]])
    table = torch.cat([torch.tensor([[8.0, -8.0]]), torch.stack([grid.flatten(), 2 * grid.T.flatten()], dim=1)])
    small = near @ grid @ near.T
    want = torch.cat([table[:1], torch.stack([small.flatten(), 2 * small.T.flatten()], dim=1)])
    torch.testing.assert_close(resized(table, 5), want)
    theirs = torch.nn.functional.interpolate(grid[None, None], (7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(resized(table, 50)[1:, 0], theirs.flatten())
    assert resized(table.half(), 5).dtype == torch.float16
    assert resized(table, 17) is table
    assert resized(table, 7) is table  # no square: refused by its shape, not bent


def llama_names(model: VideoLLM) -> dict[str, Tensor]:
    """The decoder in the names of LLaMA's files."""
    own = model.decoder.state_dict()
    return {name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in own.items()}


def test_video_llavas_own_layout_in_one_folder(tmp_path):
    """Two towers, projector and LLaMA side by side, a config.json of LLaVA's kind: all but the image tower is ours."""
    model = VideoLLM.from_preset("tiny_intp_video_llava", seed=5).eval()
    state = languagebind(model.encoder, "model.video_tower.video_tower.") | llama_names(model)
    state |= {f"model.mm_projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    state["model.video_tower.video_tower.embeddings.position_ids"] = torch.arange(10)[None]
    state["model.image_tower.image_tower.encoder.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = {"model_type": "llava", "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = VideoLLM.from_pretrained(tmp_path, config="tiny_intp_video_llava")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    with pytest.raises(CheckpointError, match=r"decoder\.heads must be 8 for .*, got 4"):
        VideoLLM.from_pretrained(tmp_path, config="tiny_intp_video_llava")
    torch.save(state | {"model.audio_tower.weight": torch.ones(1)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match=r"got 1 unexpected: model\.audio_tower\.weight"):
        VideoLLM.from_pretrained(tmp_path / "other.bin", config="tiny_intp_video_llava")


@pytest.fixture
def files(tmp_path):
    """BT-Adapter's file with its own table of tokens, a projector alone, and LLaMA with another table."""
    model = VideoLLM.from_preset("tiny_bt_llava", seed=3)
    tower = {f"model.vision_tower.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    projector = {f"model.mm_projector.{name}": tensor for name, tensor in model.projector.state_dict().items()}
    llama = llama_names(model)
    table = {"model.embed_tokens.weight": llama["model.embed_tokens.weight"]}
    torch.save(tower | projector | table, tmp_path / "bt.pth")
    torch.save(tower, tmp_path / "tower.pth")
    torch.save(projector, tmp_path / "mm_projector.bin")
    torch.save(llama, tmp_path / "tuned.bin")
    torch.save(llama | {"model.embed_tokens.weight": torch.zeros(259, 128)}, tmp_path / "base.bin")
    return model, tmp_path


@pytest.mark.parametrize("names", [("bt.pth", "base.bin"), ("base.bin", "bt.pth")])
def test_a_tuned_table_counts_before_the_bases(files, names, caplog):
    model, folder = files
    with caplog.at_level(logging.INFO, "vkernels_video"):
        loaded = VideoLLM.from_pretrained(*(folder / name for name in names), config="tiny_bt_llava")
    assert "given twice the tuned model's count: decoder.embed_tokens.weight" in caplog.text
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_two_bases_or_two_tuned_models_are_refused(files):
    _, folder = files
    for first, second in (("base.bin", "tuned.bin"), ("bt.pth", "bt.pth")):
        with pytest.raises(CheckpointError, match=r"must not give decoder\.embed_tokens\.weight a second time"):
            VideoLLM.from_pretrained(folder / first, folder / second, config="tiny_bt_llava")
    with pytest.raises(CheckpointError, match=r"must not give projector\.bias a second time"):
        VideoLLM.from_pretrained(
            folder / "tower.pth", folder / "mm_projector.bin", folder / "mm_projector.bin", config="tiny_bt_llava"
        )


def test_tokens_the_tuned_table_adds(files, caplog):
    """They are read; the base's output map, which is shorter, gives them zeros."""
    model, folder = files
    state = read(folder / "bt.pth")
    state["model.embed_tokens.weight"] = torch.cat([state["model.embed_tokens.weight"], torch.ones(3, 128)])
    torch.save(state, folder / "bt.pth")
    config = preset("tiny_bt_llava").with_options(vocab=262)
    loaded = VideoLLM.from_pretrained(folder / "bt.pth", folder / "base.bin", config=config).decoder
    assert "3 tokens of the tuned table have no row in the base's lm_head: zeros" in caplog.text
    assert torch.equal(loaded.embed_tokens.weight[259:], torch.ones(3, 128))
    assert torch.equal(loaded.lm_head.weight[:259], model.decoder.lm_head.weight)
    assert not loaded.lm_head.weight[259:].any()
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight \(262, 128\) for \(259, 128\)"):
        VideoLLM.from_pretrained(folder / "bt.pth", folder / "base.bin", config="tiny_bt_llava")


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector."])
def test_a_projector_in_a_file_of_its_own(files, prefix):
    model, folder = files
    state = {f"{prefix}{name}": tensor for name, tensor in model.projector.state_dict().items()}
    torch.save(state, folder / "mm_projector.bin")
    paths = [folder / name for name in ("mm_projector.bin", "tower.pth", "tuned.bin")]
    loaded = VideoLLM.from_pretrained(*paths, config="tiny_bt_llava")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_two_tensors_do_not_share_a_name():
    state = {"model.embed_tokens.weight": torch.ones(2, 2), "model.layers.0.x": torch.ones(1)}
    made, _ = translate(state, recognise(state))
    assert made.keys() == {"decoder.embed_tokens.weight", "decoder.layers.0.x"}
    state["embed_tokens.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"got embed_tokens\.weight a second for decoder\.embed_tokens\.weight"):
        translate(state, recognise(state))
