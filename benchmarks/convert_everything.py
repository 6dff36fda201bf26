"""Convert a tiny model of every class of transformers and timm, and prove each conversion by running it.

    ./dev bench convert_everything                 # goes on where it stopped; --again starts anew
    ./dev bench convert_everything --only Llama    # classes whose names hold a word
    ./dev bench convert_everything --retry "no example" "not built"    # those with these outcomes once more

Every class is built, converted with an example and checked once more in a process of its own with a limit of time and
memory. The table of known readers of weights is switched off: the proof has to find them. The result is
benchmarks/results/convert_everything.json, and its page docs/convert_everything.md. It may be put together in several
environments, also at the same time: each class has the number of the one that it was tried in.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from _record import RESULTS
from _tiny_models import build, examples, timm_models, transformers_classes, versions
from sdd.bench.record import Record
from sdd.conversion import ConversionReport, convert, known
from sdd.conversion.proof import Refused
from sdd.files import write_aside

PAGE = Path(__file__).resolve().parent.parent / "docs" / "convert_everything.md"
NAME = "convert_everything"
WHAT = (
    "one tiny model of each class, converted with an example and without the table of known readers; outcome, share of "
    "parameters in converted layers, refuted and unproven layers, and layers that a second proof refuted (failed)"
)
#: Outcomes in the order of the page, with what they mean.
OUTCOMES = {
    "proven": "every converted layer proven",
    "refuted some": "some layers refuted and put back, all others proven",
    "open": "some layers not reached or undecided, none left that was refuted",
    "failed": "a layer stayed converted that a second proof refuted, or the converted model raised an error there",
    "nothing": "nothing to convert",
    "refused once converted": "the converted model raised an error; put back",
    "no example": "built, but no batch of ours was accepted",
    "not built": "no tiny model was built from its config",
    "too long": "over the limit of time",
    "died": "the process died (memory, or a crash of native code)",
}


def main() -> None:
    """Walk the classes and write result and page after each of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of which a class's name must hold one")
    parser.add_argument("--seconds", type=float, default=60, help="limit for one class")
    parser.add_argument("--gigabytes", type=float, default=12, help="limit of address space for one class")
    parser.add_argument("--count", type=int, help="at most so many classes")
    parser.add_argument("--again", action="store_true", help="forget the earlier result")
    parser.add_argument("--retry", nargs="+", default=[], help="outcomes whose classes are tried once more")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / f"{NAME}.json"
    if args.again:
        file.unlink(missing_ok=True)
    done = _earlier(file)["classes"]
    items = [item for item in _items() if any(word in item for word in args.only)]
    items = [item for item in items if item not in done or done[item]["outcome"] in args.retry][: args.count]
    with Record(NAME, RESULTS, {"what": WHAT}) as record:
        for number, item in enumerate(items, 1):
            result = _in_a_process(item, args.seconds, args.gigabytes)
            _add(item, result, record.values, _earlier(file))
            record.save()
            print(f"{number}/{len(items)}  {item}: {result['outcome']}  {result.get('reason', '')}", flush=True)
    write_aside(PAGE, page(_earlier(file), len(_items())))
    print(f"written to {file} and {PAGE}")


