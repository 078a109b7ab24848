"""What `report.html` says, section by section; one that has nothing to say is empty."""

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from mgpu_ddp.output.manifest import Manifest
from mgpu_ddp.reporting.class_table import Classes
from mgpu_ddp.reporting.markup import Html, bars, foreign, joined, legend, plot, table, tag
from mgpu_ddp.reporting.table_stats import Tally

log = logging.getLogger("mgpu_ddp")

CLASSES_SHOWN = 20
LABELS_SHOWN = 200
RANKS_SHOWN = 32
ERRORS_SHOWN = 50
ERRORS_READ = 100_000
STAGES = {
    "startup_s": "start-up",
    "wait_s": "waiting for the loader",
    "input_s": "GPU input",
    "predict_s": "predicting",
    "peers_s": "waiting for peers",
}
TOPS = {"top1": "top-1", "top5": "top-5"}


def summary(manifest: Manifest, counted: Tally, status: dict[str, Any], metrics: dict[str, Any], home: Path) -> Html:
    job, rows = manifest.fingerprint, manifest.prefix - manifest.start
    cards: list[tuple[str, object]] = [
        ("status", status.get("status", "unknown")),
        ("rows", f"{rows:,} of {manifest.stop - manifest.start:,}"),
        ("errors", f"{manifest.errors:,}"),
    ]
    if "images_per_s" in metrics:
        rate = "images/s, steady" if metrics.get("steady", True) else "images/s"
        cards += [(rate, f"{metrics['images_per_s']:,.1f}"), ("wall time", _time(metrics["wall_s"]))]
    shares = counted.accuracy or {}
    cards += [(name, f"{shares[key]:.2%}") for key, name in TOPS.items() if shares.get(key) is not None]
    source = job.get("data.root") or job.get("data.path") or job.get("data.name")
    what = f"{job.get('model.name')} on {job.get('runtime.device')}, {job.get('runtime.precision')}"
    reason = status.get("reason")
    return joined(
        [
            tag("h1", foreign(job.get("model.name")), " over ", foreign(source)),
            tag("p", foreign(what), ", in ", foreign(home), class_="soft"),
            tag("p", foreign(reason), class_="bad") if reason else "",
            tag("div", *(tag("div", name, tag("b", value), class_="card") for name, value in cards), class_="cards"),
        ]
    )


def throughput(metrics: dict[str, Any]) -> Html:
    found = metrics.get("throughput", {})
    if not found.get("rows"):
        return Html()
    rates = [rows / found["bin_s"] for rows in found["rows"]]
    begin, end = found["from_s"], found["from_s"] + found["bin_s"] * len(rates)
    return joined(
        [
            tag("h2", "Throughput over time"),
            plot(
                rates,
                top=f"{max(rates):,.0f} images/s",
                left=_time(begin),
                right=_time(end),
                title=f"between {min(rates):,.0f} and {max(rates):,.0f} images/s",
                as_line=True,
            ),
            tag("p", "Of the last start, all ranks together, after the first batch of each.", class_="soft"),
        ]
    )


def stages(metrics: dict[str, Any]) -> Html:
    ranks = metrics.get("ranks", [])
    if not ranks:
        return Html()
    longest = max(rank["wall_s"] for rank in ranks) or 1.0
    kinds = {f"s{i}": name for i, name in enumerate([*STAGES.values(), "the rest"])}
    rows, totals = [], [0.0] * len(kinds)
    for rank in ranks[:RANKS_SHOWN]:
        # A rank's start-up ends with its first prediction, for which it has waited as well.
        spent = [rank[stage] for stage in STAGES]
        spent[0] = max(0.0, rank["wall_s"] - sum(spent[1:])) if sum(spent) > rank["wall_s"] else spent[0]
        spent.append(max(0.0, rank["wall_s"] - sum(spent)))
        totals = [total + s for total, s in zip(totals, spent, strict=True)]
        words = ", ".join(f"{name} {_time(s)}" for name, s in zip(kinds.values(), spent, strict=True))
        shares = [(kind, s / longest) for kind, s in zip(kinds, spent, strict=True)]
        batch = f"{rank['batch_p50_ms']:,.0f} / {rank['batch_p95_ms']:,.0f} ms"
        rows.append([rank["rank"], bars(shares, words), f"{rank['rows']:,}", f"{rank['images_per_s']:,.1f}", batch])
    means = [total / len(rows) for total in totals]
    workers: Counter[str] = Counter()
    for rank in ranks:
        workers.update(rank["workers_s"])
    loader = ", ".join(f"{stage} {_time(spent_s)}" for stage, spent_s in workers.most_common())
    more = f"{len(ranks) - RANKS_SHOWN:,} more ranks are in metrics.json." if len(ranks) > RANKS_SHOWN else ""
    return joined(
        [
            tag("h2", "Time per stage"),
            tag("p", "Bottleneck: ", tag("b", metrics["bottleneck"]), f" ({metrics['remedy']}).")
            if metrics["bottleneck"]
            else "",
            legend(
                {kind: f"{name} {_time(mean_s)}" for (kind, name), mean_s in zip(kinds.items(), means, strict=True)}
            ),
            table(["rank", "", "rows", "images/s", "batch p50 / p95"], rows, numbers="nwnnn"),
            tag("p", "Seconds are the mean over the ranks shown.", class_="soft"),
            tag("p", f"Loader workers of all ranks together: {loader}." if loader else "", " ", more, class_="soft"),
        ]
    )


