"""
Proves that a study's statistics are scipy's and the formula's, that its fits find what a synthetic law has, that it runs what is missing
and nothing else, loses no run, survives an interruption and a diverging row, and that every number in docs and README is the results'.
"""
import json
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from lib.config import load_config
from study import evidence
from study.evidence import best_rate, bootstrap, compute_multiplier, fill, paired, power_law, quote, summarize, table, verdict
from study.results import curves
from study.run import load_study, losses_of, main, only, plan, write_docs, yours
from study.runs import Pool, RunFolders, code, gpu_for, settings_of

STUDIES = sorted(p for p in (ROOT / "studies").glob("*.py") if p.stem != "common")
RESULTS = sorted((ROOT / "results").glob("*_*.json"))
RESULTS = [p for p in RESULTS if '"study"' in p.read_text()[:100]]


# ---------------------------------------------------------------------------------------------------------------------
# statistics

def test_paired_is_scipys_interval():
    stats = pytest.importorskip("scipy.stats")
    rng = random.Random(0)
    a, b = ({s: rng.gauss(1.5, 0.1) for s in range(6)} for _ in range(2))
    found = paired(a, {**b, 17: 3.0})  # a seed that only one side has does not count
    differences = [a[s] - b[s] for s in a]
    expected = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert found["seeds"] == 6 and found["difference"] == pytest.approx(statistics.mean(differences))
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    three = paired({1: 0.1, 2: 0.2, 3: 0.6}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert three["high"] - three["difference"] == pytest.approx(4.30265 * statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3), rel=1e-5)


def test_paired_without_pairs(monkeypatch):
    assert paired({1: 1.0}, {2: 1.0}) is None
    assert paired({1: math.inf, 2: 1.0}, {1: 1.0, 2: 1.0}) == {"difference": None, "low": None, "high": None, "seeds": 2, "diverged": 1}
    assert paired({1: 1.0}, {1: 1.5}) == {"difference": -0.5, "low": None, "high": None, "seeds": 1}
    monkeypatch.setattr(evidence, "stats", None)  # no scipy: the mean without an interval
    assert paired({1: 1.0, 2: 2.0}, {1: 0.0, 2: 0.0}) == {"difference": 1.5, "low": None, "high": None, "seeds": 2}


def test_best_rate():
    losses = {("m", "r", 1e-3, 1): 2.0, ("m", "r", 2e-3, 1): 1.0, ("m", "r", 4e-3, 1): math.inf, ("m", "r", 1e-3, 2): 0.1}
    assert best_rate(losses, "m", "r", (1e-3, 2e-3, 4e-3), (1,)) == 2e-3
    assert best_rate(losses, "m", "r", (1e-3, 2e-3), (1, 2)) is None  # seed 2 is not there for both
    assert best_rate(losses, "m", "other", (1e-3,), (1,)) is None


@pytest.mark.parametrize("paper, low, high, says", [(-0.03, -0.04, -0.01, "agrees"), (0.03, -0.04, -0.01, "differs"),
                                                   (0.03, 0.01, 0.02, "agrees"), (-0.03, -0.02, 0.01, "cannot tell")])
def test_verdict(paper, low, high, says):
    assert verdict(paper, {"difference": (low + high) / 2, "low": low, "high": high, "seeds": 3}) == says
    assert verdict(paper, None) == "cannot tell"


def test_power_law_and_multiplier():
    stats, compute = pytest.importorskip("scipy.stats"), [1e15, 1e16, 1e17, 1e18]
    noisy = [7.1, 6.0, 5.5, 4.6]
    line = stats.linregress([math.log(c) for c in compute], [math.log(l) for l in noisy])
    assert power_law(compute, noisy) == pytest.approx((math.exp(line.intercept), -line.slope))
    law = power_law(compute, [7.0 * c ** -0.05 for c in compute])
    assert law == pytest.approx((7.0, 0.05))
    # the improved curve is the baseline's with 1.25 times the compute, so the multiplier is 1.25 everywhere
    improved = power_law(compute, [7.0 * (1.25 * c) ** -0.05 for c in compute])
    assert compute_multiplier(law, improved, 1e16) == pytest.approx(1.25) == compute_multiplier(law, improved, 1e18)
    more = compute_multiplier((7.0, 0.05), (8.0, 0.06), 1e16)  # by the definition: the baseline's loss with `more` times the compute
    assert 7.0 * (more * 1e16) ** -0.05 == pytest.approx(8.0 * 1e16 ** -0.06)


