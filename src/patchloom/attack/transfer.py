"""A table of attacks and victims: made, kept, measured and drawn in one folder.

`ATTACK/` holds the perturbations (`deltas.safetensors`), the attacked images as PNG and `attack.json`; `metrics.csv`
and `summary.json` hold the figures, `report.html` all there is to look at. An attack that is complete is not made again
when the command goes on with `resume`.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.attack.craft import TITLES, Crafter, fingerprints, store, stored
from patchloom.attack.expected import TIMED, announce
from patchloom.attack.measure import answers, beyond, checks, figures_of
from patchloom.attack.page import sections
from patchloom.attack.subjects import Subjects, Victim, class_names, open_subjects
from patchloom.data.survey import notice
from patchloom.encoders import depth, has_tokens
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, read_config, write_json, write_rows
from patchloom.report.page import write_report
from patchloom.sweep.study import markdown
from patchloom.systems.dta.config import OF_VICTIM, DTAConfig, listed
from patchloom.training.config import CONFIG, dump_config
from patchloom.training.places import absolute

SUMMARY, METRICS, PREDICTIONS = "summary.json", "metrics.csv", "predictions.csv"
REPORT, CURVES = "report.html", "curves.json"
FREE_ON_RESUME = {"resume", "overwrite", "out", "num_workers", "device", "attacks", "pictured", "victim"}
"""Settings that may be others when a command goes on: what was made stays what it is."""
OF_A_ROW = ("clean", "asr", "robust", "error", "flip")


@dataclass(frozen=True)
class AttackRun:
    """What a command leaves behind."""

    path: Path
    """The folder."""
    report: Path
    """The page."""
    summary: dict[str, Any] = field(repr=False)
    """The contents of `summary.json`."""

    def __str__(self) -> str:
        rows = [
            {"attack": row["attack"], "victim": row["victim"]}
            | {name: "–" if row[name] is None else f"{row[name]:.1f}" for name in OF_A_ROW}
            for row in self.summary["table"]
        ]
        doubts = [
            f"doubt ({row['check']}): {row['victim']}: {row['found']}"
            for row in self.summary["checks"]
            if not row["good"]
        ]
        return "\n".join(["percent; asr is of images that were right", markdown(rows), *doubts, f"done: {self.report}"])


class TransferAttack:
    """Downstream Transfer Attack: how far what is made from a public encoder is fooled through it."""

    config_class = DTAConfig

    def __init__(self, config: DTAConfig) -> None:
        self.config = config

    def run(self) -> AttackRun:
        """Attack, measure, and write the folder.

        Raises:
            UsageError: Models, images or the folder cannot be used as asked.
        """
        config, began = self.config, time.monotonic()
        check_out(config)
        subjects = open_subjects(config)
        crafter = Crafter(config, subjects)
        names, left_out = crafter.names()
        for reason in left_out:
            notice(reason)
        if not names:
            raise UsageError("no attack is left to make; name others, such as --attacks [noise,dta]")
        crafter.unsearched()  # refuses blocks there are not, before the folder is made
        out = _claim(config)
        first = subjects.encoders[0]
        announce(
            config,
            names,
            subjects.encoders,
            subjects.images[:TIMED].to(subjects.device),
            len(subjects.keys),
            [victim.name for victim in subjects.victims],
            depth(first) if has_tokens(first) else 1,
            out,
        )
        clean = {v.name: self._answers(subjects, v, subjects.images) for v in subjects.victims}
        attacked: dict[tuple[str, str], Tensor] = {}
        said: dict[tuple[str, str], Tensor] = {}
        made: list[dict[str, Any]] = []
        for name in names:
            x = torch.empty(0)
            for number, victim in enumerate(subjects.victims):
                if name in OF_VICTIM or number == 0:  # others are made once, for all victims
                    of_one = victim if name in OF_VICTIM else None
                    x, about = self._made(out, name, of_one, crafter)
                    attacked[name, of_one.name if of_one else ""] = x[: config.pictured].clone()
                    made.append({"attack": name, **about})
                said[name, victim.name] = self._answers(subjects, victim, x)
        rows = [
            {"attack": name, "victim": v.name, **figures_of(clean[v.name], said[name, v.name], v.labels)}
            for v in subjects.victims
            for name in names
        ]
        curves = self._curves(out, crafter, names)
        found: list[dict[str, Any]] = []
        for v in subjects.victims:
            pair = None
            if {"noise", "dta"} <= set(names):
                pair = beyond(said["noise", v.name], said["dta", v.name], v.labels)
            robust = {row["attack"]: row["robust"] for row in rows if row["victim"] == v.name}
            before = next(row["clean"] for row in rows if row["victim"] == v.name)
            majority = 100 * float(v.labels.bincount().max() / len(v.labels))
            found += checks(v.name, robust, pair, curves.get(v.name, {}), before, majority)
        summary = self._summary(crafter, rows, found, curves, made, left_out, time.monotonic() - began)
        _write_metrics(out / METRICS, rows)
        _write_predictions(out / PREDICTIONS, subjects, clean, said)
        write_json(out / SUMMARY, summary)
        doubts = [row for row in found if not row["good"]]
        write_report(
            out / REPORT,
            title="Downstream Transfer Attack",
            subtitle=f"{', '.join(summary['victims'])} through {', '.join(summary['encoders'])}, on {config.data}",
            facts={
                "images": len(subjects.keys),
                "ε": _level(config.epsilon),
                "steps": config.steps,
                "victims": len(clean),
            },
            sections=sections(config, subjects, attacked, said, summary),
            command=_command(config),
            verdict=_verdict(summary, doubts),
        )
        return AttackRun(out, out / REPORT, summary)

    def _answers(self, subjects: Subjects, victim: Victim, images: Tensor) -> Tensor:
        return answers(victim, images, subjects.device, self.config.batch_size)

    def _made(self, out: Path, name: str, victim: Victim | None, crafter: Crafter) -> tuple[Tensor, dict[str, Any]]:
        """Return attacked images, from the folder where they are complete there, and what there is to say of them."""
        subjects, config = crafter.subjects, self.config
        folder = out / name if victim is None else out / name / victim.name
        images = subjects.images
        weights = crafter.weights
        of_victim = {} if victim is None else fingerprints([victim.model], [victim.name])
        kept = stored(folder, images, subjects.keys) if config.resume else None
        if kept is not None and kept[1].get("encoders") != weights:
            raise UsageError(
                f"{folder} was made through other weights than {', '.join(weights)} has now; choose another out"
            )
        if kept is not None and kept[1].get("victim", {}) == of_victim:
            return kept
        began = time.monotonic()
        x = crafter.craft(name, victim)
        search = crafter.search if name in ("dta", "universal") else None
        about = {
            "title": TITLES[name],
            "eps": config.epsilon,
            "step_size": config.alpha,
            "steps": config.steps if name != "noise" else 0,
            "seed": config.seed,
            "encoders": weights,
            "victim": of_victim,
            **({} if search is None else _layers(search, subjects.encoder_names)),
            "largest_change": float((x.double() - images.double()).abs().max()),
            "seconds": time.monotonic() - began,
            "pictures": config.save_images and images.shape[1] in (1, 3),
        }
        store(folder, x, images, subjects.keys, about)
        print(f"{name}{'' if victim is None else f' on {victim.name}'}: {about['seconds']:.0f} s", file=sys.stderr)
        return x, about

    def _curves(self, out: Path, crafter: Crafter, names: list[str]) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Return robust accuracy under the attack by ε and by steps, for each victim; kept in the folder."""
        config, subjects = self.config, crafter.subjects
        count = min(config.curve_images, len(subjects.keys))
        if not count or "dta" not in names:
            return {}
        kept = out / CURVES
        if config.resume and kept.exists():
            earlier: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
            if set(earlier) == {victim.name for victim in subjects.victims}:
                return earlier
        rows = slice(0, count)
        curves: dict[str, Any] = {
            victim.name: {name: {"x": [], "robust": [], "low": [], "high": []} for name in ("eps", "steps")}
            for victim in subjects.victims
        }
        sizes = [(level, level / 255) for level in sorted(set(config.curve_levels))]
        steps = sorted({max(1, round(config.steps * share)) for share in (0.025, 0.125, 0.25, 0.5, 1)})
        pace = config.alpha / config.epsilon
        by_size: list[dict[str, Any]] = [{"eps": eps, "step_size": pace * eps} for _, eps in sizes]
        series: dict[str, list[tuple[int, dict[str, Any]]]] = {
            "eps": list(zip([0, *(level for level, _ in sizes)], [{}, *by_size], strict=True)),
            "steps": [(number, {"steps": number}) for number in steps],
        }
        for name, points in series.items():
            for x, changes in points:
                changed = Crafter(replace(config, **changes), subjects, crafter.search)
                images = changed.craft("dta", rows=rows) if changes else subjects.images[rows]
                for victim in subjects.victims:
                    logits = self._answers(subjects, victim, images)
                    found = figures_of(logits, logits, victim.labels[rows])
                    values = (float(x), found["robust"], *found["robust_interval"])
                    for key, value in zip(("x", "robust", "low", "high"), values, strict=True):
                        curves[victim.name][name][key].append(value)
        write_json(kept, curves)
        return curves

    def _summary(
        self,
        crafter: Crafter,
        rows: list[dict[str, Any]],
        found: list[dict[str, Any]],
        curves: dict[str, Any],
        made: list[dict[str, Any]],
        left_out: list[str],
        seconds: float,
    ) -> dict[str, Any]:
        config, subjects = self.config, crafter.subjects
        chosen = next((about for about in made if about["attack"] == "dta"), {})
        return {
            "encoders": subjects.encoder_names,
            "victims": [victim.name for victim in subjects.victims],
            "data": str(config.data),
            "images": len(subjects.keys),
            "images_available": subjects.available,
            "unreadable_images": len(subjects.skipped),
            "eps": config.epsilon,
            "step_size": config.alpha,
            "steps": config.steps,
            "quantised": config.quantise,
            "unit": "percent",
            "table": rows,
            **{name: chosen[name] for name in ("layers", "layer_scores") if name in chosen},
            "checks": found,
            "curves": curves,
            "attacks": [
                {name: value for name, value in about.items() if name not in ("layers", "layer_scores", "pictures")}
                for about in made
            ],
            "left_out": left_out,
            "skipped": [{"file": key, "reason": reason} for key, reason in subjects.skipped],
            "seconds": seconds,
        }


