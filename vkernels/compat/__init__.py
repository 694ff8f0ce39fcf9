"""Other libraries' names and signatures on these kernels: flash_attn, xformers, torch's sdpa (docs/drop-in.md)."""