def test_bootstrap_covers_the_truth():
    rng, compute, covered = random.Random(0), [1e15, 1e16, 1e17, 1e18], 0
    for trial in range(20):
        noise = [{s: rng.gauss(0, 2e-3) for s in range(8)} for _ in compute]
        baseline = [{s: 7 * c ** -0.05 + n for s, n in d.items()} for c, d in zip(compute, noise)]
        improved = [{s: 7 * (1.25 * c) ** -0.05 + n + rng.gauss(0, 1e-3) for s, n in d.items()} for c, d in zip(compute, noise)]
        fit = bootstrap(compute, baseline, improved, seed=trial)
        covered += fit["low"] <= 1.25 <= fit["high"]
        assert fit["low"] < fit["multiplier"] < fit["high"]
    assert covered >= 13  # of 20; a percentile interval of eight seeds covers somewhat less than 95%
    one = bootstrap(compute, [{1: d[0]} for d in baseline], [{1: d[0]} for d in improved])
    assert one["low"] is None and one["multiplier"] > 1


# ---------------------------------------------------------------------------------------------------------------------
# the plan

STUDY = {"rows": {"a": {}, "b": {"scale_vectors": False}}, "comparisons": {("b", "a"): {"0.12B": 0.1}}}
SCALE = {"seeds": (1, 2), "models": {"m": {"config": "configs/study_cpu.py", "keys": {}, "learning_rates": (1e-3, 2e-3)}}}


def test_plan_grows_with_what_is_known():
    losses = {}
    assert plan(STUDY, SCALE, losses) == [("m", "a", 1e-3, 1), ("m", "a", 2e-3, 1)]  # tune the first row, on the first seed
    losses |= {("m", "a", 1e-3, 1): 2.0, ("m", "a", 2e-3, 1): 1.0}
    papers = plan(STUDY, SCALE, losses, "paper")
    assert papers[2:] == [("m", "b", 2e-3, 1), ("m", "a", 2e-3, 2), ("m", "b", 2e-3, 2)]  # then all rows at its best rate
    assert plan(STUDY, SCALE, losses)[len(papers):] == [("m", "b", 1e-3, 1)]  # then the other rows' grids
    losses |= {("m", "b", 1e-3, 1): 1.0, ("m", "b", 2e-3, 1): 3.0}
    assert plan(STUDY, SCALE, losses)[-1] == ("m", "b", 1e-3, 2)  # and each at its own best rate


def test_summary_by_both_protocols():
    losses = {("m", row, rate, seed): {"a": {1e-3: 2.0, 2e-3: 1.0}, "b": {1e-3: 1.5, 2e-3: 3.0}}[row][rate] + seed / 10
              for row in "ab" for rate in (1e-3, 2e-3) for seed in (1, 2)}
    found = summarize(STUDY, SCALE, losses)["m"]
    assert found["tuned_rate"] == 2e-3 and found["rows"]["b"]["own"]["learning_rate"] == 1e-3
    assert found["rows"]["a"]["tuned"]["loss"] == pytest.approx(1.15)
    comparison, = found["comparisons"]
    assert comparison["tuned"]["difference"] == pytest.approx(2.0) and comparison["own"]["difference"] == pytest.approx(0.5)
    losses["m", "b", 2e-3, 2] = math.inf
    found = summarize(STUDY, SCALE, losses)["m"]
    assert found["rows"]["b"]["tuned"] == {"learning_rate": 2e-3, "loss": None, "seeds": 2, "diverged": 1}
    assert found["comparisons"][0]["tuned"]["difference"] is None
    text = table({"results": {"m": found}, "models": {"m": {"learning_rates": [1e-3, 2e-3]}}})
    assert "| m | b | diverged (1 of 2) at 0.002 \\* | 2 |" in text and "| b | a | diverged (1 of 2 seeds) |" in text
    assert "\\* an end of its grid" in text
    assert "1.1500 at 0.002 | 2 |" in table({"results": {"m": found}, "models": {"m": {"learning_rates": [5e-4, 1e-3, 2e-3, 4e-3]}}})


def test_only_some_rows_and_seeds():
    study = load_study(ROOT / "studies" / "figure_5_step_by_step.py", "cpu")
    cut, scale = only(study, "cpu", ["HG + DP"], (7,))
    assert list(cut["rows"]) == ["baseline", "HG", "HG + DP"] and scale["seeds"] == (7,)
    assert ("HG + DP", "HG") in cut["comparisons"] and all({r, o} <= set(cut["rows"]) for r, o in cut["comparisons"])
    with pytest.raises(ValueError, match="no row 'nothing'"):
        only(study, "cpu", ["nothing"], None)


@pytest.mark.parametrize("name, row", [("figure_1_necessity", "baseline without decay on γ"), ("figure_6_dense_scaling", "baseline"),
                                       ("figure_3_decay_by_role", "decay Input-Norms only")])