def check_out(config: DTAConfig) -> None:
    """Refuse a folder that must not be written to, before anything is computed.

    Raises:
        UsageError: It holds something and is not to be gone on with or replaced, or holds attacks of other settings.
    """
    path = check_place(config.out)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; attacks are kept in a folder")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / CONFIG).exists():
        raise UsageError(f"{path} is not empty and holds no attacks; choose another out")
    if config.resume:
        saved, now = read_config(path / CONFIG), _plain(config, anywhere=True)
        for name, value in now.items():
            if name not in FREE_ON_RESUME and name in saved and saved[name] != value:
                raise UsageError(
                    f"the attacks in {path} have {name}={saved[name]}, not {value}; resume them unchanged, or choose "
                    f"another out"
                )
    elif not config.overwrite:
        raise UsageError(f"{path} is not empty; resume goes on with it, overwrite deletes it, or choose another out")


def _claim(config: DTAConfig) -> Path:
    out = Path(config.out)
    if config.overwrite and out.exists():
        shutil.rmtree(out)
    make_folder(out)
    dump_config(_plain(config, anywhere=True), out / CONFIG, "attack dta")
    return out


def _plain(config: DTAConfig, anywhere: bool = False) -> dict[str, Any]:
    """Return settings as YAML has them; a module stands as the name of its class.

    Args:
        config: The settings.
        anywhere: Let places on disk lead there from any folder.
    """
    values = {one.name: getattr(config, one.name) for one in fields(config)} | {"resume": False, "overwrite": False}

    def placed(name: str, one: Any) -> str:
        text = type(one).__name__ if isinstance(one, nn.Module) else str(one)
        return str(absolute(name, text)) if anywhere and not isinstance(one, nn.Module) else text

    values["data"] = placed("data", config.data)
    for name in ("encoder", "victim"):
        given = values[name]
        if isinstance(given, Mapping):
            values[name] = {str(key): placed("encoder", one) for key, one in given.items()}
        else:
            models = [given] if isinstance(given, nn.Module) else listed(given)
            values[name] = ",".join(placed("encoder", one) for one in models)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _layers(search: Any, names: list[str]) -> dict[str, Any]:
    """Return the layers that were chosen for each encoder, and the scores of all."""
    if search.per == "sample":
        return {"layers": "one for each image"}
    return {
        "layers": {name: list(layers) for name, layers in zip(names, search.layers, strict=True)},
        "layer_scores": {
            name: {str(layer): float(value) for layer, value in zip(one.layers, one.mean.tolist(), strict=True)}
            for name, one in zip(names, search.scores, strict=True)
        },
    }


