"""Prompt in, pages out."""
