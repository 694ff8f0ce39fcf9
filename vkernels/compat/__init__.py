"""Other libraries' names and signatures on these kernels: `flash_attn`, `xformers` (docs/drop-in.md)."""
