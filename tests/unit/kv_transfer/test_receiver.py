from __future__ import annotations

import dataclasses

import pytest

from kv_transfer.receiver import (
    Arrived,
    Ask,
    Committed,
    Fence,
    HangUp,
    Live,
    Origin,
    Quiesced,
    Receiver,
    Release,
    Renewed,
    Revoke,
    SenderLost,
)

ME, P = 77, "prefill/0.0#5/1"
ORIGIN = Origin("10.0.0.1:7001", 5, "decode/0.0#77/1", was_reached=True)
COMMIT = Arrived(epoch=1, receiver_incarnation=ME, sender=P, request_id="r", num_tokens=600, num_pages=3, first_token=9)


def receiver(*, is_open: bool = True) -> Receiver:
    made = Receiver(incarnation=ME, quarantine_s=10.0, drain_s=4.0, answer_s=40.0)
    made.expect(1, "r", 3, 600)
    if is_open:
        assert made.renew(P, 1) == [Live(P, 1), Renewed(1)]
    return made


def test_the_first_renew_makes_an_epoch_live_and_later_ones_renew_it() -> None:
    assert receiver().renew(P, 1) == [Renewed(1)]


def test_a_second_sender_is_turned_away() -> None:
    made = receiver()
    assert made.renew("prefill/1.0#6/2", 1) == [Revoke("prefill/1.0#6/2", 1)]
    assert made.commit(COMMIT) == [Committed(1, 9)]


def test_unknown_and_revoked_epochs_are_not_live() -> None:
    made = receiver()
    assert made.renew(P, 99) == [Revoke(P, 99)]
    made.revoke(1, 0.0)
    assert made.renew(P, 1) == [Revoke(P, 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"receiver_incarnation": 78}, "another incarnation"),
        ({"epoch": 2}, "unknown epoch"),
        ({"sender": "prefill/0.0#5/2"}, "opened by"),
        ({"request_id": "s"}, "does not fit"),
        ({"num_pages": 2}, "does not fit"),
        ({"num_tokens": 601}, "does not fit"),
    ],
)
def test_a_commit_that_is_not_the_expected_one_is_void(change: dict[str, int | str], reason: str) -> None:
    made = receiver()
    wrong = dataclasses.replace(COMMIT, **change)  # type: ignore[arg-type]
    void = made.why_void(wrong)
    assert void is not None and reason in void
    assert made.commit(wrong) == []
    assert made.commit(COMMIT) == [Committed(1, 9)], "and harms nothing"


def test_a_commit_counts_once_and_never_before_live() -> None:
    made = receiver(is_open=False)
    assert made.commit(COMMIT) == []
    made.renew(P, 1)
    assert made.commit(COMMIT) == [Committed(1, 9)]
    assert made.commit(COMMIT) == []


def test_a_late_commit_after_revoke_is_void() -> None:
    made = receiver()
    made.revoke(1, 0.0)
    assert made.commit(COMMIT) == []


def test_release_tells_the_sender_and_ends_the_epoch() -> None:
    made = receiver()
    made.commit(COMMIT)
    assert made.release(1) == [Release(P, 1)]
    assert made.num_open == 0 and made.release(1) == []


def test_an_epoch_that_nobody_opened_is_quiet_at_once_and_cannot_be_opened_later() -> None:
    made = receiver(is_open=False)
    assert made.revoke(1, 0.0) == [Quiesced(1)]
    assert made.renew(P, 1) == [Revoke(P, 1)]


def test_an_open_epoch_is_quiet_when_the_sender_says_so() -> None:
    made = receiver()
    assert made.revoke(1, 0.0) == [Revoke(P, 1)]
    assert made.revoke(1, 0.0) == []
    assert made.num_quarantined_pages == 3
    assert made.last_write_out("prefill/1.0#6/2", 1) == [], "only its own sender can say so"
    assert made.last_write_out(P, 1) == [Quiesced(1)]
    assert made.num_open == 0 and made.num_quarantined_pages == 0


def test_a_committed_epoch_is_quiet_at_once() -> None:
    made = receiver()
    made.commit(COMMIT)
    assert made.revoke(1, 0.0) == [Revoke(P, 1), Quiesced(1)], "and not released: its sender may hand it to another rank"
    assert made.last_write_out(P, 1) == []


def test_revoking_what_is_closed_already_is_answered_too() -> None:
    """The worker may revoke an epoch just when its sender gave it up; its pages must not wait for ever."""
    made = receiver()
    lost, quiet = made.last_write_out(P, 1)
    assert isinstance(lost, SenderLost) and quiet == Quiesced(1)
    assert made.revoke(1, 0.0) == [Quiesced(1)]


def test_pages_of_a_lost_sender_stay_in_quarantine() -> None:
    made = receiver()
    made.expect(2, "s", 1, 10)
    lost, asked = made.sender_lost(P, ORIGIN, 100.0)
    assert isinstance(lost, SenderLost) and lost.epoch == 1 and asked == Ask(P, ORIGIN)
    made.answered(P, True, 100.1)
    assert made.commit(COMMIT) == []
    assert made.tick(109.9) == []
    assert made.tick(110.0) == [Quiesced(1)]
    assert made.num_open == 1, "the epoch that nobody opened is not concerned"


