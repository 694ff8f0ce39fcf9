"""OPT, GPT-2 and T5 from the files transformers writes: its states to 1e-5, one file or shards, safetensors or .bin;
and what does not fit is refused by name. A TaskModel's own files come back as they went.

Trusted after mutation: 9 planted bugs in writing and reading a TaskModel (loose loading, a kind or a generator that is
lost, unchecked values) turned red.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("scipy")

from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    OPTConfig,
    OPTForCausalLM,
    OPTModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers import T5Config as TheirT5Config
from vkernels_video.model import TaskModel, VideoLLM
from vkernels_video.model.checkpoint import CheckpointError, read
from vkernels_video.model.config import ReasonerConfig, T5Config
from vkernels_video.model.published import reasoner_config
from vkernels_video.model.reasoner import Reasoner, Stream
from vkernels_video.model.t5 import bucket

IMPLS = ("eager", "vkernels")
OPT = OPTConfig(
    vocab_size=40, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4, max_position_embeddings=24,
    dropout=0.0, word_embed_proj_dim=32,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=48)
# head size 12 is not 32 / 4; eight buckets up to a distance of ten put all kinds of buckets into twenty tokens
T5 = {
    "vocab_size": 40, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "dropout_rate": 0.0,
}  # fmt: skip


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert a.shape == b.shape
    assert (a - b).norm() <= tolerance * b.norm()


def scrambled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            near = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            parameter.copy_(near + 0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def t5(gated: bool = False) -> T5ForConditionalGeneration:
    act = "gated-gelu" if gated else "relu"
    return scrambled(
        T5ForConditionalGeneration(TheirT5Config(**T5, feed_forward_proj=act, tie_word_embeddings=not gated))
    )


# --- what transformers writes


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin", "sharded bin"])
@pytest.mark.parametrize(
    ("make", "config"), [(OPTModel, OPT), (OPTForCausalLM, OPT), (GPT2Model, GPT2), (GPT2LMHeadModel, GPT2)]
)
def test_opt_and_gpt2(tmp_path, kind, make, config):
    theirs = scrambled(make(config))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "5GB")
    if "bin" in kind:
        state = read(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        names = sorted(state)
        files = {"pytorch_model.bin": names}
        if kind == "sharded bin":
            half = len(names) // 2
            files = {"pytorch_model-00001-of-2.bin": names[:half], "pytorch_model-00002-of-2.bin": names[half:]}
            index = {"weight_map": {name: file for file, own in files.items() for name in own}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, own in files.items():
            torch.save({name: state[name].clone() for name in own}, tmp_path / file)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "shards")

    ours = Reasoner(reasoner_config(tmp_path))
    assert ours.load(tmp_path) == []
    base = theirs if make in (OPTModel, GPT2Model) else theirs.base_model
    x = torch.randn(2, 11, 32)
    with torch.no_grad():
        expected = base(inputs_embeds=x).last_hidden_state
        for impl in IMPLS:
            close(ours.eval()(x, impl), expected)
    assert torch.equal(ours.embed_tokens.weight, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_t5(tmp_path, causal, gated):
    """transformers' encoder; its decoder with nothing to attend to but itself."""
    theirs = t5(gated)
    theirs.save_pretrained(tmp_path)
    config = reasoner_config(tmp_path, causal=causal)
    assert config == T5Config(
        width=32, heads=4, layers=2, mlp=48, head=12, vocab=40, gated=gated, causal=causal, buckets=8, distance=10
    )
    ours = Reasoner(config)
    assert ours.load(tmp_path) == []
    x = torch.randn(2, 20, 32)
    with torch.no_grad():
        expected = (theirs.decoder if causal else theirs.encoder)(inputs_embeds=x).last_hidden_state
        for impl in IMPLS:
            close(ours(x, impl), expected)


def test_t5s_encoder_alone(tmp_path):
    theirs = scrambled(T5EncoderModel(TheirT5Config(**T5)))
    theirs.save_pretrained(tmp_path)
    ours = Reasoner(reasoner_config(tmp_path, causal=False))
    ours.load(tmp_path)
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        close(ours(x), theirs(inputs_embeds=x).last_hidden_state)
    with pytest.raises(CheckpointError, match="a T5 decoder checkpoint must fit the model, got 18 missing"):
        Reasoner(reasoner_config(tmp_path)).load(tmp_path)


