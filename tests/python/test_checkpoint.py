"""Loading: checkpoints that transformers writes give transformers' outputs, and nothing is lost in silence. The papers'
own files are in test_layouts."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("einops")

from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from vkernels_video.model import VideoLLM, VideoLLMConfig, preset
from vkernels_video.model.checkpoint import CheckpointError, read, recognise, translate
from vkernels_video.model.decoder import Prompt
from vkernels_video.model.generation import Session

LLAMA = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259, "rms_norm_eps": 1e-5,
}  # fmt: skip
CLIP = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 42,
    "patch_size": 14, "projection_dim": 32,
}  # fmt: skip


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that make every tensor matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            near = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(near + 0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


# --- what transformers writes


def instructblip(folder, **vision) -> InstructBlipForConditionalGeneration:
    """One with EVA's tower, saved in a folder."""
    vision = {**CLIP, "hidden_size": 72, "num_attention_heads": 1, "layer_norm_eps": 1e-6, **vision}
    del vision["projection_dim"]
    qformer = {
        "vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 96,
        "max_position_embeddings": 64, "encoder_hidden_size": 72,
    }  # fmt: skip
    config = InstructBlipConfig(
        vision_config=vision, qformer_config=qformer, text_config=LLAMA, num_query_tokens=4, image_token_index=258
    )
    theirs = scrambled(InstructBlipForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("qkv.bias"):
                parameter[72:144] = 0
    theirs.save_pretrained(folder)
    return theirs


def load_instructblip(folder) -> VideoLLM:
    ours = preset("tiny_st_llm_conversation")
    ours = replace(ours, encoder=replace(ours.encoder, eps=1e-6, patch_bias=True), arrange="all", mvm=False)
    unused = [r"encoder\.(post_layernorm|visual_projection)"]
    return VideoLLM.from_pretrained(folder, config=ours, allow_missing=unused)


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_instructblip(tmp_path, impl):
    theirs = instructblip(tmp_path)
    model = load_instructblip(tmp_path)

    pixels, text = torch.randn(2, 3, 42, 42), torch.randint(0, 250, (1, 6))
    with torch.no_grad():
        features = theirs.vision_model(pixels).last_hidden_state
        queries = theirs.query_tokens.expand(2, -1, -1)
        ones = torch.ones(2, 4 + 6, dtype=torch.int64)
        asked = theirs.qformer(
            input_ids=text.expand(2, -1), attention_mask=ones, query_embeds=queries, encoder_hidden_states=features
        ).last_hidden_state[:, :4]
        expected = theirs.language_projection(asked)
        got = model.visual(model.encode(pixels, impl), impl, text)[0]
        close(got, expected)
        x = torch.randn(1, 9, 128)
        want = theirs.language_model(inputs_embeds=x).logits
        positions = torch.arange(9) if impl == "vkernels" else torch.arange(9)[None]
        close(model.decoder.lm_head(model.decoder.hidden(x, positions, [9], impl)), want)


@pytest.mark.parametrize("image", [28, 56, 70])
def test_positions_of_another_grid_are_resized(tmp_path, image):
    """Tables of 2 x 2, 4 x 4 and 5 x 5 patches on pictures of 3 x 3, as transformers runs them."""
    theirs, pixels = instructblip(tmp_path, image_size=image), torch.randn(2, 3, 42, 42)
    model = load_instructblip(tmp_path)
    with torch.no_grad():
        want = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        close(model.projector.ln_vision(model.encode(pixels))[0], want)


@pytest.mark.parametrize("impl", ["eager", "vkernels"])
def test_video_llava(tmp_path, impl):
    """From pixels and ids to logits. Its tower is CLIP's, frame by frame, and every token of it is shown."""
    config = VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP}, text_config=LLAMA, video_token_index=258,
        image_token_index=257,
    )  # fmt: skip
    theirs = scrambled(VideoLlavaForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")  # in several files
    ours = preset("tiny_bt_llava")
    ours = replace(ours, encoder=replace(ours.encoder, select_layer=-2), branch=None, connector="mlp2x")
    unused = [r"encoder\.(post_layernorm|visual_projection)"]
    model = VideoLLM.from_pretrained(tmp_path, config=ours, allow_missing=unused)
    pixels, before, after = torch.randn(8, 3, 42, 42), [1, 2, 3], [4, 5]
    with torch.no_grad():
        tower = theirs.model.video_tower(pixels, output_hidden_states=True).hidden_states[-2]
        features = model.encode(pixels, impl)
        close(model.visual(features, impl)[0], theirs.model.multi_modal_projector(tower))
        ids = torch.tensor([before + 8 * 10 * [258] + after])
        expected = theirs(input_ids=ids, pixel_values_videos=pixels[None]).logits[0]
        x, prompt = model.connect(features, 8, before, after, impl)
        positions = torch.arange(prompt.length) if impl == "vkernels" else torch.arange(prompt.length)[None]
        close(model.decoder.lm_head(model.decoder.hidden(x, positions, [prompt.length], impl))[0], expected)


def write(model: torch.nn.Module, folder, kind: str) -> None:
    """A model of transformers' in one file or several, safetensors or .bin."""
    model.save_pretrained(folder, max_shard_size="200KB" if kind == "shards" else "5GB")
    if "bin" in kind:
        state = read(folder)
        (folder / "model.safetensors").unlink()
        count = 3 if kind == "sharded bin" else 1
        files = {f"pytorch_model-{i}-of-{count}.bin": sorted(state)[i::count] for i in range(count)}
        for file, names in files.items():
            torch.save({name: state[name].clone() for name in names}, folder / file)
        if count > 1:
            index = {"weight_map": {name: file for file, names in files.items() for name in names}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin", "sharded bin"])
def test_llama(tmp_path, kind):
    """The decoder alone: a prompt's logits, and eight greedy tokens against a cache."""
    theirs = scrambled(LlamaForCausalLM(LlamaConfig(**LLAMA, max_position_embeddings=256)))
    write(theirs, tmp_path, kind)
    files = [file for file in tmp_path.iterdir() if file.suffix == (".bin" if "bin" in kind else ".safetensors")]
    assert (len(files) > 1) == ("shard" in kind)
    model = VideoLLM.from_pretrained(tmp_path, config="tiny_bt_llava", allow_missing=["^encoder", "^projector"])
    ids = torch.randint(0, 259, (1, 17))
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        said = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)[
            0, 17:
        ].tolist()
        assert len(set(said)) > 3
        x = model.decoder.embed_tokens(ids)
        for impl, positions in (("eager", torch.arange(17)[None]), ("vkernels", torch.arange(17))):
            close(model.decoder.lm_head(model.decoder.hidden(x, positions, [17], impl)), expected)
            session = Session(model, [(x, Prompt(17, 0, 0, 0))], 8, impl)
            token, tokens = session.start().argmax(-1), []
            while len(tokens) < 7:
                tokens.append(int(token))
                token = session.step(token).argmax(-1)
            assert [*tokens, int(token)] == said


def test_a_shard_more_is_refused(tmp_path):
    """Without an index every shard counts, and none may repeat another's tensors."""
    write(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path, "sharded bin")
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    torch.save({"steps": torch.zeros(1)}, tmp_path / "training_args.bin")  # what a trainer leaves there
    again = {"config": "tiny_bt_llava", "allow_missing": ["^encoder", "^projector"]}
    VideoLLM.from_pretrained(tmp_path, **again)
    (tmp_path / "pytorch_model-4.bin").write_bytes((tmp_path / "pytorch_model-0-of-3.bin").read_bytes())
    with pytest.raises(CheckpointError, match=r"pytorch_model-4\.bin must not repeat tensors of other shards"):
        VideoLLM.from_pretrained(tmp_path, **again)


def test_clip_starts_a_branch(tmp_path, caplog):
    theirs = scrambled(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP)))
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "vkernels_video"):
        model = VideoLLM.from_pretrained(
            tmp_path, config="tiny_bt_llava", allow_missing=["btadapter", "balance", "^projector", "^decoder"]
        )
    assert "tensors stay as initialised: decoder." in caplog.text
    model.encoder.copy_trunk_to_branch()
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
        close(model.encoder(pixels[None], "vkernels")[0][0], expected)
    with pytest.raises(CheckpointError, match=r"a CLIP checkpoint must fit the model, got \d+ missing: decoder"):
        VideoLLM.from_pretrained(tmp_path, config="tiny_bt_llava", allow_missing=["btadapter", "balance"])


