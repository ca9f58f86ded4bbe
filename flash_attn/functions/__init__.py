"""The functions of Dao-AILab's `flash_attn`, with its names, arguments and defaults."""
