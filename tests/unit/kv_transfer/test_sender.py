from __future__ import annotations

import dataclasses

import pytest

from core.errors import Cancelled, MemberLost, Mismatch, TransferFailed
from core.request import Member, Reservation
from kv_transfer.sender import Closed, CommitOrder, Drop, HandedOff, LastWriteOut, Limits, Post, Renew, Reset, Sender

PEER = "decode/0.0#7/1"
LIMITS = Limits(
    page_bytes=100,
    slot_bytes=40,
    max_bytes_in_flight=1600,
    deadline_s=20.0,
    write_timeout_s=8.0,
    liveness_timeout_s=5.0,
    drain_s=3.0,
)
ORDER = CommitOrder(local_slot_id=2, num_tokens=600, first_token=9)


def reservation(epoch: int = 1, num_pages: int = 3) -> Reservation:
    decode = Member(role="decode", replica=0, rank=0, address="d:1", incarnation=7)
    return Reservation(request_id="r", decode=decode, epoch=epoch, page_ids=tuple(range(50, 50 + num_pages)), slot_id=4, lease_s=15.0)


def opened(sender: Sender, *names: str, num_pages: int = 3, peer: str = PEER) -> None:
    for epoch, name in enumerate(names, 1):
        sender.open(name, peer, reservation(epoch, num_pages), 0.0)
        sender.live(peer, epoch)


def post(sender: Sender, write_id: int, now: float = 0.0) -> Post:
    found = sender.next_post()
    assert found is not None, "nothing to write"
    sender.posted(found, write_id, now)
    return found


def sent(sender: Sender) -> None:
    """A whole hand-off up to the landing of its commit."""
    sender.push("r", 0, [10, 11, 12])
    sender.commit("r", ORDER, 1.0)
    post(sender, 1)
    assert sender.write_finished("r", 1, True, 2.0) == [HandedOff("r", 340, 1.0)]


def test_nothing_is_written_before_the_epoch_is_live() -> None:
    sender = Sender(LIMITS)
    assert sender.open("r", PEER, reservation(), 0.0) == [Renew(PEER, (1,))]
    sender.push("r", 0, [10, 11])
    assert sender.next_post() is None
    sender.live(PEER, 1)
    assert post(sender, 1).pages == ((10, 50), (11, 51))


def test_the_commit_is_posted_when_every_earlier_write_is_out() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10, 11])
    post(sender, 1)
    sender.push("r", 2, [12])
    sender.commit("r", ORDER, 1.0)
    tail = post(sender, 2)
    assert tail.pages == ((12, 52),) and tail.order is None, "the slot waits for pages that are under way"
    sender.write_finished("r", 1, True, 1.5)
    assert sender.next_post() is None
    sender.write_finished("r", 2, True, 1.6)
    last = post(sender, 3)
    assert last.pages == () and last.order == ORDER and last.num_bytes == 40
    assert sender.write_finished("r", 3, True, 2.0) == [HandedOff("r", 340, 1.0)]


def test_pages_and_slot_go_in_one_write_if_nothing_else_is_out() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sent(sender)
    assert sender.released(PEER, 1, 3.0) == [Closed("r", None)]
    assert sender.num_open == 0


def test_only_a_committed_hand_off_can_be_released() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    assert sender.released(PEER, 1, 3.0) == []
    assert sender.num_open == 1


@pytest.mark.parametrize("succeeded", [True, False])
def test_a_release_that_is_faster_than_the_end_of_the_last_write_counts(succeeded: bool) -> None:
    """The receiver has seen the commit, so all of it has landed, whatever the transport makes of the connection afterwards."""
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10, 11, 12])
    sender.commit("r", ORDER, 1.0)
    post(sender, 1)
    assert sender.released(PEER, 1, 1.5) == [HandedOff("r", 340, 0.5)]
    assert sender.released(PEER, 1, 1.6) == []
    assert Closed("r", None) in sender.write_finished("r", 1, succeeded, 2.0)
    assert sender.num_open == 0


