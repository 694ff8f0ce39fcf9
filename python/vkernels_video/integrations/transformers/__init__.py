"""One line for a transformers (>= 5) model: `from vkernels_video.integrations import transformers as vkt`.

`vkt.apply(model)` makes one model use vkernels and reports what it replaced, what it left and why; `vkt.restore(model)`
puts it back. docs/integrations.md lists the models this was run on.
"""

from vkernels_video.integrations.transformers.apply import accelerated, apply, restore
from vkernels_video.integrations.transformers.attention import register
from vkernels_video.integrations.transformers.host import MissingSeam
from vkernels_video.integrations.transformers.report import Mismatch, Report, Verification
from vkernels_video.integrations.transformers.vision import vision_kwargs

__all__ = [
    "Mismatch",
    "MissingSeam",
    "Report",
    "Verification",
    "accelerated",
    "apply",
    "register",
    "restore",
    "vision_kwargs",
]
