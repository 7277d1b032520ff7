"""Hand-offs of V4-Flash pages from one process to another: `python -m tests.benchmarks.bench_transfer [--devices cuda:0,cuda:1] [--out F]`.

Three things are timed in one run, on the same memory, for each prompt length:

    hand-off      KVSender -> KVReceiver as in service: all pages and the slot, from "the last page is computed" to the commit's arrival
    page-major    one write of the transport: whole pages, all layers of a page in one piece
    layer-major   the same bytes by the same transport in pieces of one layer of one page, as engines keep them that store layer by layer
    copy          the limit: a plain copy of as many bytes (between devices on GPUs, within memory on a CPU)

Without GPUs (`--devices cpu,cpu`) UCX copies between processes through shared memory. Clocks are CLOCK_MONOTONIC, equal in both processes.
After each of the three kinds of write the receiver's bytes are compared with the sender's. The report says which lanes UCX chose. With
`--isolated` the receiver's process sees its own GPU only, as ranks do that Ray starts.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc.aio
import torch
from prometheus_client import CollectorRegistry

from core.clock import SystemClock
from core.kv_layout import PAGE_TOKENS, KVLayout
from core.region import Region
from core.request import Member, Reservation
from engine.cache.layout import build_layout
from engine.config import EngineConfig, ModelConfig
from engine.memory import region_of
from kv_transfer.config import TransferConfig
from kv_transfer.metrics import ReceiverMetrics, SenderMetrics
from kv_transfer.receiver import Committed
from kv_transfer.receiving import KVReceiver
from kv_transfer.sender import Closed, CommitOrder
from kv_transfer.sending import KVSender
from kv_transfer.transport import Write
from kv_transfer.transports import open_transport
from tests.benchmarks.command_line import command, commit
from tests.benchmarks.timeline_parts import visible_gpu

MODEL = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "model_shapes" / "v4_flash"
LAYERS = 43
WARM_UPS = 3

ANSWER_S = 120.0
"""The receiver draws its memory at random and loads CUDA before it first answers."""


def layout_of_flash() -> KVLayout:
    return build_layout(ModelConfig.from_folder(MODEL), EngineConfig(), "v4_flash@dummy")


def regions(memory: torch.Tensor, slots: torch.Tensor) -> tuple[Region, Region]:
    return region_of(memory), region_of(slots)


def by_layer(pages: Region) -> Region:
    """The same bytes in pieces of a layer of a page (the rest of the division is left out)."""
    return dataclasses.replace(pages, num_pieces=pages.num_pieces * LAYERS, piece_bytes=pages.piece_bytes // LAYERS)


def config_of(device: str) -> TransferConfig:
    return TransferConfig(num_threads=4 if device.startswith("cuda") else 0, quarantine_s=20.0).on_loopback()


def allocate(layout: KVLayout, num_pages: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory that other processes can map: not torch's expandable segments, which CUDA IPC does not export."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert "expandable_segments:True" not in os.environ.get(name, ""), f"unset {name}"
    pages = torch.randint(0, 255, (num_pages, layout.page_bytes), dtype=torch.uint8, device=device)
    slots = torch.randint(0, 255, (2, layout.slot_bytes), dtype=torch.uint8, device=device)
    synchronize(device)  # UCX's copies run on streams of their own
    return pages, slots


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def sums(pages: torch.Tensor, count: int, num_bytes: int) -> list[int]:
    """Of the first `num_bytes` of each of the first `count` pages, as 64-bit words, modulo 2^64."""
    found: list[int] = pages[:count, : num_bytes // 8 * 8].contiguous().view(torch.int64).sum(dim=1).tolist()
    return found


def member(role: str, address: str) -> Member:
    return Member(role=role, replica=0, rank=0, address=address, incarnation=11 if role == "prefill" else 22, fingerprint="")


def receive(device: str, is_isolated: bool, num_pages: int, pipe: multiprocessing.connection.Connection) -> None:
    """The decode side: answers with what a sender must know, then with the times at which commits arrived, until told to end."""
    if is_isolated:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpu(device)
        device = "cuda:0"
    layout = layout_of_flash()
    pages, slots = allocate(layout, num_pages, device)
    here = regions(pages, slots)
    raw, agent = open_transport(config_of(device), "raw-receiver", *here)
    arrived: dict[int, float] = {}

    async def serve() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")

        def event(event: Any) -> None:
            if isinstance(event, Committed):
                arrived[event.epoch] = time.monotonic()
                receiver.release(event.epoch)

        receiver = KVReceiver(
            config_of(device), layout, *here, member("decode", f"127.0.0.1:{port}"), SystemClock(), ReceiverMetrics(CollectorRegistry()),
            event, print,
        )  # fmt: skip
        receiver.add_to(server)
        await receiver.start()
        await server.start()
        pipe.send((port, agent, here))
        while True:
            while not pipe.poll():
                raw.poll()
                await asyncio.sleep(0.0005)
            order, *arguments = pipe.recv()
            if order == "expect":
                epoch, num = arguments
                receiver.expect(epoch, f"r{epoch}", tuple(range(num)), 0, num * PAGE_TOKENS)
                pipe.send("expected")
            elif order == "arrived":
                while arguments[0] not in arrived:
                    await asyncio.sleep(0.0002)
                pipe.send(arrived[arguments[0]])
            elif order == "clear":
                pages.zero_()
                synchronize(device)
                pipe.send("cleared")
            elif order == "sums":
                pipe.send(sums(pages, *arguments))
            else:
                break
        await server.stop(0)
        await receiver.close()
        raw.close()

    asyncio.run(serve())


class HandOffs:
    """The prefill side's KVSender, on an event loop of its own."""

    def __init__(self, device: str, layout: KVLayout, here: tuple[Region, Region]) -> None:
        self.closed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        config, metrics = config_of(device), SenderMetrics(CollectorRegistry())

        def event(event: Any) -> None:
            if isinstance(event, Closed):
                assert event.error is None, event.error
                self.closed.set()

        self.sender = KVSender(config, layout, *here, member("prefill", "127.0.0.1:1"), SystemClock(), metrics, event, print)
        asyncio.run_coroutine_threadsafe(self.sender.start(), self._loop).result()

    def run(self, epoch: int, num: int, decode: Member) -> float:
        """Returns the moment at which the last page was final."""
        self.closed.clear()
        request = f"r{epoch}"
        reservation = Reservation(request_id=request, decode=decode, epoch=epoch, page_ids=tuple(range(num)), slot_id=0, lease_s=30)
        self.sender.open(request, reservation)
        time.sleep(0.05)  # in service the prompt is being computed meanwhile, and the session is there
        began = time.monotonic()
        self.sender.push_pages(request, 0, list(range(num)))
        self.sender.commit(request, CommitOrder(local_slot_id=1, num_tokens=num * PAGE_TOKENS, first_token=7))
        return began

    @property
    def links(self) -> str:
        return self.sender.links

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.sender.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def time_writes(
    device: str, own: tuple[Region, Region], theirs: tuple[Region, Region], agent: bytes, pieces: int, repeats: int
) -> tuple[list[float], tuple[str, ...]]:
    """Seconds of one write of the first `pieces` pieces in random order, from the call to its end, ascending; and the lanes it took."""
    transport, _ = open_transport(config_of(device), f"raw-sender-{own[0].piece_bytes}-{pieces}", *own)
    lanes = transport.connect("peer", agent, *theirs)
    times = []
    order = torch.randperm(pieces).tolist()
    for _ in range(repeats + WARM_UPS):
        began = time.monotonic()
        write_id = transport.write("peer", Write(tuple((i, i) for i in order)))
        while not any(done == write_id for done, _ in transport.poll().finished):
            pass
        times.append(time.monotonic() - began)
    transport.close()
    return sorted(times[WARM_UPS:]), lanes