def _earlier(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {"environments": [], "classes": {}}


def _add(item: str, result: dict[str, Any], values: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Add one class to what the file holds by now, with the number of the environment that it was tried in."""
    environments, here = earlier["environments"], versions()
    if here not in environments:
        environments.append(here)
    classes = {**earlier["classes"], item: {**result, "environment": environments.index(here)}}
    values.update(environments=environments, classes=classes)


def _items() -> list[str]:
    """One class of each kind of config, then timm's models, then the other classes of transformers."""
    kinds: dict[str, list[str]] = {}
    for name, kind in transformers_classes().items():
        kinds.setdefault(kind, []).append(f"transformers/{name}")
    first, others = [names[0] for names in kinds.values()], [name for names in kinds.values() for name in names[1:]]
    try:
        return [*first, *(f"timm/{name}" for name in timm_models()), *others]
    except Exception as error:
        print(f"timm is left out: {type(error).__name__}: {error}")
        return [*first, *others]


def _in_a_process(item: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """The result of one class; forked, so that the libraries are imported once."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(item, int(gigabytes * 2**30), sending))
    start = time.monotonic()
    process.start()
    sending.close()
    try:
        answered = receiving.poll(seconds)
        result = receiving.recv() if answered else {"outcome": "too long"}
    except EOFError:
        result = {"outcome": "died"}
    finally:
        process.kill()
        process.join()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _send(item: str, limit: int, connection: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    connection.send(try_one(item))


def try_one(item: str) -> dict[str, Any]:
    """Build, convert and prove one class; never raises."""
    known.KNOWN = known.KNOWN_IF = ()
    try:
        model = build(item)
    except Exception as error:
        return _failure("not built", error)
    total = sum(parameter.numel() for parameter in model.parameters())
    refusals: list[Exception] = []
    for example in examples(model):
        try:
            report = convert(model, example=example, redraw=True)
        except Refused as error:
            refusals.append(error)
            continue
        except Exception as error:
            kind = "nothing" if "nothing to convert" in str(error) else "refused once converted"
            return {**_failure(kind, error), "parameters": total}
        try:
            return _result(report, report.verify(model, example).named("refuted"))
        except Exception as error:
            return {**_failure("failed", error), "parameters": total}
    return {**_failure("no example", refusals[0] if refusals else "no known input"), "parameters": total}


def _failure(outcome: str, error: Any) -> dict[str, Any]:
    text = str(error).strip().partition("\n")[0]
    return {"outcome": outcome, "reason": f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__}


def _result(report: ConversionReport, failed: Mapping[str, str]) -> dict[str, Any]:
    proof = report.proof
    assert proof is not None
    refuted, unproven = proof.named("refuted"), {**proof.named("not reached"), **proof.named("undecided")}
    outcome = "failed" if failed else "open" if unproven else "refuted some" if refuted else "proven"
    return {
        "outcome": outcome,
        "parameters": report.parameters,
        "share": round(report.share, 4),
        "layers": len(proof.verdicts),
        "proven": len(proof.named("proven")),
        "refuted": refuted,
        "unproven": unproven,
        "failed": dict(failed),
    }


def page(content: Mapping[str, Any], known_classes: int) -> str:
    """The Markdown page of a result file."""
    classes: Mapping[str, Mapping[str, Any]] = content["classes"]
    counts = Counter(result["outcome"] for result in classes.values())
    lines = [
        "# Conversion of the classes of transformers and timm",
        "",
        f"{len(classes)} classes of {known_classes}, each a tiny model built from its config on a CPU, converted",
        "with an example and proven ([how](convert.md)). The table of known readers was off: the proof alone had",
        "to find them. Written by `./dev bench convert_everything` from `benchmarks/results/convert_everything.json`.",
        "Of timm the smallest model of each of its files was tried, and its models for tests.",
        "",
        *_environments(content),
        "",
        "| outcome | classes |",
        "|---|---|",
        *(f"| {meaning} | {counts[outcome]} |" for outcome, meaning in OUTCOMES.items() if counts[outcome]),
    ]
    converted = {item: result for item, result in classes.items() if "share" in result}
    found = {item: result for item, result in converted.items() if result["refuted"] or result["failed"]}
    lines += ["", "## Refuted layers", "", "| class | layers put back | reason |", "|---|---|---|"]
    lines += [
        f"| {item} | {_endings(result['refuted'])} | {_reasons(result['refuted'])} |" for item, result in found.items()
    ]
    lines += ["", "## Share of parameters converted", ""]
    lines += ["Tiny models have large embeddings for their size, so shares of published sizes are larger.", ""]
    lines += ["| class | share | layers | proven | refuted | open |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {item} | {result['share']:.0%} | {result['layers']} | {result['proven']} | {len(result['refuted'])} | "
        f"{len(result['unproven'])} |"
        for item, result in converted.items()
    ]
    rest = {item: result for item, result in classes.items() if "share" not in result}
    lines += ["", "## Not converted", "", "| class | outcome | reason |", "|---|---|---|"]
    lines += [f"| {item} | {result['outcome']} | {_cell(result.get('reason', ''))} |" for item, result in rest.items()]
    return "\n".join(lines) + "\n"


def _environments(content: Mapping[str, Any]) -> list[str]:
    counts = Counter(result["environment"] for result in content["classes"].values())
    used = [", ".join(f"{name} {version}" for name, version in one.items()) for one in content["environments"]]
    return [f"- {counts[number]} classes with {text}." for number, text in enumerate(used)]


def _endings(names: Mapping[str, str] | Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(name.rpartition(".")[2] for name in names))


def _reasons(refuted: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(refuted.values()))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:160]


if __name__ == "__main__":
    main()
