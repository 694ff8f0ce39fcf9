"""Pieces every Triton kernel is built from. Kernels live in `vkernels/ops/<op>/triton.py`.

Imported only where Triton is installed.

launch.py   runs a kernel on the GPU or in the interpreter, or notes the launch down
tiles.py    the tile tables beside the kernels
aot.py      compiles noted launches for a chip that is not here, and reads the machine code
turns.py    exact angles;  rotate.py  rows of heads turned by them
single.py   one head that meets a whole tile
sequences.py  where the tokens of many short sequences lie
"""
