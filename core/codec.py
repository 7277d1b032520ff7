"""core's dataclasses <-> protobuf messages. The only module that touches both."""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable

from core import errors
from core.region import Region
from core.request import FinishReason, Load, Member, Request, Reservation, SamplingParams, TokenLogprobs, Tokens
from protos import common_pb2, transfer_pb2

_FINISH_TO_WIRE = {
    None: common_pb2.FINISH_NONE,
    FinishReason.STOP: common_pb2.FINISH_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_LENGTH,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


def encode_sampling(params: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
        ignore_eos=params.ignore_eos,
        stop_token_ids=params.stop_token_ids,
        num_logprobs=params.num_logprobs,
        num_prompt_logprobs=params.num_prompt_logprobs,
        bias_ids=[token for token, _ in params.logit_bias],
        bias_values=[value for _, value in params.logit_bias],
    )


def decode_sampling(wire: common_pb2.SamplingParams) -> SamplingParams:
    """Raises InvalidRequest if the two lists of the bias do not match."""
    if len(wire.bias_ids) != len(wire.bias_values):
        raise errors.InvalidRequest(f"{len(wire.bias_ids)} bias_ids but {len(wire.bias_values)} bias_values", param="logit_bias")
    return SamplingParams(
        max_tokens=wire.max_tokens,
        temperature=wire.temperature,
        top_p=wire.top_p,
        top_k=wire.top_k,
        min_p=wire.min_p,
        presence_penalty=wire.presence_penalty,
        frequency_penalty=wire.frequency_penalty,
        repetition_penalty=wire.repetition_penalty,
        logit_bias=tuple(zip(wire.bias_ids, wire.bias_values, strict=True)),
        seed=wire.seed,
        ignore_eos=wire.ignore_eos,
        stop_token_ids=tuple(wire.stop_token_ids),
        num_logprobs=wire.num_logprobs if wire.HasField("num_logprobs") else None,
        num_prompt_logprobs=wire.num_prompt_logprobs if wire.HasField("num_prompt_logprobs") else None,
    )


def _pack(token_ids: Iterable[int]) -> bytes:
    words = array.array("I", token_ids)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def _unpack(packed: bytes) -> tuple[int, ...]:
    """Raises InvalidRequest if it ends in the midst of a word."""
    words = array.array("I")
    if len(packed) % words.itemsize:
        raise errors.InvalidRequest(f"token ids of {len(packed)} bytes; they are words of {words.itemsize}", param="prompt")
    words.frombytes(packed)
    if sys.byteorder == "big":
        words.byteswap()
    return tuple(words)


def encode_request(request: Request) -> common_pb2.Request:
    return common_pb2.Request(
        request_id=request.request_id,
        token_ids=_pack(request.token_ids),
        prompt_len=request.prompt_len,
        sampling=encode_sampling(request.sampling),
        deadline_s=request.deadline_s,
    )


def decode_request(wire: common_pb2.Request) -> Request:
    """Raises InvalidRequest."""
    return Request(
        request_id=wire.request_id,
        token_ids=_unpack(wire.token_ids),
        prompt_len=wire.prompt_len,
        sampling=decode_sampling(wire.sampling),
        deadline_s=wire.deadline_s,
    )


def encode_logprobs(logprobs: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    return [common_pb2.TokenLogprobs(logprob=l.logprob, top_ids=l.top_ids, top_logprobs=l.top_logprobs) for l in logprobs]


def decode_logprobs(wire: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(logprob=w.logprob, top_ids=tuple(w.top_ids), top_logprobs=tuple(w.top_logprobs)) for w in wire)


def encode_tokens(tokens: Tokens) -> common_pb2.Tokens:
    return common_pb2.Tokens(
        request_id=tokens.request_id,
        token_ids=tokens.token_ids,
        logprobs=encode_logprobs(tokens.logprobs),
        finish_reason=_FINISH_TO_WIRE[tokens.finish_reason],
    )


def decode_tokens(wire: common_pb2.Tokens) -> Tokens:
    return Tokens(
        request_id=wire.request_id,
        token_ids=tuple(wire.token_ids),
        logprobs=decode_logprobs(wire.logprobs),
        finish_reason=_FINISH_FROM_WIRE[wire.finish_reason],
    )


def encode_member(member: Member) -> common_pb2.Member:
    return common_pb2.Member(
        role=member.role,
        replica=member.replica,
        rank=member.rank,
        address=member.address,
        incarnation=member.incarnation,
        fingerprint=member.fingerprint,
        max_model_len=member.max_model_len,
        state=member.state,
        metrics_address=member.metrics_address,
    )


def decode_member(wire: common_pb2.Member) -> Member:
    return Member(
        role=wire.role,
        replica=wire.replica,
        rank=wire.rank,
        address=wire.address,
        incarnation=wire.incarnation,
        fingerprint=wire.fingerprint,
        max_model_len=wire.max_model_len,
        state=wire.state,
        metrics_address=wire.metrics_address,
    )


def encode_reservation(reservation: Reservation) -> common_pb2.Reservation:
    return common_pb2.Reservation(
        decode=encode_member(reservation.decode),
        epoch=reservation.epoch,
        page_ids=reservation.page_ids,
        slot_id=reservation.slot_id,
        lease_s=reservation.lease_s,
        request_id=reservation.request_id,
        num_kept_pages=reservation.num_kept_pages,
    )


def decode_reservation(wire: common_pb2.Reservation) -> Reservation:
    return Reservation(
        decode=decode_member(wire.decode),
        epoch=wire.epoch,
        page_ids=tuple(wire.page_ids),
        slot_id=wire.slot_id,
        lease_s=wire.lease_s,
        request_id=wire.request_id,
        num_kept_pages=wire.num_kept_pages,
    )


def write_load(load: Load, wire: common_pb2.Load) -> None:
    """Fill in a new message, field by field: every update of a rank carries its load."""
    wire.num_running = load.num_running
    wire.num_waiting = load.num_waiting
    wire.waiting_tokens = load.waiting_tokens
    wire.pages_free = load.pages_free
    wire.pages_total = load.pages_total
    wire.slots_free = load.slots_free
    wire.slots_total = load.slots_total
    wire.transfer_bytes_total = load.transfer_bytes_total
    wire.transfer_seconds_total = load.transfer_seconds_total
    wire.steps_total = load.steps_total
    wire.tokens_total = load.tokens_total


def encode_load(load: Load) -> common_pb2.Load:
    wire = common_pb2.Load()
    write_load(load, wire)
    return wire


def decode_load(wire: common_pb2.Load) -> Load:
    return Load(
        num_running=wire.num_running,
        num_waiting=wire.num_waiting,
        waiting_tokens=wire.waiting_tokens,
        pages_free=wire.pages_free,
        pages_total=wire.pages_total,
        slots_free=wire.slots_free,
        slots_total=wire.slots_total,
        transfer_bytes_total=wire.transfer_bytes_total,
        transfer_seconds_total=wire.transfer_seconds_total,
        steps_total=wire.steps_total,
        tokens_total=wire.tokens_total,
    )


def encode_region(region: Region) -> transfer_pb2.Region:
    return transfer_pb2.Region(
        address=region.address,
        num_pieces=region.num_pieces,
        piece_bytes=region.piece_bytes,
        device_id=region.device_id,
        memory=region.memory,
    )


def decode_region(wire: transfer_pb2.Region) -> Region:
    return Region(
        address=wire.address,
        num_pieces=wire.num_pieces,
        piece_bytes=wire.piece_bytes,
        device_id=wire.device_id,
        memory=wire.memory,
    )


def encode_stages(seconds: dict[str, float]) -> list[common_pb2.Stage]:
    return [common_pb2.Stage(name=name, seconds=value) for name, value in seconds.items()]


def decode_stages(wire: Iterable[common_pb2.Stage]) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in wire}


def encode_error(error: errors.BatonError) -> common_pb2.Error:
    return common_pb2.Error(
        code=error.code,
        message=str(error),
        retry_after_s=error.retry_after_s if isinstance(error, errors.Overloaded) else 0.0,
        param=(error.param or "") if isinstance(error, errors.InvalidRequest) else "",
    )


def decode_error(wire: common_pb2.Error) -> errors.BatonError:
    kind = errors.BY_CODE.get(wire.code, errors.InternalError)
    if issubclass(kind, errors.Overloaded):
        return kind(wire.message, retry_after_s=wire.retry_after_s)
    if issubclass(kind, errors.InvalidRequest):
        return kind(wire.message, param=wire.param or None)
    return kind(wire.message)


def encode_failure(request_id: str, error: errors.BatonError) -> common_pb2.Failure:
    return common_pb2.Failure(request_id=request_id, error=encode_error(error))
