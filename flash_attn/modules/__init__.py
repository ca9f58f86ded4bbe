"""Where others look for `flash_attn.modules.mha`; flash_attn/missing.py says what else of theirs is not here."""
