"""
What a study leaves: one JSON of summaries and evaluation curves, small enough to commit, and a picture.

  collect          the JSON's contents, from the runs that there are
  worth, runs_in   the runs that a JSON holds, and what of each, so that a poorer one does not take its place
  has_intervals    does a JSON hold intervals, which one made without scipy has not
  write_results    both files, and the table on the screen
"""
import json
import math
import platform
import re

from lib.config import load_config, meta_model, tokens_per_step
from lib.disk import write_whole
from study import evidence
from study.evidence import fit_scaling, judge, summarize, table, tuning_seeds
from study.runs import ROOT


def collect(study, scale, scale_name, losses, runs, command):
    """What the results' JSON holds: the study's names, summary and fits, and each run with its evaluation curve. losses {cell: loss},
    runs {cell: Run} of all that the plan needs."""
    records, made_by = [], []
    for cell, run in runs.items():
        if run.state not in ("done", "diverged"):
            continue
        record = dict(zip(("model", "row", "learning_rate", "seed"), cell), state="done" if math.isfinite(losses[cell]) else "diverged")
        if record["state"] == "done":
            summary = run.summary()
            record |= {key: summary[key] for key in ("val_loss", "steps", "tokens", "params", "scale_params")}
            record["seconds"] = round(summary["seconds"])
        record |= curves(run.folder / "log.jsonl", study.get("matrices"))
        records.append(record)
        made_by.append(run.made_by())
    def said(what):
        return sorted({m[what] for m in made_by if what in m})

    flops = {model: flops_of(spec) for model, spec in scale["models"].items()}
    models = {model: {**spec, "flops": flops[model]} for model, spec in scale["models"].items()}
    return {"study": study["name"], "title": study["title"], "question": study["question"], "scale": scale_name, "command": command,
            "devices": said("device"), "torch": said("torch"), "code": said("code"),
            "python": platform.python_version(), "picture": study["picture"], "panels": study.get("panels") or [list(study["rows"])],
            "rows": study["rows"], "seeds": list(scale["seeds"]), "tuning_seeds": list(tuning_seeds(scale)), "models": models,
            "missing": len(runs) - len(records), "rule": study.get("rule"), "results": summarize(study, scale, losses),
            "fit": fit_scaling(study, scale, losses, flops), "runs": records}


def flops_of(spec):
    """Floating-point operations of one run of a model."""
    config = load_config([str(ROOT / spec["config"]), *(f"--{k}={v}" for k, v in spec["keys"].items())])
    return meta_model(config).flops_per_token() * config.max_iters * tokens_per_step(config)


def curves(log, matrices):
    """{"curve": [[tokens, validation loss], ...]}, and of the matrices whose names start with `matrices` {"norms": {name: [[step, norm]]}}.
    A line that is no record is passed over, and so is a norm that was not finite; such a loss is None."""
    curve, norms = [], {}
    for line in log.read_text("utf-8", "replace").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
            if record["event"] == "eval":
                loss = record["val_loss"]
                curve.append([record["tokens"], None if loss is None else round(loss, 5)])
            elif record["event"] == "matrix" and matrices and record["name"].startswith(matrices) and record["norm"] is not None:
                norms.setdefault(record["name"], []).append([record["step"], round(record["norm"], 4)])
        except (ValueError, KeyError, TypeError):
            continue
    return {"curve": curve, **({"norms": norms} if norms else {})}


def as_text(results):
    """The results as JSON with one run a line, so that a commit shows which runs are new."""
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1, ensure_ascii=False)
    runs = ",\n".join(json.dumps(run, separators=(",", ":")) for run in results["runs"])
    return f'{head[:-2]},\n "runs": [\n{runs}\n]\n}}\n'


def worth(runs):
    """{(model, row, learning rate, seed): (is it done, its steps, the points of its curve)} of a JSON's runs."""
    return {(run["model"], run["row"], run["learning_rate"], run["seed"]): (run["state"] == "done", run.get("steps", 0), len(run["curve"]))
            for run in runs}


def runs_in(path):
    """The worth of the runs that a results JSON holds; empty if there is none. Raises ValueError, one line, on a file that is no study's
    results."""
    try:
        return worth(json.loads(path.read_text("utf-8"))["runs"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is not a study's results: move it away, or give another --results") from None


def has_intervals(path):
    """Does a results JSON hold t-intervals? It was made with scipy then."""
    return path.is_file() and re.search(r'"low": -?[0-9]', path.read_text("utf-8")) is not None


def write_results(results, path):
    """The JSON and, with matplotlib, a .png of the same name. Prints the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text(results))
    print(f"\n{results['title']}: {results['question']}\n\n{table(results)}\n")
    for found in results["results"].values() if results["rule"] else ():
        print(f"the rule: {results['rule']['says']}")
        for c in found["comparisons"]:
            print(f"  {c['row']} against {c['other']}: {judge(results['rule'], c)}")
    if results["missing"]:
        print(f"{results['missing']} runs or more are missing: the same command runs them")
    try:
        from study.pictures import draw
        draw(results, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png').name}")
    except ImportError:
        print(f"wrote {path}; the picture needs matplotlib: pip install matplotlib")
    if evidence.stats is None:
        print("the intervals need scipy: pip install scipy, and run the same command again")
