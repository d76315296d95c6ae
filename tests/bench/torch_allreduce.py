"""The peer's all-reduce on the CPU: torch.distributed over Gloo between processes of this host.

Prints one JSON line for each size: {"members": 2, "bytes": 1024, "us": 150.0, "torch": "2.15.0"}. `us` is
the better of two ways to time: the median over single calls from the member that comes last until the last
member has the sum, as allreduce_bench has it, and the mean of calls one after the other, the median of five runs.
usage: torch_allreduce.py MEMBERS
"""
import json
import os
import statistics
import sys
import tempfile
import time

SIZES = (1 << 10, 64 << 10, 1 << 20, 4 << 20, 64 << 20)
RUNS = 5


def member(rank, members, rendezvous):
    import torch
    import torch.distributed as distributed
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=members)
    for size in SIZES:
        values = torch.ones(size // 4)
        count = max(2, min(60, (32 << 20) // size))
        singles, means = [], []
        for run in range(-1, RUNS):  # the first one warms up
            for _ in range(count):
                values.fill_(1)
                distributed.barrier()
                begin = time.monotonic_ns()
                distributed.all_reduce(values)
                singles.append((begin, time.monotonic_ns()))
            distributed.barrier()
            start = time.perf_counter()
            for _ in range(count):
                distributed.all_reduce(values)
            means.append((time.perf_counter() - start) / count)
            if run < 0:
                singles, means = [], []
        spans = [None] * members
        distributed.all_gather_object(spans, singles)
        if rank == 0:
            single = statistics.median(max(end for _, end in call) - max(begin for begin, _ in call)
                                       for call in zip(*spans)) * 1e-9
            best = min(single, statistics.median(means))
            print(json.dumps({"members": members, "bytes": size, "us": best * 1e6, "torch": torch.__version__}),
                  flush=True)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    import torch.multiprocessing
    members = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(member, (members, os.path.join(folder, "rendezvous")), members)