def test_requests_take_turns_and_the_bound_holds() -> None:
    sender = Sender(LIMITS)
    opened(sender, "long", "short", num_pages=40)
    sender.push("long", 0, range(40))
    sender.push("short", 0, range(2))
    order = []
    for write_id in range(5):
        found = sender.next_post()
        if found is None:
            break
        sender.posted(found, write_id, 0.0)
        order.append((found.request_id, len(found.pages)))
        assert sender.bytes_in_flight <= LIMITS.max_bytes_in_flight
    assert order == [("long", 4), ("short", 2), ("long", 4), ("long", 4), ("long", 2)]
    assert sender.next_post() is None, "the bound is reached"


def test_one_write_is_always_allowed() -> None:
    sender = Sender(dataclasses.replace(LIMITS, max_bytes_in_flight=1))
    opened(sender, "r")
    sender.push("r", 0, [10, 11])
    assert post(sender, 1).pages == ((10, 50),)
    assert sender.next_post() is None


def test_an_abort_waits_for_what_is_in_flight_and_then_says_so() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10])
    post(sender, 1)
    sender.push("r", 1, [11])
    assert sender.abort("r") == []
    assert sender.next_post() is None, "nothing more is written"
    said, closed = sender.write_finished("r", 1, True, 1.0)
    assert said == LastWriteOut(PEER, 1)
    assert isinstance(closed, Closed) and isinstance(closed.error, Cancelled)


def test_a_revoked_epoch_is_answered_even_if_it_was_never_opened_here() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    assert sender.revoked(PEER, 99) == [LastWriteOut(PEER, 99)]
    said, closed = sender.revoked(PEER, 1)
    assert said == LastWriteOut(PEER, 1)
    assert isinstance(closed, Closed) and isinstance(closed.error, TransferFailed)


def test_a_failed_write_loses_the_peer_and_claims_nothing() -> None:
    """What failed may land later, so neither its epoch nor any other of the link is said to be out."""
    sender = Sender(LIMITS)
    opened(sender, "a", "b")
    sender.push("a", 0, [10])
    sender.push("b", 0, [20])
    post(sender, 1)
    post(sender, 2)
    first = sender.write_finished("a", 1, False, 1.0)
    assert [type(action) for action in first] == [Closed], "b still has a write under way"
    assert sender.revoked(PEER, 2) == []
    assert not sender.is_usable(PEER)
    closed, drop = sender.write_finished("b", 2, True, 1.1)
    assert isinstance(closed, Closed) and isinstance(closed.error, TransferFailed)
    assert isinstance(drop, Drop) and drop.peer == PEER
    assert sender.num_open == 0


def test_a_refused_write_loses_the_peer() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10])
    found = sender.next_post()
    assert found is not None
    closed, drop = sender.write_refused(found, TransferFailed("no"))
    assert isinstance(closed, Closed) and closed.error is not None and str(closed.error) == "no"
    assert drop == Drop(PEER, "no")


def test_a_lost_peer_closes_its_hand_offs_with_its_own_error_and_no_others() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    opened(sender, "other", peer="decode/1.0#8/2")
    error = Mismatch("layouts differ")
    assert sender.peer_lost(PEER, error) == [Closed("r", error), Drop(PEER, "layouts differ")]
    assert sender.peer_lost(PEER, error) == []
    assert sender.num_open == 1 and sender.is_usable("decode/1.0#8/2")


def test_a_peer_that_vouches_for_nothing_is_lost_after_the_liveness_timeout() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.vouched(PEER, 3.0)
    assert sender.fence(8.0) == []
    closed, drop = sender.fence(8.1)
    assert isinstance(closed, Closed) and isinstance(closed.error, MemberLost)
    assert isinstance(drop, Drop)


def test_an_answer_to_an_old_ping_vouches_for_the_time_it_was_sent() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.vouched(PEER, 4.0)
    sender.vouched(PEER, 2.0)
    assert sender.fence(8.9) == []
    assert sender.fence(9.1) != []


