"""Pieces every Triton kernel is built from. Kernels live in `vkernels/ops/<op>/triton*.py` and `vkernels/masks`.

Imported only where Triton is installed.

launch.py     runs a kernel on the GPU or in the interpreter, or notes the launch down
tiles.py      the tile tables beside the kernels;  tune.py  measures their candidates
aot.py        compiles noted launches for a chip that is not here, and reads the machine code
turns.py      exact angles;  rotate.py  rows of heads turned by them
head.py       heads of any size in two parts;  single.py  single heads against a tile
matmul.py     products with float32 sums;  softmax.py  the online softmax;  rounding.py  float32 to another dtype
rows.py       where the tokens of a group lie;  sequences.py  those of short sequences;  visible.py  who sees whom
history.py    the tokens of a KV cache;  quantize.py  its quantiser;  codes.py  products with packed codes
parts.py      attention split over programs and joined in one launch
norm.py       LayerNorm and RMSNorm of rows;  scan.py  counting along a row
"""