def _write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    header = ["attack", "victim", "n", "n_right", *OF_A_ROW, "asr_low", "asr_high", "robust_low", "robust_high"]
    written = []
    for row in rows:
        ends = [*(row["asr_interval"] or ("", "")), *row["robust_interval"]]
        written.append([*("" if row[name] is None else row[name] for name in header[:9]), *ends])
    write_rows(path, header, written)


def _write_predictions(
    path: Path, subjects: Subjects, clean: dict[str, Tensor], said: dict[tuple[str, str], Tensor]
) -> None:
    """Write the class each victim names of each image, clean and under each attack."""
    attacks = list(dict.fromkeys(name for name, _ in said))
    written = []
    for victim in subjects.victims:
        columns = [
            victim.labels,
            *(one.argmax(1) for one in (clean[victim.name], *(said[n, victim.name] for n in attacks))),
        ]
        names = class_names(victim.model.model) or [str(number) for number in range(clean[victim.name].shape[1])]
        for key, *row in zip(subjects.keys, *(column.tolist() for column in columns), strict=True):
            written.append([key, victim.name, *(names[number] for number in row)])
    write_rows(path, ["image", "victim", "class", "clean", *attacks], written)


def _verdict(summary: dict[str, Any], doubts: list[dict[str, Any]]) -> str:
    rows = [row for row in summary["table"] if row["attack"] == "dta" and row["asr"] is not None]
    said = "; ".join(f"{row['victim']} loses {row['asr']:.0f} % of what it had right" for row in rows)
    if doubts:
        said += f". {len(doubts)} of {len(summary['checks'])} checks speak against these figures"
    return f"{said}." if said else ""


def _level(eps: float) -> str:
    level = eps * 255
    return f"{level:g}/255" if abs(level - round(level, 3)) < 1e-6 else f"{eps:g}"


def _command(config: DTAConfig) -> str:
    """Return the command that repeats the attacks."""
    words, plain, defaults = ["patchloom", "attack", "dta"], _plain(config), {}
    for one in fields(config):
        defaults[one.name] = list(one.default) if isinstance(one.default, tuple) else one.default
    for name, value in plain.items():
        given = _level(value) if name in ("eps", "step_size") else value
        if given != defaults[name]:
            shown = f"[{','.join(map(str, given))}]" if isinstance(given, list) else str(given)
            words += [f"--{name}", shown]
    return shlex.join(words)
