"""The start of a run on a large file of problems, against a plain read of the file's bytes."""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltal_jax.bench.loading import plain_read
from deltal_jax.data.prompts import draw_prompts
from deltal_jax.data.tokenizer import train_text_tokenizer
from deltal_jax.errors import UserError
from deltal_jax.tasks.math.task import Math

ROWS = 1_000_000
#: Prompts of the first batch, with which a start ends, and of those after it.
BATCH, MORE = 512, 4096
#: Rows that are written at once.
GROUP = 50_000
FORMATS = ("jsonl", "parquet")
WORDS = "find the least number of points such that every circle has two real and prime sums".split()


def benchmark_data(rounds: int, folder: str | None = None, rows: int = ROWS) -> dict[str, Any]:
    """Every figure of `deltal bench data`; the files are written in `folder`, else where temporary
    files go, and removed at the end.

    `start_s` is from nothing but the imports of the command line to the first batch of prompts, as
    ids, in a process of its own; `peak_bytes` the most memory that process had beside what it had
    before; `plain_read_s` all bytes of the file, one after the other, in the same round. All of
    them come from the page cache, as the file was just written.
    """
    figures: dict[str, Any] = {"load": {"rows": rows, "first batch": BATCH}}
    try:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            held_out = Path(name) / "held_out.jsonl"
            held_out.write_text('{"problem": "1 + 1?", "answer": "2"}\n', encoding="utf-8")
            for kind in FORMATS:
                path = Path(name) / f"train.{kind}"
                write_rows(path, rows)
                found = [_round(path, held_out) for _ in range(rounds)]
                figures[kind] = {"bytes": path.stat().st_size} | {
                    key: statistics.median(figure[key] for figure in found) for key in found[0]
                }
                path.unlink()
    except OSError as error:
        raise UserError(f"--folder: {error}") from error
    return figures


def _round(path: Path, held_out: Path) -> dict[str, float]:
    """One start, and one plain read."""
    code = f"from {__name__} import start; start({str(path)!r}, {str(held_out)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"bench data: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    started = time.perf_counter()
    plain_read([path])
    found["plain_read_s"] = time.perf_counter() - started
    found["start_over_plain_read"] = found["start_s"] / found["plain_read_s"]
    found["peak_over_file"] = found["peak_bytes"] / path.stat().st_size
    return found


def start(path: str, held_out: str) -> None:
    """What a run does with a file before it samples, and its next steps; prints the figures."""
    tokenizer = train_text_tokenizer([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9"], 300)
    before, started, cpu = _memory("VmRSS"), time.perf_counter(), time.process_time()
    task = Math(path, [held_out], verifier="reference", template="plain")
    options: dict[str, Any] = {"seed": 0, "width": 1024}
    first = draw_prompts(task, tokenizer, start=0, count=BATCH, **options)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    clock, busy = time.perf_counter(), time.process_time()
    draw_prompts(task, tokenizer, start=first.next_position, count=MORE, **options)
    rate, busy = MORE / (time.perf_counter() - clock), MORE / (time.process_time() - busy)
    clock = time.perf_counter()
    task.fingerprint()
    figures = {
        "start_s": seconds,
        "start_cpu_s": cpu,
        "prompts_per_s": rate,
        "prompts_per_cpu_s": busy,
        "fingerprint_s": time.perf_counter() - clock,
        "peak_bytes": _memory("VmHWM") - before,
    }
    print(json.dumps(figures))


def write_rows(path: Path, count: int) -> None:
    """Problems of random length in verl's schema."""
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in _rows(0, count))
        return
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("bench data: Parquet needs pyarrow; pip install 'deltal-jax[math]'") from (
            error
        )
    table = pa.Table.from_pylist(list(_rows(0, 1)))
    with parquet.ParquetWriter(path, table.schema) as file:
        for first in range(0, count, GROUP):
            rows = list(_rows(first, min(first + GROUP, count)))
            file.write_table(pa.Table.from_pylist(rows, table.schema))


def _rows(first: int, end: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"data/{first}")
    text = " ".join(rng.choices(WORDS, k=400))
    for number in range(first, end):
        at = rng.randrange(len(text) // 2)
        asked = f"{number}: {text[at : at + rng.randrange(100, 600)]}"
        yield {
            "data_source": "bench",
            "prompt": [{"role": "user", "content": asked}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(number % 997)},
            "extra_info": {"index": number, "split": "train"},
        }


def _memory(name: str) -> int:
    """Bytes by /proc, whose peak is of this process alone; elsewhere the peak that the kernel says,
    into which that of its parent may count."""
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