def test_buckets_by_hand():
    """Eight buckets, most distance 16. Looking back only: 0..3 alone, then 4-5, 6-7, 8-11, 12 and more. Both ways: the
    near three alone, then two wider ones each."""
    back = bucket(-torch.arange(20), True, 8, 16).tolist()
    assert back == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, *[7] * 8]
    assert bucket(torch.arange(1, 4), True, 8, 16).tolist() == [0, 0, 0]
    both = bucket(torch.arange(-9, 10), False, 8, 16).tolist()
    assert both[9] == 0
    assert both[8::-1] == [1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert both[10:] == [5, 6, 6, 6, 6, 7, 7, 7, 7]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("virtual", [{}, {"prompt": 3}, {"prefix": 4}])
def test_a_t5_stream_equals_full_recomputation(window, virtual):
    torch.manual_seed(0)
    model = Reasoner(
        T5Config(width=32, heads=4, layers=2, mlp=48, head=12, vocab=40, buckets=8, distance=10, **virtual)
    )
    scrambled(model)
    x = torch.randn(2, 14, 32)
    stream = Stream(model, b=2, window=window)
    states = torch.cat([stream.step(x[:, i : i + 1]) for i in range(14)], dim=1)
    with torch.no_grad():
        close(states, model(x, window=window))


# --- what does not fit


def test_other_reasoners_are_refused(tmp_path):
    folders = {}
    for name, model in (("opt", OPTModel(OPT)), ("gpt2", GPT2Model(GPT2)), ("t5", t5())):
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name])
    opt, gpt2, t5_config = (reasoner_config(folder) for folder in folders.values())
    with pytest.raises(CheckpointError, match=r"reasoner\.heads must be 4 for .*opt, got 8"):
        Reasoner(replace(opt, heads=8)).load(folders["opt"])
    with pytest.raises(CheckpointError, match=r"reasoner\.activation must be gelu_tanh for .*gpt2, got relu"):
        Reasoner(opt).load(folders["gpt2"])
    with pytest.raises(CheckpointError, match=r"the reasoner must be a T5Config for .*t5, got ReasonerConfig"):
        Reasoner(gpt2).load(folders["t5"])
    for name, config, other in (("opt", gpt2, "GPT-2"), ("gpt2", t5_config, "T5"), ("t5", opt, "OPT")):
        file = next(folders[name].glob("*.safetensors"))  # without its config.json
        with pytest.raises(CheckpointError, match=f"this reasoner's weights must be {other}'s, got "):
            Reasoner(config).load(file)
    with pytest.raises(CheckpointError, match=r"embed_positions\.weight \(26, 32\) for \(14, 32\)"):
        Reasoner(replace(opt, context=12)).load(folders["opt"])
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="names must be those of OPT, GPT-2, T5, got"):
        Reasoner(opt).load(tmp_path / "x.bin")


def test_virtual_tokens_stay_and_the_rest_must_come(tmp_path):
    OPTModel(OPT).save_pretrained(tmp_path)
    model = Reasoner(reasoner_config(tmp_path, prompt=2, prefix=3))
    before = model.prompt.clone()
    assert model.load(tmp_path) == ["layers.0.self_attn.prefix", "layers.1.self_attn.prefix", "prompt"]
    assert torch.equal(model.prompt, before)
    state = read(tmp_path)
    del state["layers.1.fc1.bias" if "layers.1.fc1.bias" in state else "decoder.layers.1.fc1.bias"]
    torch.save(state, tmp_path / "cut.bin")
    with pytest.raises(CheckpointError, match=r"got 1 missing: layers\.1\.fc1\.bias"):
        model.load(tmp_path / "cut.bin")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bert"}, "model_type must be one of opt, gpt2, t5, got 'bert'"),
        ({"do_layer_norm_before": False}, "OPT's do_layer_norm_before must be True, got False"),
        ({"activation_function": "silu"}, "activation must be one of relu, got silu"),
        ({"ffn_dim": None}, "must say ffn_dim, got nothing"),
    ],
)
def test_a_config_json_is_checked(tmp_path, change, sentence):
    data = OPT.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    with pytest.raises(CheckpointError, match=sentence):
        reasoner_config(tmp_path)


