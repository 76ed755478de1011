"""How fast is an exact scan of an index in few bits, beside the memory's speed and FAISS?

    python benchmarks/scan.py                        # two tables, printed
    python benchmarks/scan.py --write                # results/scan.json
    python benchmarks/scan.py --only memory          # only the index that is larger than memory

Speed: products with 1, 16 and 64 queries and the top 20 of each, on one thread, over random codes
of K = 16 384 coordinates (4 kB with 2 bits, 16 kB with 8) that fill half a gigabyte to one. FAISS
Flat (float32) and SQ8 (8 bits) hold rows of the same K; they are `not installed` where faiss-cpu is
not. All take turns; medians of CPU seconds, which other work on the machine disturbs less than wall
time. The read bandwidth is that of a float32 matrix-vector product, or of a sum if that is faster.

Memory: an index of three times a cgroup's memory limit, in memory-mapped shards, is scanned beside
one sequential read of its files, with a cold cache each time (posix_fadvise). The fastest of each
are compared, since other work only makes them slower. Wants a cgroup that this process may make
(root).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from contest import aligned, process_environment  # noqa: E402
from environment import environment  # noqa: E402
from measure import peak_memory_bytes, version  # noqa: E402

from upweight.index import scan  # noqa: E402
from upweight.index.codes import Codes  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "scan.json"
FOLDER = ROOT / "benchmarks" / ".cache" / "scan"
TOP, SIZE = 20, 2**29
QUERIES = (1, 16, 64)


def shard(K: int, bits: int, size: int = SIZE) -> dict[str, torch.Tensor]:
    """Random codes: a scan reads and multiplies them as it does any."""
    width = K * bits // 8
    n = size // width
    codes = torch.randint(0, 2**62, (n, width // 8), dtype=torch.int64).view(torch.uint8)
    return {"codes": codes, "scales": torch.rand(n) / K}


def ours(K: int, bits: int) -> Callable[[torch.Tensor], Any]:
    kept, codes = shard(K, bits), Codes(bits)

    def run(queries: torch.Tensor, n: int) -> None:
        some = {key: each[:n] for key, each in kept.items()}
        scan.Scan(queries, codes).products(some).topk(TOP, dim=1)

    return run


def without_kernel(K: int, bits: int) -> Callable[[torch.Tensor], Any]:
    """The path that is taken where Numba is not installed."""
    run = ours(K, bits)

    def other(queries: torch.Tensor, n: int) -> None:
        kernel, scan.dot = scan.dot, lambda bits: None
        try:
            run(queries, n)
        finally:
            scan.dot = kernel

    return other


def flat(K: int) -> Callable[[torch.Tensor], Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    indices = {}
    rows = torch.randn(2 * SIZE // (4 * K), K).numpy()

    def run(queries: torch.Tensor, n: int) -> None:
        if n not in indices:
            indices[n] = faiss.IndexFlatIP(K)
            indices[n].add(rows[:n])
        indices[n].search(queries.numpy(), TOP)

    return run


def sq8(K: int) -> Callable[[torch.Tensor], Any]:
    import faiss

    faiss.omp_set_num_threads(1)
    indices = {}

    def run(queries: torch.Tensor, n: int) -> None:
        if n not in indices:
            kind = faiss.ScalarQuantizer.QT_8bit
            made = faiss.IndexScalarQuantizer(K, kind, faiss.METRIC_INNER_PRODUCT)
            some = torch.randn(256, K).numpy()
            made.train(some)
            for _ in range(n // 256):
                made.add(some)
            indices[n] = made
        indices[n].search(queries.numpy(), TOP)

    return run


def reading() -> Callable[[], float]:
    rows = torch.ones(2 * SIZE // (4 * 4096), 4096)
    q = torch.ones(4096)

    def run() -> float:
        best = 0.0
        for each in (lambda: rows @ q, rows.sum):
            start = time.thread_time()
            each()
            best = max(best, rows.nbytes / (time.thread_time() - start))
        return best

    return run


def speed(K: int, rounds: int) -> dict[str, Any]:
    """Rows and bytes of the index in a second."""
    # How many rows with 1 query, and with 16 and 64: enough for half a second or so.
    contenders: dict[str, tuple[Any, float, int, int]] = {
        "upweight 2 bits": (lambda: ours(K, 2), K / 4, SIZE // (K // 4), SIZE // K),
        "upweight 2 bits, no Numba": (
            lambda: without_kernel(K, 2), K / 4, SIZE // K, SIZE // K,
        ),
        "upweight 8 bits": (lambda: ours(K, 8), K, SIZE // K, SIZE // K),
        "upweight 8 bits, no Numba": (lambda: without_kernel(K, 8), K, SIZE // K, SIZE // K),
        "FAISS Flat": (lambda: flat(K), 4 * K, 2 * SIZE // (4 * K), 2 * SIZE // (4 * K)),
        "FAISS SQ8": (lambda: sq8(K), K, SIZE // K, 2048),
    }  # fmt: skip
    runs, status = {}, {}
    for name, (make, *_) in contenders.items():
        try:
            runs[name] = make()
        except ImportError:
            status[name] = "not installed"
    read = reading()
    read()
    rows = []
    for q in QUERIES:
        queries = torch.randn(q, K)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        bandwidth = []
        for turn in range(rounds + 1):
            bandwidth.append(read())
            for name, run in runs.items():
                n = contenders[name][2 if q == 1 else 3]
                start, wall = time.thread_time(), time.perf_counter()
                run(queries, n)
                if turn:  # the first compiles and fills
                    seconds[name].append((time.thread_time() - start, time.perf_counter() - wall))
        whole = statistics.median(bandwidth[1:])
        for name, each in seconds.items():
            n, width = contenders[name][2 if q == 1 else 3], contenders[name][1]
            took = statistics.median(cpu for cpu, _ in each)
            rows.append(
                {
                    "contender": name, "queries": q, "rows": n, "bytes_per_row": width,
                    "cpu_seconds": [cpu for cpu, _ in each], "seconds": [s for _, s in each],
                    "rows_per_second": n / took, "gb_per_second": n * width / took / 1e9,
                    "share_of_read_bandwidth": n * width / took / whole,
                    "read_gb_per_second": whole / 1e9,
                }
            )  # fmt: skip
            print(f"{q:3} {name:28} {rows[-1]['rows_per_second']:.3g}", file=sys.stderr, flush=True)
    return {"K": K, "top": TOP, "rounds": rounds, "status": status, "runs": rows}


def goals(runs: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers that the study asks for."""
    rate = {(r["contender"], r["queries"]): r["rows_per_second"] for r in runs}
    share = {(r["contender"], r["queries"]): r["share_of_read_bandwidth"] for r in runs}
    found = {}
    for bits in ("2 bits", "8 bits"):
        name = f"upweight {bits}"
        found[f"{bits}, 1 query, share of the read bandwidth"] = share[name, 1]
        for q in QUERIES:
            for peer in ("FAISS SQ8", "FAISS Flat"):
                if (peer, q) in rate:
                    found[f"{bits}, {q} queries, times {peer}"] = rate[name, q] / rate[peer, q]
    return found