def accuracy(counted: Tally, named: Classes) -> Html:
    shares = counted.accuracy
    if shares is None:
        return Html()
    head = [tag("h2", "Accuracy")]
    if not shares["compared"]:
        why = f"{shares['labelled']:,} rows have a label, and none is compared: {shares['how']}."
        return joined([*head, tag("p", why)])
    found = ", ".join(f"{name} {shares[key]:.2%}" for key, name in TOPS.items() if shares[key] is not None)
    of = f" of {shares['compared']:,} rows; compared are {shares['how']}."
    worst = sorted(counted.per_class(named), key=lambda row: (row["top1"], -row["rows"]))
    rows = [
        [
            foreign(row["name"]),
            bars([("s2", row["top1"])], f"{row['top1']:.2%}"),
            f"{row['top1']:.2%}",
            "" if row["top5"] is None else f"{row['top5']:.2%}",
            f"{row['rows']:,}",
        ]
        for row in worst[:LABELS_SHOWN]
    ]
    shown = f"{min(len(worst), LABELS_SHOWN):,} of {len(worst):,} classes, the worst first"
    titles = ["label", "", "top-1", "top-5", "rows"]
    whole = tag("details", tag("summary", shown), table(titles, rows, numbers=".wnnn"), open="open")
    return joined([*head, tag("p", tag("b", found), of), whole])


def classes(counted: Tally, named: Classes) -> Html:
    total = int(counted.preds.sum())
    if not total:
        return Html()
    order = (-counted.preds).argsort(kind="stable")[:CLASSES_SHOWN]
    order = order[counted.preds[order] > 0]
    counts = [(foreign(named.name(int(i))), int(counted.preds[i])) for i in order]
    rest = total - sum(count for _, count in counts)
    others = int((counted.preds > 0).sum()) - len(counts)
    if rest:
        counts.append((tag("i", f"{others:,} other classes"), rest))
    largest = max(count for _, count in counts)
    rows = [[name, bars([("s0", n / largest)], f"{n:,} rows"), f"{n:,}", f"{n / total:.1%}"] for name, n in counts]
    bins = counted.confidence.tolist()
    return joined(
        [
            tag("h2", "Predicted classes"),
            table(["class", "", "rows", "share"], rows, numbers=".wnn"),
            tag("h2", "Confidence"),
            plot(
                bins,
                top=f"{max(bins):,} rows",
                left="prob 0",
                right="prob 1",
                title="; ".join(f"{i / len(bins):.2f} to {(i + 1) / len(bins):.2f}: {n:,}" for i, n in enumerate(bins)),
                as_line=False,
            ),
            tag("p", "Rows by the probability of their predicted class.", class_="soft"),
        ]
    )


def errors(run_dir: Path, manifest: Manifest) -> Html:
    if not manifest.errors:
        return Html()
    kinds: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    try:
        with (run_dir / "errors.jsonl").open(encoding="utf-8") as file:
            for line in islice(file, ERRORS_READ):
                error = json.loads(line)
                kinds[str(error["reason"]).partition(":")[0]] += 1
                if len(first) < ERRORS_SHOWN:
                    first.append(error)
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s cannot be read: %s", run_dir / "errors.jsonl", error)
    counts = [[foreign(kind), f"{count:,}"] for kind, count in kinds.most_common(CLASSES_SHOWN)]
    rows = [[error["index"], foreign(error["path"] or ""), foreign(error["reason"])] for error in first]
    left = manifest.errors - len(rows)
    return joined(
        [
            tag("h2", "Errors"),
            tag("p", f"{manifest.errors:,} of the rows: a reason instead of a prediction.", class_="bad"),
            table(["kind", "rows"], counts, numbers=".n"),
            table(["index", "path", "reason"], rows, numbers="n"),
            tag("p", f"{left:,} more are in errors.jsonl." if left else "", class_="soft"),
        ]
    )


def where(manifest: Manifest, metrics: dict[str, Any]) -> Html:
    ranks = metrics.get("ranks", [])
    machines: Counter[tuple[str, str]] = Counter((r.get("host", "?"), r.get("device", "?")) for r in ranks)
    hosts = [[foreign(host), foreign(device), n] for (host, device), n in machines.most_common(RANKS_SHOWN)]
    facts = {
        "ranks": ", then ".join(map(str, manifest.world_sizes)),
        "batch_size": manifest.batch_size,
        "parts": f"{len(manifest.parts):,}",
        "peak memory": f"{metrics['peak_host_bytes'] / 2**30:.1f} GiB of the host" if ranks else "?",
        "peak GPU memory": f"{metrics['peak_gpu_bytes'] / 2**30:.1f} GiB" if metrics.get("peak_gpu_bytes") else "none",
        **manifest.versions,
        **manifest.fingerprint,
    }
    return joined(
        [
            tag("h2", "What ran where"),
            table(["host", "device", "ranks"], hosts, numbers="..n") if hosts else "",
            tag(
                "details",
                tag("summary", "The job in full"),
                table(["", ""], [[tag("bdi", key), foreign(value)] for key, value in facts.items()]),
            ),
        ]
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
