"""One DeepSeek-V4 model on one group of devices: ops, model, caches, schedulers, runner. Speaks token ids, never text.

Runs alone: `python -m engine generate` and `python -m engine score` need nothing else started.
"""