def test_one_row_of_a_study_can_be_evaluated(name, row, tmp_path):
    """Models that run some rows only, and a fit that needs two."""
    places = [f"--out={tmp_path}/runs", f"--results={tmp_path}/results"]
    assert main([str(ROOT / "studies" / f"{name}.py"), f"--rows={row}", *places, "--evaluate"]) == 0
    results = json.loads((tmp_path / "results" / f"{name}_cpu.json").read_text())
    assert row in results["rows"] and results["fit"] is None
    assert results["command"] == f"python -m study.run studies/{name}.py --scale=cpu {shlex.quote(f'--rows={row}')}"


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_is_sound(path, tmp_path):
    """Every row at every scale is a configuration that train.py takes, and no two rows of a study are one run."""
    scales = load_study(path, "cpu").get("scales", {})
    for name, scale in scales.items():
        study, folders = load_study(path, name), RunFolders(tmp_path / name)
        for spec in scale["models"].values():
            rows = list(spec.get("rows", study["rows"]))
            runs = [folders.find(row, spec["config"], {"max_iters": 10 ** 4, **spec["keys"], **study["rows"][row]}) for row in rows]
            assert len({run.folder for run in runs}) == len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# run folders

def write_run(folder, arguments, val_loss=1.5, finished=True, **stored):
    """What train.py leaves, without training."""
    folder.mkdir(parents=True)
    settings = {**settings_of(load_config([str(ROOT / arguments[0]), *arguments[1:]])), "out_dir": str(folder), **stored}
    (folder / "config.json").write_text(json.dumps(settings))
    if finished:
        summary = {"val_loss": val_loss, "steps": 1, "tokens": 8, "params": 9, "scale_params": 1, "seconds": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))


def test_a_run_is_known_by_its_settings(tmp_path):
    config, keys = "configs/study_cpu.py", {"seed": 3, "learning_rate": 0.002}
    write_run(tmp_path / "old name", [config, "--seed=3", "--learning_rate=2e-3"], a_key_of_the_past=1)
    stored = json.loads((tmp_path / "old name" / "config.json").read_text())
    del stored["recompute"]  # as if the key had come later
    (tmp_path / "old name" / "config.json").write_text(json.dumps(stored))
    folders = RunFolders(tmp_path)
    found = folders.find("any label", config, keys)
    assert found.folder.name == "old name" and found.state == "done"
    assert folders.find("x", config, {**keys, "checkpoint_interval": 7, "n_kv_head": 4}).folder == found.folder  # changes nothing
    other = folders.find("x", config, {**keys, "n_kv_head": 2})
    assert other.state == "missing" and other.folder != found.folder


def test_a_run_continued_to_more_steps_is_not_replaced(tmp_path):
    config, keys = "configs/study_cpu.py", {"seed": 1, "learning_rate": 0.004}
    wanted = RunFolders(tmp_path).find("baseline", config, keys)
    write_run(wanted.folder, [config, "--seed=1", "--learning_rate=0.004", "--max_iters=9999"])
    again = RunFolders(tmp_path).find("baseline", config, keys)
    assert again.state == "missing" and again.folder != wanted.folder
    Path(f"{wanted.folder}-2").mkdir()  # something else of that name
    assert RunFolders(tmp_path).find("baseline", config, keys).folder.name == f"{wanted.folder.name}-3"


def test_two_tools_at_once_do_not_take_each_others_runs(tmp_path):
    """Each claimed its folders when it started, and neither knows of the other."""
    tools = RunFolders(tmp_path), RunFolders(tmp_path)
    keys = {"seed": 1, "learning_rate": 0.004}
    one = tools[0].find("baseline", "configs/study_cpu.py", keys)
    other = tools[1].find("baseline", "configs/study_cpu.py", {**keys, "schedule": "wsd"})
    write_run(one.folder, one.arguments)
    assert one.state == "done" and other.state == "missing"
    assert tools[1].find("baseline", "configs/study_cpu.py", keys).state == "done"  # the very same run is shared


def test_of_two_copies_of_a_run_the_finished_one_counts(tmp_path):
    arguments = ["configs/study_cpu.py", "--seed=1"]
    for name, finished in (("a", True), ("b", False)):
        write_run(tmp_path / name, arguments, finished=finished)
    assert RunFolders(tmp_path).find("x", "configs/study_cpu.py", {"seed": 1}).folder.name == "a"


def test_a_damaged_summary_names_its_file(tmp_path):
    write_run(tmp_path / "a", ["configs/study_cpu.py"])
    for text in ("", "{}", "3", "[]"):
        (tmp_path / "a" / "summary.json").write_text(text)
        with pytest.raises(ValueError, match="a/summary.json is not what train.py leaves"):
            RunFolders(tmp_path).find("x", "configs/study_cpu.py", {}).summary()


