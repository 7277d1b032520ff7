"""What a model and its longest sequence allow of a request."""

from __future__ import annotations

from core.errors import InvalidRequest
from core.request import MAX_LOGIT_BIAS, Request


def check_fits(request: Request, vocab_size: int, max_model_len: int) -> None:
    """Raise InvalidRequest unless prompt and output fit, and every id is in the vocabulary: one that is not would fail a whole step."""
    sampling = request.sampling
    if not request.token_ids:
        raise InvalidRequest("the prompt is empty; it needs at least one token", param="prompt")
    if not 1 <= request.prompt_len <= len(request.token_ids):
        raise InvalidRequest(f"prompt_len is {request.prompt_len}; it must be in [1, {len(request.token_ids)}]", param="prompt")
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {sampling.max_tokens}; it must be at least 1", param="max_tokens")
    for param, ids in (("prompt", request.token_ids), ("logit_bias", tuple(token for token, _ in sampling.logit_bias))):
        bad = next((token for token in (min(ids, default=0), max(ids, default=0)) if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise InvalidRequest(f"{param}: token id {bad} is out of range; the vocabulary has {vocab_size} ids", param=param)
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(sampling.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed", param="logit_bias")
    if request.max_total_tokens > max_model_len:
        raise InvalidRequest(
            f"prompt of {request.prompt_len} tokens and max_tokens of {sampling.max_tokens} exceed the longest sequence, "
            f"{max_model_len} tokens",
            param="max_tokens",
        )