# --- our own


@pytest.mark.parametrize("name", ["tiny", "tiny_bt_llava", "tiny_st_llm_qa", "tiny_st_llm_conversation"])
def test_round_trip(tmp_path, name):
    model = VideoLLM.from_preset(name, seed=4)
    model.save_pretrained(tmp_path)
    again = VideoLLM.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


# --- bad input


def saved(tmp_path, change=None) -> None:
    model = VideoLLM.from_preset("tiny")
    if change:
        change(model)
    model.save_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"checkpoint: .*model\.safetensors cannot be read"):
        VideoLLM.from_pretrained(tmp_path)
    for content in (b"", b"not a zip"):
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"checkpoint: .*x\.bin cannot be read"):
            read(tmp_path / "x.bin")


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    torch.save({"a": Evil()}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "x.bin")
    assert "must not run" not in capsys.readouterr().out


def test_nothing_is_lost_in_silence(tmp_path):
    saved(tmp_path)
    state = read(tmp_path)
    state["decoder.extra"] = torch.zeros(1)
    del state["decoder.norm.weight"]
    state["decoder.lm_head.weight"] = torch.zeros(3, 128)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        VideoLLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        "checkpoint: a vkernels_video checkpoint must fit the model, got 1 missing: decoder.norm.weight; "
        "1 unexpected: decoder.extra; 1 of another shape: decoder.lm_head.weight (3, 128) for (259, 128)"
    )


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**CLIP, "num_hidden_layers": 6}))
    theirs.save_pretrained(tmp_path)
    everything = ["btadapter", "balance", "^projector", "^decoder"]
    with pytest.raises(CheckpointError, match=r"unexpected: encoder\.layers\.4\."):
        VideoLLM.from_pretrained(tmp_path, config="tiny_bt_llava", allow_missing=everything)