def test_only_what_this_start_said_counts(tmp_path):
    """An error of an earlier start, still in output.txt, is not this one's."""
    write_run(tmp_path / "a", ["configs/study_cpu.py"], finished=False)
    run = RunFolders(tmp_path).find("x", "configs/study_cpu.py", {})
    old = "error: 3 steps in a row up to step 9 were not finite\n"
    (run.folder / "output.txt").write_text(old + "error: out of memory\n")
    assert Pool.outcome(run, 1, before=len(old)) == ("failed", "out of memory") and run.state == "interrupted"
    assert Pool.outcome(run, 1)[0] == "failed"
    (run.folder / "output.txt").write_text(old)
    assert Pool.outcome(run, 1)[0] == "diverged" and run.state == "diverged"


@pytest.mark.parametrize("visible, gpus", [("", ["0", "1", "0"]), ("4,5", ["4", "5", "4"]), ("GPU-a", ["GPU-a"] * 3)])
def test_each_run_gets_a_gpu_of_its_own(visible, gpus):
    assert [gpu_for(slot, 2, visible) for slot in range(3)] == gpus


def test_studies_share_runs(tmp_path):
    a, b = (load_study(ROOT / "studies" / f"{name}.py", "cpu") for name in ("figure_5_step_by_step", "figure_1_necessity"))
    folders = RunFolders(tmp_path)
    runs = [losses_of(folders, s, s["scales"]["cpu"])[1] for s in (a, b)]
    assert {r.folder for r in runs[0].values()} == {r.folder for r in runs[1].values()}


