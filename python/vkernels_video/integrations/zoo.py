"""Tiny models with random weights, one per host architecture, and inputs that reach their video path.

For the tests and for the table of docs/integrations.md. Sizes are the smallest that keep what matters: grouped heads,
several windows, more than one frame, a grid that does not divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 96
VIDEO, IMAGE, VISION_START = 90, 91, 92
TEXT: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CLIP: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@dataclass(frozen=True)
class Sample:
    """A model and keyword arguments of its forward; `generates` says whether `generate` takes them too."""

    model: torch.nn.Module
    inputs: dict[str, Any]
    generates: bool = False


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 80, shape)


def _with_video(tokens: int, token: int, batch: int = 1, lead: tuple[int, ...] = ()) -> torch.Tensor:
    """Text, the placeholders of one video, text."""
    head, tail = _ids(batch, 3), _ids(batch, 4)
    middle = torch.tensor([*lead, *[token] * tokens]).expand(batch, -1)
    return torch.cat([head, middle, tail], 1)


def _left_padded(ids: torch.Tensor, pad: int) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return dict(input_ids=ids, attention_mask=mask)


def llama() -> Sample:
    from transformers import LlamaConfig, LlamaForCausalLM

    return Sample(LlamaForCausalLM(LlamaConfig(**TEXT)), _left_padded(_ids(2, 11), 4), True)


def qwen2() -> Sample:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window: dict[str, Any] = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return Sample(Qwen2ForCausalLM(Qwen2Config(**TEXT, **window)), _left_padded(_ids(2, 11), 4), True)


def qwen3() -> Sample:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Sample(Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=24)), _left_padded(_ids(2, 11), 4), True)


def clip() -> Sample:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return Sample(CLIPVisionModel(CLIPVisionConfig(**CLIP)), dict(pixel_values=torch.randn(3, 3, 24, 24)))


def siglip() -> Sample:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**{**CLIP, "hidden_size": 72})  # heads of 18: no multiple of 8
    return Sample(SiglipVisionModel(config), dict(pixel_values=torch.randn(3, 3, 24, 24)))


def video_llava() -> Sample:
    from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_seq_length=9,
        video_seq_length=8 * 10,
    )
    inputs = dict(input_ids=_with_video(8 * 10, VIDEO), pixel_values_videos=torch.randn(1, 8, 3, 24, 24))
    return Sample(VideoLlavaForConditionalGeneration(config), inputs, True)


def llava_next_video() -> Sample:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**{**CLIP, "image_size": 32}),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
    )
    inputs = dict(input_ids=_with_video(3 * 4, VIDEO), pixel_values_videos=torch.randn(1, 3, 3, 32, 32))
    return Sample(LlavaNextVideoForConditionalGeneration(config), inputs, True)


def llava_onevision() -> Sample:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**CLIP, vision_use_head=False),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[24, 24]],
    )
    inputs = dict(input_ids=_with_video(2 * 4 + 1, VIDEO), pixel_values_videos=torch.randn(1, 2, 3, 24, 24))
    return Sample(LlavaOnevisionForConditionalGeneration(config), inputs, True)


def _grid_inputs(grid: tuple[int, int, int], pixels: int, merged: int) -> dict[str, Any]:
    t, h, w = grid
    ids = _with_video(merged, VIDEO, lead=(VISION_START,))
    kinds = (ids == VIDEO).int() * 2
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=torch.randn(t * h * w, pixels),
        video_grid_thw=torch.tensor([grid]),
        mm_token_type_ids=kinds,
    )


_SPECIAL: dict[str, Any] = dict(
    image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_START + 1
)


def qwen2_vl() -> Sample:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = dict(depth=2, embed_dim=64, num_heads=4, hidden_size=64, patch_size=4, mlp_ratio=1, in_channels=3)
    config = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_SPECIAL)
    return Sample(Qwen2VLForConditionalGeneration(config), _grid_inputs((3, 4, 6), 2 * 3 * 16, 3 * 2 * 3), True)


def qwen2_5_vl() -> Sample:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = dict(
        depth=4,
        hidden_size=80,
        intermediate_size=96,
        num_heads=2,
        out_hidden_size=64,
        patch_size=4,
        window_size=16,
        fullatt_block_indexes=[1],
        in_channels=3,
    )
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **_SPECIAL)
    return Sample(Qwen2_5_VLForConditionalGeneration(config), _grid_inputs((3, 6, 10), 2 * 3 * 16, 3 * 3 * 5), True)


def qwen3_vl() -> Sample:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = dict(
        depth=3,
        hidden_size=72,
        intermediate_size=96,
        num_heads=2,
        out_hidden_size=64,
        patch_size=4,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1],
        in_channels=3,
    )
    text = {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_SPECIAL)
    inputs = _grid_inputs((2, 4, 6), 2 * 3 * 16, 2 * 2 * 3)
    frame = torch.tensor([[VISION_START, *[VIDEO] * 6, VISION_START + 1]])
    ids = torch.cat([_ids(1, 3), frame, _ids(1, 2), frame, _ids(1, 4)], 1)  # a time stamp before each frame
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == VIDEO).int() * 2)
    return Sample(Qwen3VLForConditionalGeneration(config), inputs, True)


def video_llama3() -> Sample:
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    vision = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, patch_size=4)
    config = VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    ids = _with_video(3 * 2 * 3, VIDEO)
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=torch.randn(3 * 4 * 6, 3 * 16),
        video_grid_thw=torch.tensor([[3, 4, 6]]),
        video_merge_sizes=torch.tensor([2]),
        video_compression_mask=torch.ones(3 * 2 * 3, dtype=torch.bool),
    )
    return Sample(VideoLlama3ForConditionalGeneration(config), inputs, True)


def internvl() -> Sample:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    vision = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[32, 32],
        patch_size=[8, 8],
        use_qk_norm=True,
    )
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, image_seq_length=4
    )
    inputs = dict(input_ids=_with_video(3 * 4, IMAGE), pixel_values=torch.randn(3, 3, 32, 32))
    return Sample(InternVLForConditionalGeneration(config), inputs, True)


def smolvlm() -> Sample:
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration

    vision = dict(CLIP, image_size=32, num_channels=3)
    config = SmolVLMConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    inputs = dict(input_ids=_with_video(2 * 4, IMAGE), pixel_values=torch.randn(1, 2, 3, 32, 32))
    return Sample(SmolVLMForConditionalGeneration(config), inputs, True)


def instructblip_video() -> Sample:
    from transformers import (
        InstructBlipVideoConfig,
        InstructBlipVideoForConditionalGeneration,
        InstructBlipVideoQFormerConfig,
        InstructBlipVideoVisionConfig,
        LlamaConfig,
    )

    config = InstructBlipVideoConfig(
        vision_config=InstructBlipVideoVisionConfig(**{**CLIP, "hidden_size": 88, "num_attention_heads": 1}).to_dict(),
        qformer_config=InstructBlipVideoQFormerConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            encoder_hidden_size=88,
            cross_attention_frequency=2,
        ).to_dict(),
        text_config=LlamaConfig(**TEXT).to_dict(),
        num_query_tokens=4,
        video_token_index=VIDEO,
    )
    asked = torch.ones(2, 5, dtype=torch.long)
    asked[1, 3:] = 0
    ids = _with_video(3 * 4, VIDEO, batch=2)
    inputs = dict(
        pixel_values=torch.randn(2, 3, 3, 24, 24),
        qformer_input_ids=_ids(2, 5),
        qformer_attention_mask=asked,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
    )
    return Sample(InstructBlipVideoForConditionalGeneration(config), inputs, True)


VIDEO_ENCODER: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=8
)


def timesformer() -> Sample:
    from transformers import TimesformerConfig, TimesformerModel

    return Sample(
        TimesformerModel(TimesformerConfig(**VIDEO_ENCODER, num_frames=4)),
        dict(pixel_values=torch.randn(2, 4, 3, 24, 24)),
    )


def vivit() -> Sample:
    from transformers import VivitConfig, VivitModel

    sizes = {**VIDEO_ENCODER, "patch_size": None}
    config = VivitConfig(**{k: v for k, v in sizes.items() if v}, num_frames=4, tubelet_size=[2, 8, 8])
    return Sample(VivitModel(config), dict(pixel_values=torch.randn(2, 4, 3, 24, 24)))


def videomae() -> Sample:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(**VIDEO_ENCODER, num_frames=4, tubelet_size=2)
    return Sample(VideoMAEModel(config), dict(pixel_values=torch.randn(2, 4, 3, 24, 24)))


def vjepa2() -> Sample:
    from transformers import VJEPA2Config, VJEPA2Model

    config = VJEPA2Config(
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=1,
        crop_size=24,
        patch_size=8,
        frames_per_clip=4,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        pred_num_mask_tokens=1,
    )
    return Sample(VJEPA2Model(config), dict(pixel_values_videos=torch.randn(2, 4, 3, 24, 24)))


ZOO: dict[str, Callable[[], Sample]] = {
    "LLaMA": llama,
    "Qwen2 (sliding window)": qwen2,
    "Qwen3": qwen3,
    "CLIP vision": clip,
    "SigLIP vision": siglip,
    "Video-LLaVA": video_llava,
    "LLaVA-NeXT-Video": llava_next_video,
    "LLaVA-OneVision": llava_onevision,
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
    "Qwen3-VL": qwen3_vl,
    "VideoLLaMA3": video_llama3,
    "InternVL": internvl,
    "SmolVLM2": smolvlm,
    "InstructBLIP-Video": instructblip_video,
    "TimeSformer": timesformer,
    "ViViT": vivit,
    "VideoMAE": videomae,
    "V-JEPA2": vjepa2,
}


def build(name: str, seed: int = 0) -> Sample:
    """The tiny model of that name, in eval mode, the same every time; parameters large enough that errors show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sample = ZOO[name]()
        with torch.no_grad():
            for parameter in sample.model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.15)
                else:  # biases and norms, no two alike
                    parameter.add_(0.1 * torch.randn_like(parameter))
        sample.model.eval()
        return sample
