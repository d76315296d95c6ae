"""The benchmark's rows: JSON lines for machines, tables for the README."""
import json
import os
import re
import sys

MARKED = re.compile(r"<!-- bench -->.*?<!-- /?bench -->", re.DOTALL)


def rounded(value):
    return None if value is None else float(f"{value:.5g}")


class Report:
    """Rows in the order in which they were measured. Each is written at once, and anew at the end, when the
    fractions of the floor are known."""

    def __init__(self, path):
        self.path, self.lines, self.rows, self.failures = path, [], {}, []
        self.file = open(path, "w")

    def write(self, row):
        self.lines.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def add(self, name, value, unit, peer=None, peer_value=None, ratio=None, less_is_better=False):
        """`ratio` says how many times better than the peer: above 1 is good whatever the unit. Where it is not
        given, it is that of the two values."""
        if ratio is None and value and peer_value:
            ratio = peer_value / value if less_is_better else value / peer_value
        row = {"name": name, "value": rounded(value), "unit": unit, "peer": peer, "peer_value": rounded(peer_value),
               "ratio": rounded(ratio), "fraction_of_floor": None}
        self.rows[name] = row
        self.write(row)
        shown = "no value" if value is None else f"{row['value']:,g} {unit}"
        if ratio is not None:
            shown += f", {row['ratio']:.2f} times {peer} ({row['peer_value']:,g})"
        print(f"  {name}: {shown}", file=sys.stderr, flush=True)

    def add_fraction(self, name, fraction):
        self.rows[name]["fraction_of_floor"] = rounded(fraction)
        if fraction > 1:
            self.fail(name, f"{fraction:.3f} of the machine's peak, which was measured too low")

    def fail(self, what, why):
        self.failures.append(f"{what}: {why}")
        print(f"  FAILED {what}: {why}", file=sys.stderr, flush=True)

    def close(self):
        if self.failures:
            self.write({"name": "failures", "value": len(self.failures), "unit": "configurations", "peer": None,
                        "peer_value": None, "ratio": None, "fraction_of_floor": None, "what": self.failures})
        self.file.close()
        with open(self.path + ".new", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.lines)
        os.replace(self.path + ".new", self.path)


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
             "rounds. Ratios and prices are medians of the ratios within the rounds, and so not always the ratio of the "
             "medians that stand beside them.", "",
             "Training, samples/s of whole steps: batch 128 in 8 shards, SGD with momentum, with batches gathered and "
             f"normalized, and reports; per-step digests are off. {beside} Columns are workers x slots; `floor` is the "
             "share of the two cores' matrix peak in that precision; memory is that of all processes, ours being "
             "client, coordinator and worker.",
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
                             f"{get(price)}%" if get(price) else ""])
    lines += table(["model", "precision", "1x1", "1x2", "2x1", "1x2, sync: batch", "PyTorch's best",
                    "1x2 / PyTorch", "floor", "peak MB, ours / its", "price of exactness"], training)
    digests = ", ".join(f"{get(f'price/digests/{model}')}% of {model}" for model in models
                        if get(f"price/digests/{model}"))
    lines += ["", "The price of exactness is what 8 shards and their canonical tree cost against one shard a slot, "
              "whose two gradients have one order of adding only: the order-free sum. It can be negative, since a slot "
              "works shard by shard and small ones stay in its caches."
              + (f" Digests of every step, the default, cost, in fp32: {digests}." if digests else ""),
              "", "All-reduce (median time or bus bandwidth"
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
    new = f" (PyTorch, eager, importing included: {get(run, 'peer_value')} s)" if get(run, "peer_value") else ""
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
