"""transformers before 5, and code that carries such modeling files: `from vkernels_video.integrations import eras`.

`eras.apply(model)` finds the attention of those years by the form of its forward, not by a version number: LLaMA with
tuples of keys and values (4.28 to 4.35), with Cache objects (4.36, 4.37, 4.41 to 4.47), with a dictionary of attention
functions (4.48 to 4.52); CLIP; the EVA ViT and the Q-Former of BLIP-2. Which files were run: docs/integrations.md.
"""

from vkernels_video.integrations.eras.apply import accelerated, apply
from vkernels_video.integrations.eras.masks import causal
from vkernels_video.integrations.transformers.fitting import restore
from vkernels_video.integrations.transformers.host import MissingSeam
from vkernels_video.integrations.transformers.report import Mismatch, Report, Verification

__all__ = ["Mismatch", "MissingSeam", "Report", "Verification", "accelerated", "apply", "causal", "restore"]
