"""The benchmark's rows: JSON lines for machines, tables for the README."""
import json
import re
import sys

MARKED = re.compile(r"<!-- bench -->.*?<!-- /?bench -->", re.DOTALL)


class Report:
    """Rows in the order in which they were measured; each is written at once."""

    def __init__(self, path):
        self.path, self.rows, self.failures = path, {}, []
        self.file = open(path, "w")

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def add(self, name, value, unit, peer=None, peer_value=None, fraction_of_floor=None, less_is_better=False):
        """`ratio` says how many times better than the peer: above 1 is good whatever the unit."""
        ratio = None
        if value and peer_value:
            ratio = peer_value / value if less_is_better else value / peer_value
        row = {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio,
               "fraction_of_floor": fraction_of_floor}
        for key in ("value", "peer_value", "ratio", "fraction_of_floor"):
            if row[key] is not None:
                row[key] = float(f"{row[key]:.5g}")
        self.rows[name] = row
        self.write(row)
        shown = "failed" if value is None else f"{row['value']:,g} {unit}"
        if ratio is not None:
            shown += f", {row['ratio']:.2f} times {peer} ({row['peer_value']:,g})"
        print(f"  {name}: {shown}", file=sys.stderr, flush=True)

    def fail(self, what, why):
        self.failures.append(f"{what}: {why}")
        print(f"  FAILED {what}: {why}", file=sys.stderr, flush=True)

    def close(self):
        if self.failures:
            self.write({"name": "failures", "value": len(self.failures), "unit": "configurations", "peer": None,
                        "peer_value": None, "ratio": None, "fraction_of_floor": None, "what": self.failures})
        self.file.close()


def number(value):
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(titles, rows):
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def markdown(rows, machine, models):
    """What the README shows of a run: `rows` by name, `machine` its first line."""
    def get(name, key="value"):
        return number(rows[name][key]) if name in rows else ""

    def percent(name, key="fraction_of_floor"):
        value = rows[name][key] if name in rows else None
        return "" if value is None else f"{100 * value:.0f}%"

    torch = f"PyTorch {machine['torch']}" if machine["torch"] else None
    beside = (f"{torch} has its tensors ready, and stands with the best of its configurations of that precision in "
              "the same run (eager and compiled, channels_last or not, 1 process of 2 threads and DDP of 2 "
              "processes)." if torch else "There was no PyTorch to compare with.")
    lines = [f"Measured by `{machine['command']}` on {machine['utc'][:10]} on two cores of an "
             f"{machine['cpu']} (matrix products of oneDNN reach "
             + ", ".join(f"{get(f'machine/gemm/{p}/1')} GFLOP/s in {p}" for p in ("fp32", "bf16")
                         if f"machine/gemm/{p}/1" in rows)
             + f" on one core; copies {get('machine/memcpy/1')} GB/s), medians of {machine['rounds']} interleaved "
             "rounds.", "",
             "Training, samples/s of whole steps: batch 128 in 8 shards, SGD with momentum, with batches gathered and "
             f"normalized, and reports; per-step digests are off. {beside} Columns are workers x slots; `floor` is the share "
             "of the two cores' matrix peak in that precision.",
             ""]
    training = []
    for model in models:
        for precision in ("fp32", "bf16"):
            name = f"train/{model}/{precision}"
            if f"{name}/1x2" not in rows:
                continue
            row, price = rows[f"{name}/1x2"], f"exactness/{model}/{precision}/1x2"
            ratio = "" if row["ratio"] is None else f"**{row['ratio']:.2f}**"
            training.append([model, precision, get(f"{name}/1x1"), get(f"{name}/1x2"), get(f"{name}/2x1"),
                             get(f"{name}/1x2/sync-batch"), f"{number(row['peer_value'])} ({row['peer']})"
                             if row["peer_value"] else "", ratio, percent(f"{name}/1x2"),
                             f"{get(f'memory/{model}/{precision}/1x2')} / "
                             f"{get(f'memory/{model}/{precision}/1x2', 'peer_value')}",
                             f"{get(price)}%" if price in rows else ""])
    lines += table(["model", "precision", "1x1", "1x2", "2x1", "1x2, sync: batch", "PyTorch's best", "1x2 / PyTorch", "floor",
                    "peak MB, ours / its", "price of exactness"], training)
    lines += ["", "The price of exactness is what 8 canonical shards cost against one shard a slot. All-reduce "
              "(median time or bus bandwidth"
              + (f"; {torch} over Gloo between as many processes" if torch else "") + "):", ""]
    sizes = [("1KiB", "us"), ("64KiB", "us"), ("1MiB", "GB/s"), ("4MiB", "GB/s"), ("64MiB", "GB/s")]
    kinds = {"us": "latency", "GB/s": "bandwidth"}
    reduces = []
    for link in ("processes", "threads"):
        for members in (2, 4):
            cells = [f"{members} {link}"]
            for size, unit in sizes:
                name = f"allreduce/{link}/{members}/{size}/{kinds[unit]}"
                its = get(name, "peer_value")
                cells.append(get(name) + (f" (PyTorch {its})" if its else ""))
            reduces.append(cells)
    lines += table([""] + [f"{size}, {unit}" for size, unit in sizes], reduces)
    run, submit = "start/run-to-first-step", "start/submit-to-first-step"
    new = f" (PyTorch, importing included: {get(run, 'peer_value')} s)" if get(run, "peer_value") else ""
    lines += ["", f"From `lockstep submit` to the end of the first step {get(submit)} s; from `lockstep run`, which "
              f"starts coordinator and workers first, {get(run)} s{new}."]
    return "\n".join(lines)


def put_into(path, text):
    """Replaces what stands between the markers; False where there are none."""
    with open(path) as file:
        page = file.read()
    if not MARKED.search(page):
        return False
    page = MARKED.sub(lambda _: f"<!-- bench -->\n{text}\n<!-- /bench -->", page, count=1)
    with open(path, "w") as file:
        file.write(page)
    return True
