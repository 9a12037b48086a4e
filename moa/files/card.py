"""The model card of an adapter folder: figures, command and identities, for people and for hubs."""

import json
import re
from collections.abc import Mapping

import timm
from huggingface_hub import EvalResult, ModelCardData

from moa.files.markdown import block, code, escaped
from moa.files.origin import Origin
from moa.files.reading import AdapterInfo

SPLITS = ("in", "out", "all", "left_out")
_OF_SPLIT = ("trial_seed", "holdout_fraction", "data_hash", "split_hash")
_FIGURE = re.compile(r"(?:moa/)?env(\d+)_(in|out|all|left_out)_acc")


def model_card(info: AdapterInfo) -> str:
    """Markdown card of an adapter, with the front matter that model hubs read.

    The front matter's `model-index` holds the accuracy on the held-out domain, the one number that
    may be compared with those of others; the table below has every domain.
    """
    base = "\n".join(creation(info))
    head = "cosine head; " if info.head.get("kind") == "cosine" else ""
    what = f"{head}ranks {list(info.moa.resolved().ranks or ())}"
    imports = "\n".join(["import moa, timm", *registration(info.base_model)])
    use = f"""{imports}

{base}
moa.load_adapter(model, "path/to/this/folder")  # or "hf-hub:organisation/name\""""
    return f"""---
{_front_matter(info).to_yaml()}
---
# {escaped(_title(info))}

{len(info.classes)} classes; {what}. Base weights (SHA-256)
{code(info.base_sha256)}.

{block(use, "python")}

## Results

{_results(info)}
{"" if info.origin is None else _training(info.origin)}"""


def _title(info: AdapterInfo) -> str:
    held_out = "" if info.origin is None else f", {' and '.join(info.origin.withheld)} held out"
    return f"{info.moa.method} adapter for {info.base_model}{held_out}"


def creation(info: AdapterInfo) -> list[str]:
    """Lines of Python that make the fresh base of an adapter as `model`."""
    weights = "" if info.origin is None else info.origin.weights
    sizes = [f"{name}={value!r}" for name, value in sorted(info.model_args.items())]
    if info.origin is not None and weights == "random":
        arguments = [json.dumps(info.base_model), f"num_classes={len(info.classes)}", *sizes]
        call = f"timm.create_model({', '.join(arguments)})"
        return ["import torch", f"torch.manual_seed({info.origin.seed})", f"model = {call}"]
    arguments = [json.dumps(info.base_model), "pretrained=True"]
    if weights not in ("", "pretrained"):
        own = timm.get_pretrained_cfg(info.base_model)  # whose file may be in a form of its own
        plain = ', "custom_load": False' if own is not None and own.custom_load else ""
        arguments.append(f'pretrained_cfg_overlay={{"file": {json.dumps(weights)}{plain}}}')
    arguments += [f"num_classes={len(info.classes)}", *sizes]
    return [f"model = timm.create_model({', '.join(arguments)})"]


def registration(base_model: str) -> list[str]:
    """What a reader must import so that timm knows the base; empty where it does."""
    module = timm.model_entrypoint(base_model).__module__ if timm.is_model(base_model) else "timm"
    return [] if module.partition(".")[0] == "timm" else [f"import {module}"]


def hub_name(base_model: str) -> str:
    """The base's name on the hub if timm loads it from there, else timm's name."""
    config = timm.get_pretrained_cfg(base_model)  # None if timm does not know it
    return f"timm/{base_model}" if config is None or config.hf_hub_id else base_model


def _front_matter(info: AdapterInfo) -> ModelCardData:
    origin = info.origin
    return ModelCardData(
        library_name="moa-trainer",
        base_model=hub_name(info.base_model),
        datasets=None if origin is None else [origin.shown_dataset],
        pipeline_tag="image-classification",
        tags=["domain-generalization", "mixture-of-adapters", info.moa.method],
        model_name=_title(info),
        eval_results=None if origin is None else _held_out_results(info, origin) or None,
    )


def _held_out_results(info: AdapterInfo, origin: Origin) -> list[EvalResult]:
    """The held-out domain's accuracies, in per cent."""
    found = []
    for name, value in _numbers(info.results).items():
        match = _FIGURE.fullmatch(name)
        if match is None or _domain(origin, int(match[1])) != origin.held_out:
            continue
        found.append(
            EvalResult(
                task_type="image-classification", task_name="Domain generalization",
                dataset_type=origin.shown_dataset, dataset_config=origin.held_out,
                dataset_name=f"{origin.shown_dataset}, {origin.held_out} (held out)",
                dataset_split=match[2],
                dataset_args={name: getattr(origin, name) for name in _OF_SPLIT},
                metric_type="accuracy", metric_name=f"accuracy % ({match[2]} split)",
                metric_value=round(100 * value, 2),
            )
        )  # fmt: skip
    return found


def _numbers(results: Mapping[str, object]) -> dict[str, float]:
    """What of the results is a figure; a file from elsewhere may hold anything."""
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def _domain(origin: Origin, number: int) -> str:
    return origin.domains[number] if number < len(origin.domains) else f"env{number}"


def _results(info: AdapterInfo) -> str:
    """Tables of accuracies by domain, where the domains are known, and of all other figures."""
    rows: dict[int, dict[str, float]] = {}
    rest, tables = [], []
    for name, value in _numbers(info.results).items():
        match = None if info.origin is None else _FIGURE.fullmatch(name)
        if match is None:
            figure = str(value) if isinstance(value, int) else f"{value:.4f}"
            rest.append(f"| {escaped(name)} | {figure} |")
        else:
            rows.setdefault(int(match[1]), {})[match[2]] = value
    if info.origin is not None and rows:
        splits = [s for s in SPLITS if any(s in row for row in rows.values())]
        lines = [["domain", *(f"{s.replace('_', ' ')} accuracy %" for s in splits)]]
        lines.append(["---"] * len(lines[0]))
        for number, row in sorted(rows.items()):
            domain = _domain(info.origin, number)
            is_withheld, domain = domain in info.origin.withheld, escaped(domain)
            name = f"**{domain}** (held out)" if is_withheld else domain
            shown = (f"{100 * row[s]:.1f}" if s in row else "-" for s in splits)
            lines.append([name, *shown])
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if rest:
        tables.append("\n".join(["| result | value |", "|---|---|", *rest]))
    return "\n\n".join(tables) or "None on record."


def _training(origin: Origin) -> str:
    """How it came about."""
    averaged = ", ".join(map(code, origin.averaged))
    mean = f"The mean of these adapters, tensor by tensor: {averaged}.\n\n" if averaged else ""
    withheld = " and ".join(map(code, origin.withheld))
    compiled = f" with compiled {escaped(origin.compiled)}" if origin.compiled else ""
    return f"""
## Training

{mean}Dataset {code(origin.shown_dataset)} (data hash {code(origin.data_hash)}),
domain {withheld} held out, seed {origin.seed}. Trial seed {origin.trial_seed} splits every domain
and holds {origin.holdout_fraction:g} of it back as `out` (split hash {code(origin.split_hash)}).

{block(origin.command, "bash")}

ran on {origin.processes} process{"" if origin.processes == 1 else "es"}{compiled}.
"""