def time_copies(num_bytes: int, devices: list[str], repeats: int) -> list[float]:
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=devices[0])
    target = torch.empty(num_bytes, dtype=torch.uint8, device=devices[1])

    def wait() -> None:
        for device in devices:
            synchronize(device)

    times = []
    for _ in range(repeats + WARM_UPS):
        wait()
        began = time.monotonic()
        target.copy_(source)
        wait()
        times.append(time.monotonic() - began)
    return sorted(times[WARM_UPS:])


def row(tokens: int, what: str, num_bytes: int, times: list[float]) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "tokens": tokens, "what": what, "MB": round(num_bytes / 1e6, 2), "ms": round(median * 1e3, 3),
        "GB/s": round(num_bytes / median / 1e9, 2),
        "spread": round((times[-1] - times[0]) / 2 / median, 3),
    }  # fmt: skip


class Receiver:
    """The process of the decode side, seen from here."""

    def __init__(self, device: str, is_isolated: bool, num_pages: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=receive, args=(device, is_isolated, num_pages, theirs))
        self._process.start()
        port, self.agent, self.regions = self._answer()
        self.member = member("decode", f"127.0.0.1:{port}")

    def ask(self, *order: Any) -> Any:
        self._pipe.send(order)
        return self._answer()

    def _answer(self) -> Any:
        give_up_at = time.monotonic() + ANSWER_S
        while not self._pipe.poll(0.1):
            assert self._process.is_alive(), "the receiver's process died"
            assert time.monotonic() < give_up_at, f"the receiver has said nothing for {ANSWER_S} s"
        return self._pipe.recv()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(("end",))
            self._process.join(30)
        self._process.kill()
        self._process.join()


