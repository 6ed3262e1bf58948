"""A process that holds one runtime and times it when asked: its memory and its load are that runtime's alone.

Requests are lines of JSON on standard input, `{"call": name, ...}`; each is answered by a line of JSON on standard
output, `{"result": ...}` or `{"error": ...}`.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from thrifty.errors import ThriftyError

#: What starts a worker of this package.
COMMAND = (sys.executable, "-m", "thrifty.runtime.worker")


class Worker:
    """A process that answers requests one at a time: `worker("decode", context=64)`."""

    def __init__(
        self, name: str, command: Sequence[str] = COMMAND, environment: Mapping[str, str] | None = None
    ) -> None:
        self._name = name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, call: str, **arguments: Any) -> Any:
        """The result of a request. Raises ThriftyError with the worker's sentence, or where it has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise ThriftyError(f"[worker] {self._name} has been closed")
        try:
            stdin.write(json.dumps({"call": call, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            last = " ".join(self._said.read().split())[-300:]
            raise ThriftyError(
                f"[worker] {self._name} ended with status {status} in {call}; it said: {last or 'nothing'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise ThriftyError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()


class Session:
    """What can be asked: the public methods."""

    def __init__(self) -> None:
        self._anonymous = 0

    def load(self, path: str, **options: Any) -> dict[str, Any]:
        """Load a folder; options are those of `thrifty.runtime.load`. Returns seconds and sizes."""
        from thrifty.runtime import load
        from thrifty.runtime.measure import Timer, linear_operations

        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,))
        watch.start()
        try:
            start = time.perf_counter()
            self._runtime = load(path, **options)
            seconds = time.perf_counter() - start
        finally:
            done.set()
            watch.join()
        self._timer = Timer(self._runtime)
        return {
            "load_seconds": seconds,
            "weight_format": getattr(self._runtime._decoder, "weight_format", "int8"),
            "weight_bytes": self._runtime.bytes_per_token,
            "cache_bytes_per_position": self._timer.cache_bytes,
            "operations_per_token": linear_operations(self._runtime.config),
        }

    def decode(self, context: int, batch: int = 1, seconds: float = 0.3) -> dict[str, Any]:
        """Seconds of steps that end at `context`, and bytes that one reads."""
        times, nbytes = self._timer.decode(context, batch, seconds)
        return {"seconds": times, "bytes": nbytes}

    def overhead(self, context: int) -> float:
        """Share of a step that is in none of its native ops."""
        return self._timer.overhead(context)

    def prefill(self, prompt: int) -> float:
        """Seconds to read a prompt."""
        return self._timer.prefill(prompt)

    def logits(self, tokens: list[int]) -> list[float]:
        """Logits after the last of some tokens."""
        return self._runtime.logits(tokens)[-1].tolist()

    def generate(self, tokens: list[int], count: int) -> list[int]:
        """Greedy tokens after some."""
        return self._runtime.generate_tokens(tokens, max_new_tokens=count, temperature=0, ignore_eos=True)

    def memory(self) -> dict[str, int] | None:
        """Most bytes that the process has held: all of them, and those that are no file's."""
        from thrifty.runtime.measure import memory

        now = memory()
        if now is None:
            return None
        self._anonymous = max(self._anonymous, now["anonymous"])
        return {"peak": now["peak"], "anonymous": self._anonymous}

    def _watch(self, done: threading.Event) -> None:
        # The kernel keeps the peak of all memory, but not that of the anonymous part.
        while self.memory() and not done.wait(0.005):
            pass


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    # What a library prints is no answer.
    os.dup2(2, 1)
    session = Session()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(session, request.pop("call"))(**request)}
        except ThriftyError as problem:
            answer = {"error": str(problem)}
        except MemoryError as problem:
            answer = {"error": f"[worker] the memory does not suffice: {problem}"}
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    main()
