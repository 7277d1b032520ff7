"""A small DeepSeek-V4 that anyone may redistribute: generated text, tokenizer, trainer, export. The result is in checkpoint/."""
