"""
What a study leaves: one JSON of summaries and evaluation curves, small enough to commit, and a
picture beside it.

  load_records     the runs that the results JSONs of a folder hold; they count as done
  collect          the contents of a study's JSON
  write_results    both files, and the table on the screen
"""
import json
import math
from dataclasses import asdict
from pathlib import Path

from lib.config import meta_model, tokens_per_step
from lib.count import flops_per_token
from lib.disk import write_whole
from studies.machinery.evidence import bootstrap, by_seed, fit_scaling, judge, summarize
from studies.machinery.plan import Cell, config_of
from studies.machinery.report import read_log
from studies.machinery.runs import digest, read_json
from studies.machinery.tables import table

NUMBERS = ("val_loss", "steps", "tokens", "params", "scale_params")  # of summary.json


def load_results(path):
    """The dict of a study's JSON, or of one without runs. Raises ValueError on anything else."""
    if not Path(path).is_file():
        return {"runs": []}
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        for run in results["runs"]:
            cell_of(run)
        return results
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not hold a study's results: move it away, or give another "
                         "--results") from None


def load_records(own):
    """{digest of settings: [run, ...]} of all studies' JSONs in the folder of `own`, whose runs
    come first."""
    records = {}
    for path in sorted(own.parent.glob("*.json"), key=lambda path: (path != own, path)):
        if '"study"' in path.read_text(encoding="utf-8", errors="replace")[:100]:
            for run in load_results(path)["runs"]:
                records.setdefault(run["settings"], []).append(run)
    return records


def cell_of(record):
    return Cell(record["model"], record["row"], record["learning_rate"], record["seed"],
                record.get("tuning", False))


def cells_before(path, study, find):
    """The cells of a study's earlier JSON. Raises ValueError if one is no run of the study as it is
    now, so that nothing is lost or mixed. find: cell -> Run."""
    records = load_results(path)["runs"]
    cells = [cell_of(record) for record in records]
    for cell, record in zip(cells, records):
        known = cell.model in study.models and cell.row in study.rows_of(cell.model)
        if not known or record["settings"] != digest(find(cell).settings):
            raise ValueError(f"the results of {study.name} hold a run of {cell.row!r} "
                             f"({cell.model}) with other settings: move them away, or give another "
                             "--results")
        if find(cell).data not in ("", record["data"]):
            raise ValueError(f"the results of {study.name} hold runs on other data than this "
                             "machine has (the standard library of another Python?): give another "
                             "--results")
    return cells


def losses_of(study, runs):
    """{cell: terminal validation loss, infinite if it diverged} of the runs that have ended. A
    study with `every_window` counts the loss on all windows; a run without it is left out."""
    losses = {}
    for cell, run in runs.items():
        if run.has_ended:
            loss = run.summary()["val_loss"] if run.state == "done" else None
            if loss is not None and study.every_window and study.counts(cell.seed):
                if not windows_of(run):
                    continue
                loss = windows_of(run)["loss"]
            losses[cell] = math.inf if loss is None else loss
    return losses


def windows_of(run):
    """What machinery/windows.py has found of a run; {} if nothing."""
    if run.record:
        return run.record.get("windows", {})
    return read_json(run.folder / "windows.json")


def record_of(cell, run, loss, study):
    """What the JSON holds of a run."""
    made_by = run.made_by()
    record = {**cell._asdict(), "state": "done" if math.isfinite(loss) else "diverged",
              "settings": digest(run.settings), "data": run.data,
              **{key: made_by[key] for key in ("device", "torch") if made_by.get(key)}}
    if not cell.tuning:
        del record["tuning"]
    if cell.row == "yours":
        record["code"] = run.code
    if run.record:
        of_run = {key: value for key, value in run.record.items() if key != "tuning"}
        return {**of_run, **record}
    if record["state"] == "done":
        summary = run.summary()
        record |= {key: summary[key] for key in NUMBERS}
        record["seconds"] = round(summary["seconds"])
        if study.every_window and windows_of(run):
            windows = windows_of(run)
            record["windows"] = {**windows, "losses": [round(x, 5) for x in windows["losses"]]}
    return record | curves(run.folder / "log.jsonl", study.matrices)