def test_writes_of_a_lost_peer_that_do_not_end_reset_the_transport() -> None:
    sender = Sender(LIMITS)
    opened(sender, "stuck")
    sender.open("fine", "decode/1.0#8/2", reservation(5), 7.0)
    sender.push("stuck", 0, [10])
    post(sender, 1)
    assert sender.peer_lost(PEER, MemberLost("cut")) == []
    assert sender.fence(8.0) == [], "it may still end by itself"
    sender.vouched(PEER, 7.9)
    assert sender.fence(8.1) == [Reset()], "answers over a lost link change nothing"
    actions = sender.was_reset()
    assert [action.request_id for action in actions if isinstance(action, Closed)] == ["stuck", "fine"]
    assert {action.peer for action in actions if isinstance(action, Drop)} == {PEER, "decode/1.0#8/2"}
    assert not any(isinstance(action, LastWriteOut) for action in actions)
    assert sender.num_open == 0 and not sender.needs_progress


def test_a_link_that_waits_is_neither_silent_nor_ended_by_a_reset_and_begins_when_it_is_told() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10])
    post(sender, 1)
    sender.peer_lost(PEER, MemberLost("cut"))
    following = "decode/0.0#7/2"
    assert sender.open("s", following, reservation(2), 0.0, waits=True) == [Renew(following, (2,))]
    assert [type(action) for action in sender.fence(8.1)] == [Reset]
    assert [type(action) for action in sender.was_reset()] == [Closed, Drop] and sender.is_usable(following)
    sender.begin(following, 8.1)
    assert sender.fence(13.1) == []
    assert [type(action) for action in sender.fence(13.2)] == [Closed, Drop]


def test_a_process_that_was_stopped_resets_before_it_polls() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10])
    post(sender, 1)
    assert sender.fence(60.0) == [Reset()]


def test_a_write_that_takes_too_long_loses_the_peer() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.push("r", 0, [10])
    post(sender, 1, now=1.0)
    sender.vouched(PEER, 9.0)
    sender.tick(9.0)
    assert sender.is_usable(PEER)
    sender.tick(9.1)
    assert not sender.is_usable(PEER)


def test_a_hand_off_has_a_deadline_from_the_order_to_commit() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    sender.tick(100.0)
    assert sender.num_open == 1, "prefill may take as long as it likes"
    sender.commit("r", ORDER, 100.0)
    said, closed = sender.tick(121.0)
    assert said == LastWriteOut(PEER, 1)
    assert isinstance(closed, Closed) and isinstance(closed.error, TransferFailed) and closed.error.retryable


def test_leases_are_renewed_until_the_commit_has_landed() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    assert sender.tick(4.0) == []
    assert sender.tick(5.1) == [Renew(PEER, (1,))]
    assert sender.tick(9.0) == []
    sent(sender)
    assert sender.tick(30.0) == [], "if the commit got lost, the lease must run out"


def test_pages_that_were_not_reserved_cannot_be_pushed() -> None:
    sender = Sender(LIMITS)
    opened(sender, "r")
    with pytest.raises(AssertionError, match="was not reserved"):
        sender.push("r", 2, [12, 13])


def test_events_of_unknown_hand_offs_change_nothing() -> None:
    sender = Sender(LIMITS)
    sender.push("x", 0, [1])
    sender.commit("x", ORDER, 0.0)
    sender.live(PEER, 1)
    sender.vouched(PEER, 1.0)
    assert sender.abort("x") == [] and sender.released(PEER, 1, 3.0) == [] and sender.write_finished("x", 1, True, 0.0) == []
    assert sender.next_post() is None and sender.num_open == 0


def test_messages_that_come_twice_or_late_change_nothing() -> None:
    sender = Sender(LIMITS)
    sender.open("r", PEER, reservation(), 0.0)
    sender.vouched(PEER, 4.0)
    sender.vouched(PEER, 1.0)  # an older answer does not shorten the time that the newer one gave
    assert sender.fence(8.5) == []
    sender.live(PEER, 1)
    sender.live(PEER, 1)
    assert sender.released(PEER, 1, 1.0) == [], "a release before the commit is of something else"
    sent(sender)
    sender.live(PEER, 1)
    assert sender.next_post() is None, "late news that the epoch is live begins nothing anew"
    assert sender.write_finished("r", 1, True, 3.0) == []
    assert sender.released(PEER, 1, 3.0) == [Closed("r", None)]
    assert sender.released(PEER, 1, 3.0) == []
    assert sender.revoked(PEER, 1) == [LastWriteOut(PEER, 1)] == sender.revoked(PEER, 1), "asked again, it answers again"
    assert sender.num_open == 0