def test_a_lost_sender_that_has_not_proven_to_be_over_is_fenced_off_before_its_pages_are_free() -> None:
    made = receiver()
    made.sender_lost(P, ORIGIN, 100.0)
    made.answered(P, False, 101.0)
    assert made.tick(101.4) == []
    assert made.tick(101.5) == [Ask(P, ORIGIN)] and made.tick(101.6) == [], "it is asked again, by one question at a time"
    assert made.tick(110.0) == [Fence(), Quiesced(1)]
    made.answered(P, True, 110.5)
    assert made.tick(200.0) == [] and made.num_open == 0


def test_bytes_may_be_under_way_of_a_sender_that_has_just_ended() -> None:
    """It was stopped, went on where it was, and only then learned that its session was over."""
    made = receiver()
    made.sender_lost(P, ORIGIN, 100.0)
    made.answered(P, True, 109.0)
    assert made.tick(112.9) == []
    assert made.tick(113.0) == [Quiesced(1)]


def test_what_one_sender_says_proves_nothing_of_another() -> None:
    made = receiver()
    made.expect(2, "s", 1, 10)
    made.renew("q", 2)
    made.sender_lost(P, ORIGIN, 100.0)
    made.sender_lost("q", ORIGIN, 100.0)
    made.answered("q", True, 100.1)
    assert made.tick(110.0) == [Fence(), Quiesced(1), Quiesced(2)]


def test_one_fence_serves_all_who_were_connected_before_it() -> None:
    made = receiver()
    for epoch, sender in ((2, "q"), (3, "r")):
        made.expect(epoch, "s", 1, 10)
        made.renew(sender, epoch)
    made.sender_lost(P, ORIGIN, 100.0)
    made.sender_lost("q", ORIGIN, 105.0)
    assert made.tick(110.0) == [Fence(), Quiesced(1)]
    (lost,) = made.sender_lost("r", ORIGIN, 110.1)  # as all sessions end with a fence
    assert isinstance(lost, SenderLost), "and nobody has to be asked"
    assert made.tick(115.0) == [Quiesced(2)]
    assert made.tick(120.1) == [Quiesced(3)]


def test_who_opens_an_epoch_after_a_fence_is_asked_for_as_any_other() -> None:
    made = receiver()
    made.expect(2, "s", 1, 10)
    made.sender_lost(P, ORIGIN, 100.0)
    assert made.tick(110.0) == [Fence(), Quiesced(1)]
    made.renew("q", 2)
    assert made.sender_lost("q", ORIGIN, 111.0)[-1] == Ask("q", ORIGIN)
    assert made.tick(121.0) == [Fence(), Quiesced(2)]


def test_a_sender_lost_after_the_commit_changes_nothing() -> None:
    made = receiver()
    made.commit(COMMIT)
    assert made.sender_lost(P, ORIGIN, 0.0) == []
    assert made.tick(1000.0) == []
    assert made.release(1) == [Release(P, 1)]


def test_a_sender_that_does_not_answer_a_revocation_is_hung_up_on() -> None:
    made = receiver()
    made.revoke(1, 0.0)
    assert made.tick(39.0) == []
    (hang_up,) = made.tick(40.0)
    assert isinstance(hang_up, HangUp) and hang_up.sender == P
    assert made.sender_lost(P, ORIGIN, 40.1) == [Ask(P, ORIGIN)], "the worker gave it up itself"
    assert made.tick(50.1) == [Fence(), Quiesced(1)]


def test_corrupt_pages_end_the_epoch_and_wait_for_the_sender() -> None:
    made = receiver()
    assert made.reject(1, "checksums differ", 0.0) == [SenderLost(1, "checksums differ"), Revoke(P, 1)]
    assert made.last_write_out(P, 1) == [Quiesced(1)]


def test_messages_that_come_twice_or_late_change_nothing() -> None:
    made = receiver()
    assert made.renew(P, 1) == made.renew(P, 1) == [Renewed(1)]
    assert made.commit(COMMIT) == [Committed(1, 9)]
    assert made.commit(COMMIT) == [] == made.last_write_out(P, 1), "what has arrived is not given up by a late message"
    assert made.release(1) == [Release(P, 1)]
    assert made.release(1) == [] == made.commit(COMMIT) == made.last_write_out(P, 1)
    assert made.renew(P, 1) == [Revoke(P, 1)], "an epoch is not opened a second time"
    made.expect(2, "r", 3, 600)
    made.renew(P, 2)
    assert made.revoke(2, 0.0) == [Revoke(P, 2)]
    assert made.revoke(2, 1.0) == []
    assert made.last_write_out(P, 2) == [Quiesced(2)]
    assert made.last_write_out(P, 2) == []
    assert made.num_open == 0
