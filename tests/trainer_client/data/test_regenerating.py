"""``draftmq data regenerate`` against a small server with bad manners."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.commands import cli
from tests.trainer_client.data.chats import tokenizer
from trainer_client.data.endpoint import Endpoint, EndpointError
from trainer_client.data.regenerating import Sampling, regenerate
from trainer_client.errors import DataError
from trainer_client.training.data import read_dataset

KEY = "sk-very-secret"


class Server:
    """Answers each prompt with its own words; ``manners`` says what it does before, by number."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.manners: dict[int, str] = {}
        self.most_at_once = self.at_once = 0
        #: after so many answers the others wait until the server ends
        self.patience = 10**9
        self.waiting = threading.Event()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, handler: Any) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.asked)
            self.asked.append(request)
            self.headers.append(handler.headers)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if number >= self.patience:
                self.waiting.set()
                self.ended.wait()
                return
            self._answer(handler, request, self.manners.get(number, ""))
        finally:
            with self.lock:
                self.at_once -= 1

    def _answer(self, handler: Any, request: dict[str, Any], manner: str) -> None:
        if manner == "late":
            self.ended.wait(1.0)
        if manner.isdigit():
            self._send(handler, int(manner), {"error": f"no, not with {KEY}"})
            return
        reason = "length" if manner == "length" else "stop"
        if "prompt" in request:
            choice = {"text": f"after {request['prompt']}", "finish_reason": reason}
        else:
            said = f"to {request['messages'][-1]['content']}"
            message = {"role": "assistant", "content": said, "reasoning_content": "hm"}
            choice = {"message": message, "finish_reason": reason}
        usage = {"completion_tokens": 3}
        self._send(handler, 200, {"choices": [choice], "usage": usage}, cut=manner == "cut")

    def _send(self, handler: Any, code: int, said: Any, cut: bool = False) -> None:
        body = json.dumps(said).encode()
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            handler.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def write(path: Path, count: int) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": "old"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(server: Server, data: Path, output: Path, **options: Any) -> Any:
    patience = {"retries": 4, "timeout_s": 30.0, "first_delay_s": 0.01} | options
    endpoint = Endpoint(server.url, key=KEY, **patience)
    return regenerate([data], output, endpoint, Sampling("target"), concurrency=4)


def test_answers_are_the_targets_through_errors_timeouts_and_cut_replies(
    tmp_path: Path, server: Server
) -> None:
    server.manners = {0: "500", 1: "503", 2: "429", 3: "cut", 4: "late", 9: "502"}
    data, output = write(tmp_path / "a.jsonl", 20), tmp_path / "own.jsonl"
    found = run(server, data, output, timeout_s=0.4)
    assert (found.written, found.left_out, found.completion_tokens) == (20, Counter(), 60)
    answers = {row["id"]: row["messages"][-1] for row in lines(output)}
    assert answers == {
        f"{data}:{n + 1}": {
            "role": "assistant",
            "content": f"to q{n}",
            "reasoning_content": "hm",
        }
        for n in range(20)
    }
    assert len(server.asked) == 26
    assert 1 < server.most_at_once <= 5  # four, and one that nobody waits for any more
    assert len(read_dataset(output, tokenizer("thinking"), 4096).samples) == 20


def test_turns_are_asked_for_with_the_answers_before(tmp_path: Path, server: Server) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "old"},
                {"role": "user", "content": "two"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "three"},
                {"role": "assistant", "content": "old too"},
                {"role": "user", "content": "thanks"},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {"prompt": "once", "completion": "old"},
        {"prompt": [{"role": "user", "content": "only a question"}]},
        {"text": "no prompt"},
    ]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    endpoint = Endpoint(server.url)
    found = regenerate([data], tmp_path / "o", endpoint, Sampling("t", seed=3), concurrency=1)
    assert found.left_out == {"no prompt": 1}
    chat, plain, question = lines(tmp_path / "o")
    assert [m["content"] for m in chat["messages"]] == [
        *("one", "to one", "two", "", "three", "to three", "thanks", "to thanks")
    ]
    assert chat["messages"][3]["weight"] == 0
    assert chat["tools"] == rows[0]["tools"]
    assert (plain["prompt"], plain["completion"]) == ("once", "after once")
    assert question["messages"][-1]["content"] == "to only a question"
    first, second = server.asked[:2]
    assert first["seed"] == 3
    assert "temperature" not in first
    assert second["messages"][1] == {"role": "assistant", "content": "to one"}
    sent = second["messages"][3]["tool_calls"][0]["function"]
    assert sent == {"name": "f", "arguments": '{"a": 1}'}