@pytest.mark.parametrize(("name", "value"), [("heads", 8), ("kv_heads", 4), ("eps", 1e-6), ("rope_theta", 500_000.0)])
def test_a_decoder_of_another_make_is_refused(tmp_path, name, value):
    """What no shape shows: config.json of the checkpoint says it."""
    names = {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "eps": "rms_norm_eps"}
    config = VideoLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **CLIP},
        text_config={**LLAMA, names.get(name, name): value},
    )
    VideoLlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    ours = getattr(preset("tiny_bt_llava").decoder, name)
    with pytest.raises(CheckpointError, match=rf"decoder\.{name} must be {value} for .*, got {ours}"):
        VideoLLM.from_pretrained(tmp_path, config="tiny_bt_llava")


def test_a_key_bias_is_not_dropped():
    state = {"vision_model.encoder.layers.0.self_attn.qkv.bias": torch.ones(6), "qformer.x": torch.ones(1)}
    source = recognise(state)
    with pytest.raises(CheckpointError, match=r"qkv\.bias must be zero for the keys, got 1"):
        translate(state, source)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"decoder": {"width": "wide"}}, "DecoderConfig.width must be of type int, got 'wide'"),
        ({"encoder_kind": "os.system"}, "encoder_kind must be one of EncoderConfig, TrunkConfig, got os.system"),
        ({"surprise": 1}, r"VideoLLMConfig must have known fields, got \['surprise'\]"),
        ({"encoder": {"width": 64}}, "EncoderConfig must be complete"),
        ({"decoder": 3}, "DecoderConfig must be a dictionary, got int"),
    ],
)
def test_a_config_from_a_file_is_checked(tmp_path, change, sentence):
    saved(tmp_path)
    file = tmp_path / "vkernels_video.json"
    data = json.loads(file.read_text())
    for name, value in change.items():
        data[name] = data[name] | value if value == {"width": "wide"} else value
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=sentence):
        VideoLLM.from_pretrained(tmp_path)


def test_other_refusals(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold vkernels_video\.json, or config must be given, got neither"):
        VideoLLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"must hold \.safetensors, \.bin or \.pth files, got none"):
        VideoLLM.from_pretrained(tmp_path, config="tiny")
    with pytest.raises(CheckpointError, match="path must be a file or a folder"):
        VideoLLM.from_pretrained(tmp_path / "nowhere", config="tiny")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(CheckpointError, match="must name files beside it"):
        read(tmp_path)
    with pytest.raises(ValueError, match="config: file must hold a config, got list"):
        VideoLLMConfig.from_dict([])
