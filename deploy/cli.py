"""The `baton` command. Each subcommand is a function below; what it needs of the machinery is in `deploy/lifecycle.py`."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from core.errors import BatonError, ConfigError, Unavailable
from deploy import lifecycle
from deploy.chat import chat
from deploy.client import ControlClient
from deploy.folder import ClusterFolder, find_cluster, has_keeper
from deploy.local import ROOT
from deploy.logs import print_logs
from deploy.spec import ROLES, ClusterSpec, check_files, load_spec
from deploy.status import render


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed (the reason is on standard error), 2 wrong usage, 130 interrupted."""
    parser = new_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes overrides before an option only: `apply FILE --dry-run KEY=VALUE`
        if not hasattr(options, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.overrides = [*options.overrides, *rest]
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("baton: interrupted", file=sys.stderr)
        return 130
    return 0


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="baton", description="Run DeepSeek-V4-class models with prefill and decode apart.")
    home = ROOT / ".baton" if (ROOT / "pyproject.toml").exists() else pathlib.Path(".baton")
    parser.add_argument(
        "--home", type=pathlib.Path, default=home, metavar="DIR", help="where clusters keep their folders (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(command=command)
        return sub

    def add_with_file(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = add(name, command, help)
        sub.add_argument("file", type=pathlib.Path, help="cluster file (YAML)")
        sub.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="change keys of the file, e.g. prefill.replicas=2")
        return sub

    def add_with_name(name: str, command: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        sub = add(name, command, help)
        sub.add_argument("-n", "--name", help="cluster; may be left out when one is running")
        return sub

    add_with_file("up", run_up, "start a cluster and wait until it is ready")
    add_with_file("apply", run_apply, "bring the running cluster to what the file says").add_argument(
        "--dry-run", action="store_true", help="print the difference and change nothing"
    )
    add_with_file("check", run_check, "check a file and what it names; start nothing")
    scale = add_with_name("scale", run_scale, "change replica counts while serving; scaling down drains")
    scale.add_argument("counts", nargs="+", metavar="ROLE=N", help="e.g. prefill=3 decode=2")
    scale.add_argument("--no-wait", action="store_true", help="return at once")
    status = add_with_name("status", run_status, "show members, their load, and the latest events")
    status.add_argument("-w", "--watch", action="store_true", help="refresh every second until interrupted")
    drain = add_with_name("drain", run_drain, "let a replica finish its requests, then restart it")
    drain.add_argument("member", help='e.g. "prefill/0"')
    logs = add_with_name("logs", run_logs, "print log files of the cluster")
    logs.add_argument("member", nargs="?", help='e.g. "decode/0.0", "controller" or "ray"; all if left out')
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing as they grow")
    logs.add_argument("-l", "--lines", type=_count, default=100, help="last lines of each file (default: %(default)s)")
    add_with_name("down", run_down, "stop the cluster and everything it started")
    talk = add_with_name("chat", run_chat, "talk to the model")
    talk.add_argument("--max-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    talk.add_argument("--thinking", action="store_true", help="let the model think first; thoughts are shown dimmed")
    talk.add_argument("--api-key-file", type=pathlib.Path, help="file whose first line is the API key")
    return parser


def say(line: str) -> None:
    print(f"baton: {line}", flush=True)


def run_up(options: argparse.Namespace) -> None:
    began = time.monotonic()
    say(f"checking {options.file}")
    spec = load_spec(options.file, options.overrides)
    lifecycle.up(ClusterFolder(options.home, spec.name), spec, say)
    say(f"ready in {time.monotonic() - began:.1f} s; try:")
    print(f"\n  {lifecycle.curl_line(spec)}\n", flush=True)
    say_remarks(spec)


def say_remarks(spec: ClusterSpec) -> None:
    decode = spec.decode
    if decode.most_running < decode.max_running:
        say(f"decode.max_running is {decode.max_running}, of which decode.num_slots lets {decode.most_running} be in a step")
    for role in ROLES:
        if not spec.replicas(role):
            say(f"no {role} replica is wanted: requests get 503 until `baton scale {role}=1`")


def run_check(options: argparse.Namespace) -> None:
    spec = load_spec(options.file, options.overrides)
    model = check_files(spec)
    counts = ", ".join(f"{spec.replicas(role)} {role}" for role in ROLES)
    say(f"{options.file} is good: {spec.name} serves {spec.served_name} ({model.num_hidden_layers} layers) with {counts}")
    say_remarks(spec)


def run_apply(options: argparse.Namespace) -> None:
    spec = load_spec(options.file, options.overrides)
    folder = find_cluster(options.home, spec.name)
    with _client(folder) as client:
        changes = client.apply(spec.to_yaml(), dry_run=True)
        for line in changes or ["nothing changes"]:
            say(line)
        if not changes or options.dry_run:
            return
        client.apply(spec.to_yaml())
    lifecycle.wait_until_settled(folder, patience_s(spec), say)
    say("done")


def run_scale(options: argparse.Namespace) -> None:
    folder = find_cluster(options.home, options.name)
    with _client(folder) as client:
        for line in client.apply(replicas=parse_counts(options.counts)) or ["nothing changes"]:
            say(line)
        spec = lifecycle.running_spec(client)
    if not options.no_wait:
        lifecycle.wait_until_settled(folder, patience_s(spec), say)
        say("done")


def run_status(options: argparse.Namespace) -> None:
    while True:
        try:
            with _client(find_cluster(options.home, options.name)) as client:
                page = render(client.status())
        except Unavailable as error:  # a controller that is being restarted answers again in a second or two
            if not options.watch:
                raise
            page = f"baton: {error}"
        if not options.watch:
            print(page)
            return
        print(f"\x1b[2J\x1b[H{page}", flush=True)
        time.sleep(1.0)


def run_drain(options: argparse.Namespace) -> None:
    folder = find_cluster(options.home, options.name)
    with _client(folder) as client:
        for line in client.drain(options.member):
            say(line)
        spec = lifecycle.running_spec(client)
    lifecycle.wait_until_settled(folder, patience_s(spec), say)
    say("done")


def run_logs(options: argparse.Namespace) -> None:
    print_logs(_folder_with_logs(options.home, options.name), options.member, options.lines, options.follow)


def run_down(options: argparse.Namespace) -> None:
    folder = find_cluster(options.home, options.name)
    with folder.locked():
        for remark in lifecycle.stop(folder):
            say(remark)
    say(f"{folder.name} is down; its logs stay in {folder.logs}")


def run_chat(options: argparse.Namespace) -> None:
    with _client(find_cluster(options.home, options.name)) as client:
        spec = lifecycle.running_spec(client)
    key = ""
    if options.api_key_file is not None:
        try:
            key = options.api_key_file.read_text().split("\n")[0].strip()
        except OSError as error:
            raise ConfigError(f"--api-key-file: {options.api_key_file}: {error.strerror}") from error
    chat(lifecycle.base_url(spec), spec.served_name, key, max_tokens=options.max_tokens, is_thinking=options.thinking)


def parse_counts(texts: Sequence[str]) -> dict[str, int]:
    """["prefill=3", "decode=2"] -> {"prefill": 3, "decode": 2}. Raises ConfigError."""
    counts: dict[str, int] = {}
    for text in texts:
        role, equals, number = text.partition("=")
        if role not in ROLES or not equals or not number.isdecimal() or not number.isascii() or len(number) > 6:
            raise ConfigError(f"{text!r}: expected ROLE=N with a role of {', '.join(ROLES)} and a count, e.g. prefill=2")
        if role in counts:
            raise ConfigError(f"{role} is given twice")
        counts[role] = int(number)
    return counts


def _count(text: str) -> int:
    """An argument that is a whole number from 0 on."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _client(folder: ClusterFolder) -> ControlClient:
    state = folder.read()
    if state is None:
        raise ConfigError(f"{folder.name} was taken down meanwhile")
    if not has_keeper(state):
        raise Unavailable(
            f"{folder.name} has ended: its keeper, process {state.keeper_pid}, is gone; `baton up FILE` starts it anew, "
            f"`baton down -n {folder.name}` forgets it; {folder.keeper_log} may say why"
        )
    return ControlClient(state.control_address, folder.read_control_token())


def _folder_with_logs(home: pathlib.Path, name: str | None) -> ClusterFolder:
    """Also of a cluster that is down: its logs stay."""
    kept = sorted(path.parent.name for path in home.glob("*/logs"))
    if name is None and len(kept) == 1:
        return ClusterFolder(home, kept[0])
    return ClusterFolder(home, name) if name in kept else find_cluster(home, name)


def patience_s(spec: ClusterSpec) -> float:
    """Longest time that a change may take: a drain, then a start, of each replica of a role one after the other."""
    one = spec.placement.drain_timeout_s + lifecycle.start_s(spec)
    return one * max(1, *(spec.replicas(role) for role in ROLES))