def test_a_config_json_must_be_readable(tmp_path):
    with pytest.raises(CheckpointError, match=r"must hold config\.json, got none"):
        reasoner_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|must hold a dictionary)"):
            reasoner_config(tmp_path)


# --- a TaskModel's own files

CAPTIONS = {"task": "online_captioning", "generator": ReasonerConfig(width=32, heads=4, layers=1, mlp=48, vocab=40)}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("tiny_videollm_opt", {}), ("tiny_videollm_t5", {}), ("tiny_videollm_opt", CAPTIONS)],
)
def test_a_task_model_comes_back(tmp_path, name, changes):
    model = TaskModel.from_preset(name, seed=7, **changes).eval()
    model.save_pretrained(tmp_path / "new folder")
    again = TaskModel.from_pretrained(tmp_path / "new folder")
    assert again.config == model.config
    assert again.config.name == name
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    more = {"captions": torch.randint(0, 40, (2, 5, 3))} if changes else {}
    units = torch.randn(2, 5, 3, 32)
    for key, output in model(units, **more).items():
        assert torch.equal(again(units, **more)[key], output)
    if not changes:
        file = tmp_path / "new folder" / "model.safetensors"
        assert TaskModel.from_pretrained(file, config=name).config == model.config


def test_other_files_are_no_task_model(tmp_path):
    TaskModel.from_preset("tiny_videollm_opt").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a TaskModel checkpoint must fit the model, got \d+ missing: "):
        TaskModel.from_pretrained(tmp_path, config="tiny_videollm_t5")
    with pytest.raises(CheckpointError, match=r"classify\.weight \(7, 64\) for \(9, 64\)|now\.bias \(7,\) for \(9,\)"):
        TaskModel.from_pretrained(tmp_path, config=replace(TaskModel.from_pretrained(tmp_path).config, classes=9))
    with pytest.raises(CheckpointError, match=r"cannot be used: config: encoder_kind must be one of .*, got None"):
        VideoLLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="names must be those of vkernels_video, ST-LLM, "):
        VideoLLM.from_pretrained(tmp_path, config="tiny")
    VideoLLM.from_preset("tiny").save_pretrained(tmp_path / "video")
    with pytest.raises(CheckpointError, match="reasoner_kind must be one of ReasonerConfig, T5Config, got None"):
        TaskModel.from_pretrained(tmp_path / "video")
    with pytest.raises(CheckpointError, match="a TaskModel checkpoint must fit the model, got "):
        TaskModel.from_pretrained(tmp_path / "video", config="tiny_videollm_opt")
    with pytest.raises(CheckpointError, match=r"must hold vkernels_video\.json, or config must be given, got neither"):
        TaskModel.from_pretrained(tmp_path / "nowhere")


def test_a_damaged_task_model_is_refused(tmp_path):
    TaskModel.from_preset("tiny_videollm_opt").save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "vkernels_video.json"
    good, data = read(tmp_path), json.loads(config.read_text())
    lost = {name: tensor for name, tensor in good.items() if name != "next.bias"}
    save_file(lost | {"then.bias": good["next.bias"]}, weights)
    with pytest.raises(CheckpointError, match=r"got 1 missing: next\.bias; 1 unexpected: then\.bias"):
        TaskModel.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        TaskModel.from_pretrained(tmp_path)
    for change, sentence in (
        ({"classes": "seven"}, "TaskConfig.classes must be of type int, got 'seven'"),
        ({"pool": "median"}, r"TaskConfig.pool must be of type Literal\[.*\], got 'median'"),
        ({"reasoner": data["reasoner"] | {"heads": 5}}, r"reasoner\.heads must divide reasoner\.width, got 5"),
        ({"reasoner": data["reasoner"] | {"activation": "silu"}}, "ReasonerConfig.activation must be of type Literal"),
        ({"reasoner": None}, "ReasonerConfig must be a dictionary, got NoneType"),
        ({"generator": [1]}, "ReasonerConfig must be a dictionary, got list"),
        ({"reasoner_kind": ["T5Config"]}, "reasoner_kind must be one of ReasonerConfig, T5Config, got "),
        ({"surprise": 1}, r"TaskConfig must have known fields, got \['surprise'\]"),
    ):
        config.write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=sentence):
            TaskModel.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"vkernels_video\.json cannot be used"):
        TaskModel.from_pretrained(tmp_path)