# -- larger than memory -------------------------------------------------------------------------


def larger_than_memory(limit: int, K: int, rounds: int) -> dict[str, Any]:
    """An index of three times a memory limit: seconds of a scan beside those of a read."""
    from safetensors.torch import save_file

    FOLDER.mkdir(parents=True, exist_ok=True)
    group = cgroup(limit)
    if group is None:
        return {"status": "no cgroup may be made here"}
    files, size = [], 2**26
    try:
        for i in range(3 * limit // size):
            files.append(FOLDER / f"rows-{i:03}.safetensors")
            save_file(shard(K, 2, size), files[-1])
        os.sync()
        command = [sys.executable, __file__, "--inside", str(group), "--K", str(K)]
        done = subprocess.run(
            [*command, "--rounds", str(2 * rounds)], env=process_environment(1), check=True,
            capture_output=True, text=True,
        )  # fmt: skip
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    finally:
        for file in files:
            file.unlink(missing_ok=True)
        group.rmdir()
    told["peak_over_limit"] = told["peak_bytes"] / limit
    ratios = [b / a for a, b in zip(told["read_seconds"], told["scan_seconds"], strict=True)]
    return {
        "limit": limit, "index_bytes": 3 * limit, "shard_bytes": size,
        "scan_over_read_of_the_fastest": min(told["scan_seconds"]) / min(told["read_seconds"]),
        "scan_over_read_median": statistics.median(ratios), **told,
    }  # fmt: skip


def cgroup(limit: int) -> Path | None:
    """A new cgroup with a memory limit, of either version."""
    for folder, name in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(folder) / f"upweight-scan-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(limit))
            return group
        except OSError:
            group.rmdir()
    return None


def inside(group: Path, K: int, rounds: int) -> None:
    """In a process of the group: read all files, and scan them, in turn, from the disk."""
    from safetensors import safe_open

    (group / "cgroup.procs").write_text(str(os.getpid()))
    files = sorted(FOLDER.glob("rows-*.safetensors"))
    codes, query = Codes(2), torch.randn(1, K)
    scan.Scan(query, codes).products(shard(K, 2, 2**20))  # compiled before the clock starts

    def cold() -> None:
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read() -> None:
        space = bytearray(2**22)
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(space):
                    pass

    def scanned() -> None:
        for path in files:
            with safe_open(path, framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in file.keys()}
            scan.Scan(query, codes).products(kept).topk(TOP, dim=1)

    seconds: dict[str, list[float]] = {"read_seconds": [], "scan_seconds": []}
    for _ in range(rounds):
        for name, run in (("read_seconds", read), ("scan_seconds", scanned)):
            cold()
            time.sleep(0.2)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(json.dumps({**seconds, "peak_bytes": peak_memory_bytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--K", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=2**29, help="memory of the larger index")
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.inside:
        inside(asked.inside, asked.K, asked.rounds)
        return
    torch.manual_seed(0)
    libraries = ("torch", "numba", "faiss-cpu")
    found = {"environment": environment(), "versions": {x: version(x) for x in libraries}}
    if asked.only != "memory":
        found["speed"] = speed(asked.K, asked.rounds)
        found["goals"] = goals(found["speed"]["runs"])
        lines = [["", "queries", "rows/s", "GB/s", "of read"]]
        for r in found["speed"]["runs"]:
            numbers = (f"{r['rows_per_second']:,.0f}", f"{r['gb_per_second']:.2f}")
            share = f"{r['share_of_read_bandwidth']:.0%}"
            lines.append([r["contender"], str(r["queries"]), *numbers, share])
        print(aligned(lines))
        print(aligned([["", "reached"], *([k, f"{v:.2f}"] for k, v in found["goals"].items())]))
    if asked.only != "speed":
        found["memory"] = larger_than_memory(asked.limit, asked.K, asked.rounds)
        print(json.dumps(found["memory"], indent=1))
    if asked.write:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**known, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
