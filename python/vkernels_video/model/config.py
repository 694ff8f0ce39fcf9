"""What a reference video-LLM is made of, as values, and the presets."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

IMPLS = ("eager", "vkernels")
ROPE_SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn")
KV_BITS = {"int8": 8, "int4": 4, "int2": 2}
CONNECTORS = ("linear", "mlp2x", "qformer")
ARRANGEMENTS = ("interleave", "all", "mean", "global_local")


@dataclass(frozen=True)
class EncoderConfig:
    """A CLIP-like ViT whose layers attend over time, then inside each frame (LanguageBind's divided space-time)."""

    width: int
    heads: int
    layers: int
    image: int = 224
    patch: int = 14
    frames: int = 8  # frames of one clip: what the temporal embedding was made for
    eps: float = 1e-5
    select_layer: int = -1  # -2: features are the state before the last block, which is not run

    @property
    def tokens(self) -> int:
        """Tokens per frame: the patches and one CLS."""
        return (self.image // self.patch) ** 2 + 1


@dataclass(frozen=True)
class TrunkConfig:
    """A frozen per-frame image encoder: CLIP ViT-L/14 by default; EVA ViT-g through the fields that differ."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    mlp: int = 4096
    image: int = 224
    patch: int = 14
    projection: int = 768
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    key_bias: bool = True
    patch_bias: bool = False
    projection_bias: bool = False  # of EVA's own head
    pre_norm: bool = True
    select_layer: int = -1  # -2: features are the state before the last block, which is not run

    @property
    def patches(self) -> int:
        """Patches per frame."""
        return (self.image // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens per frame: the patches and one CLS."""
        return self.patches + 1


@dataclass(frozen=True)
class TextTowerConfig:
    """CLIP's text tower, beside ViT-L/14 by default."""

    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp: int = 3072
    vocab: int = 49408
    context: int = 77
    projection: int = 768
    end: int = 49407  # the end mark
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    eps: float = 1e-5
    key_bias: bool = True


@dataclass(frozen=True)
class BranchConfig:
    """BT-Adapter's temporal branch beside the last blocks of a trunk."""

    layers: int = 4
    frames: int = 64  # rows of the time table; longer clips are averaged in pairs
    gated: bool = True  # False: the trunk is added as it is, as the published zero-shot configs do
    gate_factor: float = 1e2
    output_factor: float = 1e4
    drop_path: float = 0.1  # of the last layer; earlier ones less, linearly
    # Drop a video's tokens, residual and all, behind a spatial layer's MLP: what the published EVA branch does.
    drop_whole: bool = False
    spatial_eps: float | None = None  # None: the trunk's
    output: Literal["chat", "frames"] = "chat"  # one pooled frame (LLaVA), or every frame (ST-LLM)
    # compat: halves of a clip of up to `frames` frames attend over time separately, as in the published chat model.
    grouping: Literal["correct", "compat"] = "correct"
    pretraining: bool = False  # with the projection that aligns it with the trunk

    def __post_init__(self):
        _must(self.output in ("chat", "frames"), "branch.output", "be chat or frames", self.output)
        _must(self.grouping in ("correct", "compat"), "branch.grouping", "be correct or compat", self.grouping)


@dataclass(frozen=True)
class QFormerConfig:
    """InstructBLIP's Q-Former; without a text vocabulary it is BLIP-2's."""

    source: int = 1408  # width of the tokens it reads
    width: int = 768
    heads: int = 12
    layers: int = 12
    mlp: int = 3072
    queries: int = 32
    cross_every: int = 2
    vocab: int = 30523  # 0: the queries see no text
    context: int = 512
    eps: float = 1e-12


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-like decoder."""

    width: int
    heads: int
    kv_heads: int
    layers: int
    mlp: int
    vocab: int = 259  # bytes, then begin, end, and the mark of a video token
    context: int = 2304  # positions the weights were made for; longer prompts scale the rotary base
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "ntk", "dynamic", "yarn"] = "ntk"
    rope_factor: float | None = None  # what positions are scaled for; None: length / context, where that is above 1
    frame_attention: Literal["bidirectional", "causal"] = "bidirectional"
    eps: float = 1e-5

    @property
    def head(self) -> int:
        """Head size."""
        return self.width // self.heads


@dataclass(frozen=True)
class ReasonerConfig:
    """A decoder with learned positions: OPT by default; GPT-2 has activation="gelu_tanh" and position_offset=0."""

    width: int
    heads: int
    layers: int
    mlp: int
    vocab: int = 50272
    context: int = 2048
    activation: Literal["relu", "gelu_tanh"] = "relu"
    position_offset: int = 2
    causal: bool = True  # False: every unit sees every other
    prompt: int = 0  # virtual embeddings in front
    prefix: int = 0  # learned keys and values in front, in every layer
    eps: float = 1e-5

    def __post_init__(self):
        _must(self.width % self.heads == 0, "reasoner.heads", "divide reasoner.width", self.heads)


@dataclass(frozen=True)
class T5Config:
    """One stack of T5 as a reasoner: its decoder, without the attention to an encoder; causal=False: its encoder."""

    width: int
    heads: int
    layers: int
    mlp: int
    head: int = 64
    vocab: int = 32128
    gated: bool = False  # T5 v1.1's and Flan's MLP
    causal: bool = True
    buckets: int = 32
    distance: int = 128
    prompt: int = 0
    prefix: int = 0
    eps: float = 1e-6


@dataclass(frozen=True)
class TaskConfig:
    """One of VideoLLM's tasks."""

    task: str
    features: int  # width of a unit's features
    classes: int
    reasoner: ReasonerConfig | T5Config
    steps: int = 1  # anticipated steps, or slots of a retrieval
    pool: Literal["mean", "max"] = "mean"
    generator: ReasonerConfig | None = None  # of captions
    name: str = field(default="custom", compare=False)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes: plain values, for JSON."""
        return asdict(self) | {"reasoner_kind": type(self.reasoner).__name__}

    @classmethod
    def from_dict(cls, data: Any) -> TaskConfig:
        """A config from a file, which may hold anything: fields are checked by name and type."""
        return _from_file(cls, data, "reasoner", (ReasonerConfig, T5Config), {"generator": ReasonerConfig})


@dataclass(frozen=True)
class VideoLLMConfig:
    """Encoder, connector, arrangement of the frames, decoder, cache."""

    encoder: EncoderConfig | TrunkConfig
    decoder: DecoderConfig
    branch: BranchConfig | None = None  # beside a TrunkConfig's encoder
    connector: Literal["linear", "mlp2x", "qformer"] = "mlp2x"
    qformer: QFormerConfig | None = None
    # interleave: clips of the encoder's size that span the video, back in order. global_local: `local_frames` of the
    # frames, each with the mean of all added. mean: one frame, their mean.
    arrange: Literal["interleave", "all", "mean", "global_local"] = "interleave"
    local_frames: int = 16
    mvm: bool = False  # a head for ST-LLM's masked modelling loss
    kv: Literal["none", "int8", "int4", "int2"] = "int4"  # none: the dtype of the weights
    kv_group: int = 64
    kv_residual: int = 128
    template: str = "{video}{question}"  # of a prompt
    begin: bool = True  # a begin mark in front
    tokenizer: Literal["bytes", "checkpoint"] = "bytes"  # a token per byte, or the checkpoint's own tokenizer
    name: str = field(default="custom", compare=False)

    def __post_init__(self):
        encoder, decoder = self.encoder, self.decoder
        _must(encoder.width % encoder.heads == 0, "encoder.heads", "divide encoder.width", encoder.heads)
        _must(encoder.image % encoder.patch == 0, "encoder.patch", "divide encoder.image", encoder.patch)
        _must(decoder.width % decoder.heads == 0, "decoder.heads", "divide decoder.width", decoder.heads)
        _must(decoder.heads % decoder.kv_heads == 0, "decoder.kv_heads", "divide decoder.heads", decoder.kv_heads)
        _must(
            decoder.rope_scaling in ROPE_SCALINGS, "decoder.rope_scaling", f"be one of {', '.join(ROPE_SCALINGS)}",
            decoder.rope_scaling,
        )  # fmt: skip
        factor = decoder.rope_factor
        _must(factor is None or factor >= 1, "decoder.rope_factor", "be None or at least 1", factor)
        _must(self.kv in ("none", *KV_BITS), "kv", f"be one of none, {', '.join(KV_BITS)}", self.kv)
        _must(self.connector in CONNECTORS, "connector", f"be one of {', '.join(CONNECTORS)}", self.connector)
        _must(self.arrange in ARRANGEMENTS, "arrange", f"be one of {', '.join(ARRANGEMENTS)}", self.arrange)
        _must(self.tokenizer in ("bytes", "checkpoint"), "tokenizer", "be bytes or checkpoint", self.tokenizer)
        marks = [self.template.count(mark) for mark in ("{video}", "{question}")]
        _must(marks == [1, 1], "template", "hold {video} and {question} once each", repr(self.template))
        depth = range(-encoder.layers, 0)
        _must(encoder.select_layer in depth, "encoder.select_layer", f"lie in {depth[0]}..-1", encoder.select_layer)
        clips = isinstance(encoder, EncoderConfig)
        _must(clips == (self.arrange == "interleave"), "arrange", "be interleave for an encoder of clips", self.arrange)
        _must(self.branch is None or not clips, "branch", "stand beside a per-frame encoder", type(encoder).__name__)
        _must(
            (self.connector == "qformer") == (self.qformer is not None),
            "qformer",
            "come with its connector",
            self.qformer,
        )
        _must(
            self.qformer is None or self.qformer.source == encoder.width, "qformer.source", "be encoder.width",
            self.qformer and self.qformer.source,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` takes: plain values, for JSON."""
        return asdict(self) | {"encoder_kind": type(self.encoder).__name__}

    @classmethod
    def from_dict(cls, data: Any) -> VideoLLMConfig:
        """A config from a file, which may hold anything: fields are checked by name and type."""
        parts = {"decoder": DecoderConfig, "branch": BranchConfig, "qformer": QFormerConfig}
        return _from_file(cls, data, "encoder", (EncoderConfig, TrunkConfig), parts)

    def with_options(self, **changes: Any) -> VideoLLMConfig:
        """A copy with decoder or top-level fields changed."""
        decoder = {k: changes.pop(k) for k in list(changes) if k in DecoderConfig.__dataclass_fields__}
        return replace(self, decoder=replace(self.decoder, **decoder), **changes)


def _from_file(cls: type, data: Any, main: str, kinds: tuple[type, ...], parts: dict[str, type]) -> Any:
    """A config with configs in it; `main` is of one of `kinds`, which the file names."""
    _must(isinstance(data, dict), "file", "hold a config", type(data).__name__)
    data, named = dict(data), {kind.__name__: kind for kind in kinds}
    kind = str(data.pop(f"{main}_kind", None))
    _must(kind in named, f"{main}_kind", f"be one of {', '.join(named)}", kind)
    needed = {each.name for each in fields(cls) if each.default is MISSING}
    for name, part in ({main: named[kind]} | parts).items():
        if data.get(name) is not None or name in needed:
            data[name] = _from_dict(part, data.get(name))
    return _from_dict(cls, data)


def _from_dict(kind: type, data: Any) -> Any:
    _must(isinstance(data, dict), kind.__name__, "be a dictionary", type(data).__name__)
    known, hints = {f.name: f for f in fields(kind)}, get_type_hints(kind)
    _must(data.keys() <= known.keys(), kind.__name__, "have known fields", sorted(data.keys() - known.keys()))
    for name, value in data.items():
        wanted = known[name].type.split("[")[0].split(" |")[0]
        good = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(wanted)
        optional = value is None and known[name].default is None
        right = good is None or (isinstance(value, good) and (wanted == "bool" or not isinstance(value, bool)))
        if wanted == "Literal":
            right = value in get_args(hints[name])
        _must(optional or right, f"{kind.__name__}.{name}", f"be of type {known[name].type}", repr(value))
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"config: {kind.__name__} must be complete, got {error}") from error


def _must(condition: bool, argument: str, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"config: {argument} must {rule}, got {value}")