def measure(devices: list[str], is_isolated: bool, prompts: list[int], repeats: int, show: Callable[[dict[str, Any]], None]) -> None:
    layout = layout_of_flash()
    num_pages = max(prompts) // PAGE_TOKENS
    receiver = Receiver(devices[1], is_isolated, num_pages)
    try:
        pages, slots = allocate(layout, num_pages, devices[0])
        here = regions(pages, slots)
        hand_offs = HandOffs(devices[0], layout, here)
        decode = dataclasses.replace(receiver.member, fingerprint=layout.fingerprint())
        own_layers, their_layers = (by_layer(here[0]), here[1]), (by_layer(receiver.regions[0]), receiver.regions[1])
        epoch = 0
        for tokens in prompts:
            num = tokens // PAGE_TOKENS

            def compare(what: str, num: int = num, num_bytes: int = layout.page_bytes) -> None:
                assert receiver.ask("sums", num, num_bytes) == sums(pages, num, num_bytes), f"{what}: other bytes than were sent"
                receiver.ask("clear")

            receiver.ask("clear")
            times = []
            for _ in range(repeats + WARM_UPS):
                epoch += 1
                receiver.ask("expect", epoch, num)
                began = hand_offs.run(epoch, num, decode)
                times.append(receiver.ask("arrived", epoch) - began)
                assert hand_offs.closed.wait(30), "the hand-off was not closed"
            compare("hand-off")
            show(
                row(tokens, "hand-off", num * layout.page_bytes + layout.slot_bytes, sorted(times[WARM_UPS:])) | {"links": hand_offs.links}
            )
            written, lanes = time_writes(devices[0], here, receiver.regions, receiver.agent, num, repeats)
            compare("page-major write")
            show(row(tokens, "page-major write", num * layout.page_bytes, written) | {"lanes": lanes})
            written, lanes = time_writes(devices[0], own_layers, their_layers, receiver.agent, num * LAYERS, repeats)
            written_bytes = (
                num * LAYERS * own_layers[0].piece_bytes
            )  # a page's last bytes that make no layer travel with the next page's first
            compare("layer-major write", written_bytes // layout.page_bytes)
            show(row(tokens, "layer-major write", written_bytes, written) | {"lanes": lanes})
            show(row(tokens, "copy", num * layout.page_bytes, time_copies(num * layout.page_bytes, devices, repeats)))
        hand_offs.close()
    finally:
        receiver.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time hand-offs of V4-Flash pages between two processes.")
    parser.add_argument("--devices", default="cpu,cpu", help="of the sender and of the receiver")
    parser.add_argument("--prompts", default="8192,131072", help="tokens")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    parser.add_argument("--isolated", action="store_true", help="the receiver's process sees its own GPU only")
    arguments = parser.parse_args()
    devices = arguments.devices.split(",")
    names = [torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu" for device in devices]
    report: dict[str, Any] = {"command": command(), "commit": commit(), "devices": names, "rows": []}

    def show(found: dict[str, Any]) -> None:
        print(found, flush=True)
        report["rows"].append(found)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")

    measure(devices, arguments.isolated, [int(text) for text in arguments.prompts.split(",")], arguments.repeats, show)


if __name__ == "__main__":
    main()