def collect(study, scale, runs, planned):
    """What the JSON of a study holds. runs {cell: Run}; planned: the cells that the study needs."""
    # what each run has found, and what the rows' differences are
    losses = losses_of(study, runs)
    records = [record_of(cell, runs[cell], loss, study) for cell, loss in losses.items()]
    flops = {name: flops_of(model) for name, model in study.models.items()}
    models = {name: {**asdict(model), "flops": flops[name]} for name, model in study.models.items()}
    found = summarize(study, losses)
    by_documents(study, records, found)

    # beside them the study itself, so that tables and pictures need nothing else
    of_study = {key: getattr(study, key) for key in (
        "title", "question", "picture", "panels", "rows", "seeds", "tuning_seeds", "rule", "costs",
        "paper_losses", "step_times", "primary")}
    return {"study": study.name, "scale": scale, **of_study, "models": models,
            "missing": len(set(planned) - losses.keys()), "results": found,
            "fits": fit_scaling(study, losses, found, flops), "runs": records}


def by_documents(study, records, found):
    """Add "documents", an interval over seeds and validation documents, to the primary comparisons
    at the rows' own rates."""
    for model, at in found.items():
        windows = {cell_of(r): r["windows"] for r in records if "windows" in r}
        for c in at["comparisons"]:
            own = c.get("own")
            if (c["row"], c["other"]) not in study.primary or not own or "diverged" in own:
                continue
            sides = [{s: w["losses"] for s, w in by_seed(
                windows, model, row, at["rows"][row]["own"]["learning_rate"]).items()
                if study.counts(s)} for row in (c["row"], c["other"])]
            if all(sides):
                tokens = next(iter(windows.values()))["tokens"]
                own["documents"] = bootstrap(*sides, tokens)


def flops_of(model):
    """Floating-point operations of one run of a model."""
    config = config_of(model.config, model.keys)
    return flops_per_token(meta_model(config)) * config.max_iters * tokens_per_step(config)


def curves(log, matrices):
    """{"curve": [[tokens, validation loss], ...]}, and for matrices = (start, branches) {"norms":
    {branch: [[step, norm], ...]}} of the matrices whose names start so and have such a part. A
    norm that was not finite is left out; such a loss is None."""
    events, norms = read_log(log), {}
    curve = [[r["tokens"], None if r["val_loss"] is None else round(r["val_loss"], 5)]
             for r in events.get("eval", ())]
    for r in events.get("matrix", ()) if matrices else ():
        branch = set(r["name"].split(".")) & set(matrices[1])
        if branch and r["name"].startswith(matrices[0]) and r["norm"] is not None:
            norms.setdefault(branch.pop(), []).append([r["step"], round(r["norm"], 4)])
    return {"curve": curve, **({"norms": norms} if norms else {})}


def as_text(results):
    """The results as JSON with one run a line, so that a commit shows which runs are new."""
    head = {key: value for key, value in results.items() if key != "runs"}
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    runs = ",\n".join(json.dumps(r, separators=(",", ":"), ensure_ascii=False)
                      for r in results["runs"])
    return f'{text},\n "runs": [\n{runs}\n]\n}}\n'


def write_results(results, path):
    """The JSON and, with matplotlib, a .png of the same name. Prints the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_text(results))
    shown = table(results).replace("\\*", "*")  # as a screen has it
    print(f"\n{results['title']}: {results['question']}\n\n{shown}\n")
    for found in results["results"].values() if results["rule"] else ():
        print(f"the rule: {results['rule']['says']}")
        for c in found["comparisons"]:
            print(f"  {c['row']} against {c['other']}: {judge(results['rule'], c)}")
    try:
        from studies.machinery.pictures import draw
    except ImportError:
        print(f"wrote {path}; the picture needs matplotlib: pip install matplotlib")
        return
    draw(results, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png').name}")