def test_an_answer_that_was_cut_is_none(tmp_path: Path, server: Server) -> None:
    server.manners = {1: "length", 2: "400"}
    data = write(tmp_path / "a.jsonl", 4)
    endpoint = Endpoint(server.url)
    found = regenerate([data], tmp_path / "o", endpoint, Sampling("t"), concurrency=1)
    assert (found.written, dict(found.left_out)) == (
        2,
        {"an answer that ended by length": 1, "HTTP 400": 1},
    )


def test_an_endpoint_that_refuses_or_never_answers_ends_it(tmp_path: Path, server: Server) -> None:
    data = write(tmp_path / "a.jsonl", 3)
    server.manners = {0: "401"}
    with pytest.raises(EndpointError, match=r"refuses: HTTP 401") as raised:
        run(server, data, tmp_path / "o")
    assert KEY not in str(raised.value)
    server.manners = dict.fromkeys(range(100), "500")
    with pytest.raises(EndpointError, match=r"no answer in 3 tries \(last: HTTP 500") as raised:
        run(server, data, tmp_path / "p", retries=2)
    assert KEY not in str(raised.value)
    for url in ("ftp://x", "host:80", f"http://user:{KEY}@host/v1"):
        with pytest.raises(EndpointError) as raised:
            Endpoint(url)
        assert KEY not in str(raised.value)


def test_a_run_that_was_killed_goes_on(tmp_path: Path, server: Server) -> None:
    data, output = write(tmp_path / "a.jsonl", 30), tmp_path / "own.jsonl"
    server.patience = 12
    options = [f"--endpoint={server.url}", "--model=target", f"--output={output}"]
    program = "from broker.commands import main; main()"
    command = [sys.executable, "-c", program, "data", "regenerate", str(data), *options]
    child = subprocess.Popen(
        [*command, "--concurrency=4"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "OPENAI_API_KEY": KEY},
    )
    while not server.waiting.wait(0.1) or len(output.read_bytes().splitlines()) < 12:
        assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    with output.open("a") as file:
        file.write('{"id": "half a li')
    server.patience = 10**9
    with pytest.raises(DataError, match="was begun with other model"):
        regenerate([data], output, Endpoint(server.url), Sampling("other"), concurrency=1)
    found = run(server, data, output)
    assert (found.before, found.written) == (12, 18)
    assert {row["id"] for row in lines(output)} == {f"{data}:{n + 1}" for n in range(30)}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    beside = (tmp_path / "own.jsonl.params.json").read_text()
    assert json.loads(beside)["model"] == "target"
    assert KEY not in beside + output.read_text()


def command(server: Server, data: Path, output: Path, *more: str) -> Result:
    where = ["--endpoint", server.url, "--model", "target", "--output", str(output)]
    return CliRunner().invoke(cli, ["data", "regenerate", str(data), *where, *more])


def test_the_command_says_what_came_of_it(tmp_path: Path, server: Server) -> None:
    data = write(tmp_path / "a.jsonl", 3)
    shown = command(server, data, tmp_path / "o", "--json", "--extra", '{"top_k": 5}')
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["written"] == 3
    assert server.asked[0]["top_k"] == 5
    again = json.loads(
        command(server, data, tmp_path / "o", "--json", "--extra", '{"top_k": 5}').stdout
    )
    assert (again["written"], again["written_before"], len(server.asked)) == (0, 3, 3)
    assert command(server, data, tmp_path / "p", "--extra", "[]").exit_code == 2