def test_curves_pass_over_lines_that_are_no_record(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('3\n{"event":"eval"}\n[]\n'
                   '{"event":"eval","step":0,"tokens":0,"val_loss":5.5}\n{"event":"matrix","step":0,"name":"layers.0.q","norm":2.0}\n{"event":"ev')
    assert curves(log, None) == {"curve": [[0, 5.5]]}
    assert curves(log, "layers.0") == {"curve": [[0, 5.5]], "norms": {"layers.0.q": [[0, 2.0]]}}


# ---------------------------------------------------------------------------------------------------------------------
# running, in processes of their own

def study_command(*args):
    return [sys.executable, "-m", "study.run", *map(str, args)]


def spawn(command, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


def test_smoke_interrupted_and_resumed(tmp_path):
    """From another folder; Ctrl-C while runs are under way, then the same command: what was finished stays, the rest is resumed."""
    command = study_command(ROOT / "studies" / "smoke.py", f"--out={tmp_path}/runs", f"--results={tmp_path}/results", "--jobs=2")
    first = spawn(command, tmp_path)
    while not list(tmp_path.glob("runs/*/summary.json")):  # at least one run has finished
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 130 and len(err.splitlines()) == 1 and "the same command resumes them" in err
    assert not list(tmp_path.glob("results/*"))
    done = [p.parent for p in tmp_path.glob("runs/*/summary.json")]
    assert 1 <= len(done) < 4
    before = {folder: snapshot(folder) for folder in done}

    second = spawn(command, tmp_path)
    out, err = second.communicate(timeout=600)
    assert second.returncode == 0, out + err
    assert all(snapshot(folder) == files for folder, files in before.items())
    results = json.loads((tmp_path / "results" / "smoke_cpu.json").read_text())
    assert len(results["runs"]) == 4 and results["missing"] == 0 and results["torch"] and results["devices"]
    assert [len(run["curve"]) for run in results["runs"]] == [4] * 4  # steps 0, 20, 40, 60, each once
    losses = {(r["row"], r["seed"]): r["val_loss"] for r in results["runs"]}
    mean = statistics.mean(losses["unified", s] - losses["baseline", s] for s in (1, 2))
    assert results["results"]["tiny"]["comparisons"][0]["tuned"]["difference"] == pytest.approx(mean)
    assert evidence.signed(mean) in out

    everything = snapshot(tmp_path / "runs")
    third = spawn(command, tmp_path)  # nothing is left to do
    assert third.wait(timeout=600) == 0 and snapshot(tmp_path / "runs") == everything


def test_a_diverging_row_is_reported_and_not_repeated(tmp_path, capsys):
    study = tmp_path / "wild.py"
    study.write_text((ROOT / "studies" / "smoke.py").read_text() + '\nrows = {"baseline": {}, "wild": {"init_std": 1e30}}\n'
                     'comparisons = {("wild", "baseline"): {}}\nscales["cpu"]["seeds"] = (1,)\n')
    arguments = [str(study), f"--out={tmp_path}/runs", f"--results={tmp_path}/results"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "diverged: 10 steps in a row" in said and "| tiny | wild | diverged (1 of 1)" in said
    before = snapshot(tmp_path / "runs")
    assert main(arguments) == 0 and snapshot(tmp_path / "runs") == before
    assert json.loads((tmp_path / "results" / "wild_cpu.json").read_text())["runs"][1]["state"] == "diverged"


def test_a_loss_that_is_not_finite_counts_as_diverged(tmp_path, capsys):
    path, config = tmp_path / "wild.py", ["configs/study_cpu.py", "--seed=1", "--learning_rate=0.004"]
    path.write_text('title = question = "?"\nrows = {"baseline": {}, "wild": {"init_std": 9.0}}\ncomparisons = {("wild", "baseline"): {}}\n'
                    'from studies.common import CPU_MODEL\nmatrices = "layers"\n'
                    'scales = {"cpu": {"seeds": (1,), "models": {"m": {**CPU_MODEL, "learning_rates": (4e-3,)}}}}\n')
    write_run(tmp_path / "runs" / "a", config)
    write_run(tmp_path / "runs" / "b", [*config, "--init_std=9"], val_loss=None)
    for run, log in ("a", {"val_loss": 1.5}), ("b", {"val_loss": None}):
        records = [{"event": "eval", "tokens": 0, "val_loss": None}, {"event": "eval", "tokens": 8, **log},
                   {"event": "matrix", "step": 0, "name": "layers.0.q", "norm": 1.0},
                   {"event": "matrix", "step": 1, "name": "layers.0.q", "norm": None}]
        (tmp_path / "runs" / run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert main([str(path), f"--out={tmp_path}/runs", f"--results={tmp_path}/results"]) == 0
    assert "| m | wild | diverged (1 of 1)" in capsys.readouterr().out
    a, b = json.loads((tmp_path / "results" / "wild_cpu.json").read_text())["runs"]
    assert a["curve"] == [[0, None], [8, 1.5]] and a["norms"] == {"layers.0.q": [[0, 1.0]]}
    assert b["state"] == "diverged" and "val_loss" not in b
    wild = RunFolders(tmp_path / "runs").find("wild", "configs/study_cpu.py", {"init_std": 9.0, "learning_rate": 0.004, "seed": 1})
    assert Pool.outcome(wild, 0) == ("done", "validation loss not finite")
    pytest.importorskip("matplotlib", reason="the picture needs the optional package matplotlib")
    from study.pictures import curves_of
    assert curves_of({"runs": [a, b]}, "m", "baseline", 0.004) == {1: {8: 1.5}}


def test_an_error_stops_the_runs_under_way(tmp_path, monkeypatch, capsys):
    children = []

    def fail(study, scale, folders, pool, protocol):
        children.append(subprocess.Popen(["sleep", "600"]))
        pool.children[children[0]] = (None, 0, 0.0)
        raise ValueError("no space")

    monkeypatch.setattr("study.run.execute", fail)
    try:
        assert main([str(ROOT / "studies" / "smoke.py"), f"--out={tmp_path}"]) == 1
        assert children[0].poll() is not None and "error: no space" in capsys.readouterr().err
    finally:
        children[0].kill()


def test_a_part_can_be_evaluated_and_lines_printed(tmp_path, capsys):
    write_run(tmp_path / "runs" / "one", ["configs/study_cpu.py", "--seed=1", "--learning_rate=0.004"], 1.25)
    arguments = [str(ROOT / "studies" / "figure_1_necessity.py"), f"--out={tmp_path}/runs", f"--results={tmp_path}/results"]
    for stamp, told in ((code(), False), ("of other code", True)):
        (tmp_path / "runs" / "one" / "made_by.json").write_text(json.dumps({"code": stamp}))
        assert main([*arguments, "--evaluate"]) == 0
        said = capsys.readouterr().out
        assert "2 runs or more are missing" in said and ("made before norms.py" in said) == told
    results = json.loads((tmp_path / "results" / "figure_1_necessity_cpu.json").read_text())
    assert results["runs"][0]["val_loss"] == 1.25 and results["results"]["0.23M"]["tuned_rate"] is None
    assert main([*arguments, "--print"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    assert lines[1] == f"python train.py configs/study_cpu.py --learning_rate=0.004 --seed=1 --out_dir={tmp_path}/runs/one"


def test_results_that_hold_other_runs_are_kept(tmp_path, capsys, monkeypatch):
    """A look at one seed must not take the place of a whole study's results; what is no study's results is left alone, too."""
    arguments = [str(ROOT / "studies" / "figure_1_necessity.py"), f"--out={tmp_path}/runs", f"--results={tmp_path}", "--evaluate"]
    write_run(tmp_path / "runs" / "one", ["configs/study_cpu.py", "--seed=1", "--learning_rate=0.004"], 1.25)
    path, look = tmp_path / "figure_1_necessity_cpu.json", tmp_path / "runs" / "figure_1_necessity_cpu.json"
    run = {"model": "0.23M", "row": "baseline", "learning_rate": 0.004, "seed": 1, "state": "done", "steps": 1, "curve": []}
    more = json.dumps({"runs": [{**run, "seed": 2}]})  # not more in number, but another
    path.write_text(more)
    assert main(arguments) == 0 and "holds runs that these lack (1), or more of them, and stays as it is" in capsys.readouterr().out
    assert path.read_text() == more and len(json.loads(look.read_text())["runs"]) == 1
    path.write_text(json.dumps({"runs": [run]}))
    if evidence.stats:
        assert main(arguments) == 0 and path.read_text() == look.read_text()
    for richer in ({"steps": 10 ** 6}, {"curve": [[0, 1.0]] * 99}):  # the same run, and more of it
        path.write_text(json.dumps({"runs": [{**run, **richer}]}))
        assert main(arguments) == 0 and path.read_text() == json.dumps({"runs": [{**run, **richer}]})
    beside = [a if not a.startswith("--results") else f"--results={tmp_path}/runs" for a in arguments]  # beside the runs is the same folder
    look.write_text(more)
    assert main(beside) == 0 and look.read_text() == more and (tmp_path / "runs" / "part_of_figure_1_necessity_cpu.json").is_file()
    monkeypatch.setattr(evidence, "stats", None)  # no scipy: a table without intervals
    path.write_text(json.dumps({"low": -0.1, "runs": [run]}))
    assert main(arguments) == 0 and path.read_text() == json.dumps({"low": -0.1, "runs": [run]})
    path.write_text("[]")
    assert main(arguments) == 1 and path.read_text() == "[]"
    assert f"error: {path} is not a study's results" in capsys.readouterr().err


def test_printed_lines_are_all_runs_and_each_has_its_folder(tmp_path, capsys):
    """Of two models and two rows that would be named alike; before any run, and after the first row's grid."""
    path = tmp_path / "study.py"
    path.write_text('title = question = "?"\nrows = {"a b": {}, "a-b": {"scale_vectors": False}}\nfrom studies.common import CPU_MODEL\n'
                    'models = {m: {**CPU_MODEL, "learning_rates": (1e-3, 2e-3), "keys": {"n_layer": n}} '
                    'for m, n in (("one", 1), ("two", 2))}\n'
                    'scales = {"cpu": {"seeds": (1, 2), "models": models}}\n')
    arguments = [str(path), f"--out={tmp_path}/runs", "--protocol=paper", "--print"]

    def printed():
        assert main(arguments) == 0
        lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
        assert len({line[-1] for line in lines}) == len(lines) and all(line[-1].startswith("--out_dir=") for line in lines)
        return lines

    lines = printed()
    assert len(lines) == 2 * (2 + 3) and sum("--learning_rate=BEST" in line for line in lines) == 2 * 3
    for line in lines:
        load_config([str(ROOT / line[2]), *(a.replace("BEST", "0.002") for a in line[3:])])
        if "--learning_rate=BEST" not in line:
            write_run(Path(line[-1].removeprefix("--out_dir=")), line[2:-1], 1.0 if "--learning_rate=0.002" in line else 2.0)
    after = printed()
    assert len(after) == 2 * (2 + 3) and sum("--learning_rate=0.002" in line for line in after) == 2 * 4


def test_a_wrong_value_in_a_later_row_stops_the_study_before_its_first_run(tmp_path, capsys):
    path = tmp_path / "study.py"
    path.write_text((ROOT / "studies" / "smoke.py").read_text() + "rows['unified'] = {'scale_placement': 'nowhere'}\n")
    assert main([str(path), f"--out={tmp_path}/runs"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: row 'unified': ") and "nowhere" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_track_takes_a_config_and_keys(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("# my title: better\nscale_placement = 'dual'\nout_dir = 'out/mine'\n")
    track = ROOT / "studies" / "track.py"
    path, extra = yours([str(track), str(mine)], ["--scale_lr=3"])
    assert path == str(track) and extra == {"scale_placement": "dual", "scale_lr": 3}
    study = load_study(track, "cpu", extra)
    assert study["rows"]["yours"] == extra and ("yours", "unified") in study["comparisons"]
    assert study["name"].startswith("track_scale_placement_dual_scale_lr_3_")  # each idea has results of its own, also if two begin alike:
    long = {"scale_heterogeneous": True, "scale_placement": "dual_norm", "scale_weight_decay": "input_norm"}
    assert len({load_study(track, "cpu", {**long, "scale_reparam": r})["name"] for r in ("original", "exponential")}) == 2
    mine.write_text("learning_rate = 9e-3")
    with pytest.raises(ValueError, match="mine.py sets learning_rate, which is the study's"):
        yours([str(track), str(mine)], [])
    with pytest.raises(ValueError, match="has no row of yours"):
        load_study(ROOT / "studies" / "smoke.py", "cpu", extra)


def test_the_tracks_rule():
    rule = load_study(ROOT / "studies" / "track.py", "cpu")["rule"]
    for low, difference, high, better in ((-0.03, -0.02, -0.01, True), (-0.03, -0.01, 0.001, False), (-0.005, -0.004, -0.003, False)):
        found = {"difference": difference, "low": low, "high": high, "seeds": 5}
        assert evidence.judge(rule, {"own": found}) == ("better" if better else "does not count as better")
        assert evidence.judge(rule, {"own": {**found, "seeds": 4}}) == "not run with 5 seeds yet"
    assert evidence.judge(rule, {"own": None}) == "not run with 5 seeds yet"
    assert evidence.judge(rule, {"own": paired({s: math.inf for s in range(5)}, {s: 1.0 for s in range(5)})}) == "does not count as better"


@pytest.mark.parametrize("arguments, says", [
    (["studies/nothing.py"], "study not found"), (["{smoke}", "--scale=huge"], "no scale 'huge'"),
    (["{smoke}", "--lerning_rate=1"], "unknown key"), (["{smoke}", "--rows=x"], "no row 'x'"),
    (["{smoke}", "--seed=1"], "seed is the study's"),
    (["{smoke}", "--overwrite"], "unknown key 'overwrite'")])
def test_errors_are_one_line(arguments, says, capsys):
    assert main([a.format(smoke=ROOT / "studies" / "smoke.py") for a in arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("line, says", [
    ("rows = []", "rows must be"), ("rows = {}", "rows must be"), ("rows = {'a': 1}", "rows must be"), ("scales = 1", "scales must be"),
    ("scales = {'cpu': {}}", "needs 'seeds'"), ("scales['cpu']['seeds'] = ()", "needs 'seeds'"),
    ("scales['cpu']['models'] = {}", "needs 'models'"),
    ("del scales['cpu']['models']['tiny']['keys']", "model 'tiny' needs 'keys'"),
    ("del scales['cpu']['models']['tiny']['config']", "model 'tiny' needs 'config'"),
    ("scales['cpu']['models']['tiny']['learning_rates'] = ()", "needs 'learning_rates'"),
    ("scales['cpu']['models']['tiny']['rows'] = ('x',)", "names no row, or one that the study does not have"),
    ("scales['cpu']['models']['tiny']['rows'] = ()", "names no row"), ("scales['cpu']['rows'] = {'baseline': 1}", "'rows' must be"),
    ("rows = {'a, b': {}}", "without a comma"), ("rows = {1: {}}", "without a comma"), ("panels = [[]]", "panels must be"),
    ("title = 1", "must be strings"), ("scales['cpu']['tuning_seeds'] = 0", "tuning_seeds"),
    ("scales['cpu']['models']['tiny']['learning_rates'] = ('2e-3',)", "needs 'learning_rates'"),
    ("panels = 3", "panels must be"), ("comparisons = [1]", "comparisons must be"),
    ("comparisons = {('unified', 'baseline'): None}", "comparisons must be")])
def test_a_malformed_study_is_one_line(line, says, tmp_path):
    path = tmp_path / "study.py"
    path.write_text((ROOT / "studies" / "smoke.py").read_text() + line)
    with pytest.raises(ValueError, match="see studies/common.py") as error:
        load_study(path, "cpu")
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line, says", [("import sys; sys.exit(0)", "does not run: SystemExit"),
                                        ("raise OSError('two\\nlines')", "does not run: OSError: two"),
                                        ("rows['unified'] = {'min_lr': 5e-3}", "row 'unified': min_lr=0.005"),
                                        ("rows['unified'] = {'dataset': 'data/nope'}", "no dataset at data/nope")])
def test_what_would_fail_later_fails_first(line, says, tmp_path, capsys):
    path = tmp_path / "study.py"
    path.write_text((ROOT / "studies" / "smoke.py").read_text() + "\n" + line)
    assert main([str(path), f"--out={tmp_path}/runs", f"--results={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_seeds_are_whole_numbers(capsys):
    with pytest.raises(SystemExit):
        main(["studies/smoke.py", "--seeds=a"])
    assert "'a' is no list of whole numbers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# committed results

@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_summaries_follow_from_their_runs(path):
    pytest.importorskip("scipy")
    results = json.loads(path.read_text())
    losses = {tuple(r[k] for k in ("model", "row", "learning_rate", "seed")): r.get("val_loss", math.inf) for r in results["runs"]}
    comparisons = {(c["row"], c["other"]): c["paper"] for found in results["results"].values() for c in found["comparisons"]}
    study = {"rows": results["rows"], "comparisons": comparisons}
    scale = {"models": results["models"], "seeds": results["seeds"], "tuning_seeds": len(results["tuning_seeds"])}
    again = summarize(study, scale, losses)
    assert close(json.loads(json.dumps(again)), results["results"])


def close(a, b):
    """Equal, floats to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, abs=1e-9) if isinstance(a, float) else a == b


def test_docs_and_readme_hold_the_results_numbers():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        assert fill(text) == text, f"{path.name}: run `python -m study.run --docs`"


def test_fill_writes_numbers_between_markers(tmp_path):
    pytest.importorskip("scipy", reason="intervals need the optional package scipy")
    losses = {("m", row, 1e-3, seed): {"a": 2.0, "b": 1.5}[row] + seed / 100 * (row == "b") for row in "ab" for seed in (1, 2)}
    scale = {"seeds": (1, 2), "models": {"m": {"learning_rates": (1e-3,)}}}
    results = {"study": "s", "rows": STUDY["rows"], "models": scale["models"], "results": summarize(STUDY, scale, losses), "fit": None}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "s_cpu.json").write_text(json.dumps(results))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- study s_cpu a: loss -->9<!-- end --> and <!-- study none_cpu table -->\nx\n<!-- end -->.")
    (tmp_path / "docs" / "a.md").write_text("by <!-- study s_cpu b against a: difference --><!-- end -->\n"
                                            "<!-- study s_cpu table --><!-- end -->")
    assert len(write_docs(tmp_path)) == 2 and write_docs(tmp_path) == []
    assert "-->2.0000<!-- end -->" in (tmp_path / "README.md").read_text() and "not run yet" in (tmp_path / "README.md").read_text()
    written = (tmp_path / "docs" / "a.md").read_text()
    assert "−0.4850 [−0.5485, −0.4215]<!-- end -->" in written and "| m | b | a | −0.4850" in written
    assert quote(results, "b against a: verdict") == "differs" and quote(results, "multiplier") == "not run yet"
    results["runs"] = [{"model": "m", "row": row, "learning_rate": 0.5, "seed": 1, "state": "done", "val_loss": loss}
                       for row, loss in (("a", 2.0), ("b", 1.75))]
    assert quote(results, "b against a at 0.5: difference") == "−0.2500" and quote(results, "b against a at 1: difference") == "not run yet"
    with pytest.raises(ValueError, match="s has no 'c: loss'"):
        quote(results, "c: loss")


@pytest.mark.parametrize("text", ["{}", "[]", "x"])
def test_damaged_results_are_one_line(text, tmp_path):
    (tmp_path / "s_cpu.json").write_text(text)
    for what in ("table", "a: loss", "multiplier"):
        if (text, what) != ("{}", "multiplier"):  # no fit: not run yet
            with pytest.raises(ValueError, match="s_cpu.json is not a study's results"):
                fill(f"<!-- study s_cpu {what} --><!-- end -->", tmp_path)


def test_pictures_do_not_compare_what_cannot_be(tmp_path):
    """A row that trains for longer is not drawn; of one with a diverged run the legend says so, and no interval stands beside it."""
    pytest.importorskip("matplotlib", reason="pictures need the optional package matplotlib")
    from study.pictures import learning_rates, relative_loss
    curves = {"a": [[10, 2.0], [20, 1.0]], "longer": [[10, 2.0], [20, 1.0], [30, 0.5]], "b": [[10, 2.1], [20, 1.1]]}
    runs = [{"model": "m", "row": row, "learning_rate": 0.1, "seed": seed, "state": "done", "val_loss": curve[-1][1], "curve": curve}
            for row, curve in curves.items() for seed in (1, 2)]
    runs.append({"model": "m", "row": "b", "learning_rate": 0.1, "seed": 3, "state": "diverged", "curve": []})
    found = {"m": {"tuned_rate": 0.1, "comparisons": []}}
    results = {"results": found, "rows": dict.fromkeys(curves), "panels": [list(curves)], "runs": runs}
    axis, = relative_loss(results).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b, without 1 diverged"]
    assert len(axis.lines) == 2  # the zero line and b's curve
    lines = {line.get_label(): len(line.get_xdata()) for line in learning_rates(results).axes[0].lines}
    assert lines["a"] == 1 and lines["b"] == 0


def test_without_scipy_or_matplotlib_the_runs_still_count(tmp_path):
    """A Python where neither can be imported: results are written, and one line each says what is missing."""
    write_run(tmp_path / "runs" / "one", ["configs/study_cpu.py", "--seed=1", "--learning_rate=0.004"], 1.25)
    blocked = ("import sys; sys.modules['scipy'] = sys.modules['matplotlib'] = None; from study.run import main; "
               "sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", blocked, str(ROOT / "studies" / "figure_1_necessity.py"), f"--out={tmp_path}/runs",
                           f"--results={tmp_path}/results", "--evaluate"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pip install scipy" in done.stdout and "pip install matplotlib" in done.stdout
    assert Path(tmp_path / "results" / "figure_1_necessity_cpu.json").is_file()
