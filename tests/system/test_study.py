"""
Proves that a study's statistics are scipy's and the formula's, that its fits find what a synthetic
law has, that it runs what is missing and nothing else, loses no run, survives an interruption and a
diverging row, refuses what would mislead, and that every number in docs and README is the results'.
"""
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, command_of, run, trained

from lib.config import load_config, to_dict
from lib.data import Dataset
from sample import load_model
from studies.machinery import evidence, tables, windows
from studies.machinery.evidence import best_rate, judge, paired, pooled, summarize, verdict
from studies.machinery.plan import Cell, Study, config_of, load_study, read_idea
from studies.machinery.results import as_text, by_documents, collect, curves, load_records
from studies.machinery.run import Work, main, write_docs
from studies.machinery.runs import Run, code_now, digest, find_run, outcome, settings_of

SMOKE, TRACK, FIGURE_1, FIGURE_6, FIGURE_7 = (ROOT / "studies" / f"{name}.py" for name in (
    "smoke", "track", "figure_1_necessity", "figure_6_dense_scaling", "figure_7_moe_scaling"))
STUDIES = sorted(p for p in (ROOT / "studies").glob("[a-z]*.py") if p.stem != "common")
FOLDER = ROOT / "studies" / "results"
RESULTS = [p for p in sorted(FOLDER.glob("*.json"))
           if '"study"' in p.read_text(encoding="utf-8")[:100]]
CONFIG = "configs/study_cpu.py"
MODEL = {"config": CONFIG, "keys": {}, "learning_rates": (1e-3, 2e-3)}


def tiny_study(**changes):
    """Two rows, two rates, two seeds."""
    return Study(**{"name": "s", "title": "?", "question": "?", "seeds": (1, 2),
                    "rows": {"a": {}, "b": {"scale_vectors": False}}, "models": {"m": MODEL},
                    "comparisons": {("b", "a"): {"0.12B": 0.1}}, **changes})


def losses_by(values, seeds=(1, 2)):
    """{Cell: loss} from {row: {rate: loss}}, a tenth more for each seed."""
    return {Cell("m", row, rate, seed): loss + seed / 10 for row, rates in values.items()
            for rate, loss in rates.items() for seed in seeds}


# ---- statistics ----------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [2, 3, 5, 10, 11])
def test_paired_and_its_p_value_are_scipys(n):
    stats, rng = pytest.importorskip("scipy.stats"), random.Random(n)
    a, b = ({s: rng.gauss(mean, 0.1) for s in range(n)} for mean in (1.5, 1.4))
    found = paired(a, {**b, 17: 3.0})  # a seed that only one side has does not count
    expected = stats.ttest_rel(list(a.values()), list(b.values()))
    low, high = expected.confidence_interval(0.95)
    mean = statistics.mean(a[s] - b[s] for s in a)
    assert found == pytest.approx({"difference": mean, "low": low, "high": high, "seeds": n,
                                   "of": statistics.mean(b.values())}, abs=1e-5)
    assert evidence.p_value(found) == pytest.approx(expected.pvalue, rel=1e-9)


def test_of_few_or_diverged_runs_there_is_no_interval():
    stats = pytest.importorskip("scipy.stats")
    nothing = {"difference": None, "low": None, "high": None}
    assert paired({1: 1.0}, {2: 1.0}) is None and evidence.p_value(None) is None
    assert paired({1: math.inf, 2: 1.0}, {1: 1.0, 2: 1.0}) == {**nothing, "seeds": 2, "diverged": 1}
    assert paired({1: 1.0}, {1: 1.5}) == {**nothing, "difference": -0.5, "seeds": 1, "of": 1.5}
    quantiles = [stats.t.ppf(0.975, freedom) for freedom in range(1, 30)]
    assert evidence.T_975 == pytest.approx(quantiles, abs=5e-5)
    assert evidence.t_975(500) == evidence.T_975[-1]


def test_holm():
    """Of three: 3 x 0.01; 2 x 0.03; and 0.04, which may not be below the one before it."""
    assert evidence.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])


def test_the_bootstrap_takes_seeds_and_documents():
    """Of one document it is the bootstrap of a mean; where all seeds agree and documents do not, it
    has a width."""
    rng = random.Random(1)
    a = {s: [rng.gauss(1, 0.1)] for s in range(10)}
    low, high = evidence.bootstrap(a, {s: [0.0] for s in a}, [7])
    values = [x for x, in a.values()]
    deviation = statistics.pstdev(values) / math.sqrt(10)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    assert (low + high) / 2 == pytest.approx(statistics.mean(values), abs=deviation / 4)
    apart = {s: [1.0, 3.0] for s in range(5)}, {s: [1.0, 1.0] for s in range(5)}
    assert evidence.bootstrap(*apart, [1, 1]) == [0.0, 2.0]
    assert evidence.bootstrap({**apart[0], 4: [1.0]}, dict.fromkeys(range(4), [1.0]), [1]) is None


def test_pooled_is_welchs_interval():
    stats = pytest.importorskip("scipy.stats")
    a, b = [0.1, 0.5, 0.3, 0.9], [0.2, 0.1, 0.15]
    expected = stats.ttest_ind(a, b, equal_var=False)
    mean, low, high = pooled([1, -1], [a, b]).values()
    assert mean == pytest.approx(statistics.mean(a) - statistics.mean(b))
    quantile = evidence.t_975(math.floor(expected.df))
    assert high - mean == pytest.approx(quantile * mean / expected.statistic)
    assert pooled([1, 1], [a, [1.0]])["low"] is None


def test_power_law_and_multiplier():
    """At that many times the compute the baseline's curve has the better loss. Of 100 intervals at
    three seeds, where a bootstrap is too narrow, 95 hold 1.25."""
    stats, compute = pytest.importorskip("scipy.stats"), [1e15, 1e16, 1e17, 1e18]
    noisy = [7.1, 6.0, 5.5, 4.6]
    line = stats.linregress([math.log(c) for c in compute], [math.log(x) for x in noisy])
    law = math.exp(line.intercept), -line.slope
    assert evidence.power_law(compute, noisy) == pytest.approx(law)
    baseline, better = ([{1: a * c ** -b} for c in compute] for a, b in ((7, 0.05), (8, 0.06)))
    found = evidence.compute_multiplier(compute, better, baseline)
    assert found["laws"][0] == pytest.approx((7, 0.05)) and found["low"] is None
    assert 7 * (found["multiplier"] * 1e18) ** -0.05 == pytest.approx(8 * 1e18 ** -0.06)

    rng, covered = random.Random(0), 0
    for _ in range(200):
        noise = [{s: rng.gauss(0, 4e-3) for s in range(3)} for _ in compute]
        baseline = [{s: 7 * c ** -0.05 + n for s, n in d.items()} for c, d in zip(compute, noise)]
        better = [{s: 7 * (1.25 * c) ** -0.05 + n + rng.gauss(0, 2e-3) for s, n in d.items()}
                  for c, d in zip(compute, noise)]
        found = evidence.compute_multiplier(compute, better, baseline)
        covered += found["low"] <= 1.25 <= found["high"]
    assert 184 <= covered <= 198


@pytest.mark.parametrize("paper, low, high, says", [
    (-0.03, -0.04, -0.01, "agrees"), (0.03, -0.04, -0.01, "differs"), (0.03, 0.01, 0.02, "agrees"),
    (-0.03, -0.02, 0.01, "cannot tell"), (-0.03, None, None, "cannot tell"),
    (-0.003, -0.04, -0.01, "agrees"), (-0.0029, -0.04, -0.01, ""), (None, -0.04, -0.01, "")])
def test_verdict(paper, low, high, says):
    """Of 1.5, an interval from 1% to 3%: the paper's 0.03 is 1% of 3 and 1.5% of 2."""
    found = low and {"difference": (low + high) / 2, "low": low, "high": high, "of": 1.5}
    assert verdict(paper, found) == says
    sized = {"difference": -0.03, "low": -0.045, "high": -0.015, "of": 1.5}
    assert verdict(-0.03, sized, 2.0) == "agrees"
    assert verdict(-0.03, sized, 3.1) == "agrees, excludes the paper's size"
    assert verdict(0.03, {**sized, "high": 0.001}, 3.0) == "cannot tell, excludes the paper's size"


def test_the_tracks_rule():
    """Better by the whole interval and by the mean, at ten seeds."""
    rule = load_study(TRACK, "cpu").rule
    for low, mean, high, better in ((-0.03, -0.02, -0.01, True), (-0.03, -0.01, 0.001, False),
                                    (-0.005, -0.004, -0.003, False), (None, None, None, False)):
        found = {"difference": mean, "low": low, "high": high, "seeds": 10}
        assert judge(rule, {"own": found}) == ("better" if better else "does not count as better")
        assert judge(rule, {"own": {**found, "seeds": 9}}) == "not run with 10 seeds yet"


# ---- the study file, its cells and their rates ---------------------------------------------------

def test_best_rate():
    study = tiny_study(rows={"a": {}, "b": {}})
    losses = losses_by({"a": {1e-3: 2.0, 2e-3: 1.0}, "b": {2e-3: 1.0}}, seeds=(1,))

    def own():
        return evidence.own_rate(losses, study, "m", "a", 2e-3, 1e-3)
    assert best_rate(losses, study, "m", "a") == 2e-3 == own()
    assert best_rate(losses, study, "m", "b") is None  # one rate of two
    assert best_rate(losses, study, "m", "b", whole=False) is None  # the first row has more rates
    losses[Cell("m", "a", 1e-3, 2)] = 0.0  # of a seed that the other rate lacks
    assert best_rate(losses, study, "m", "a") == 2e-3 == own()
    losses[Cell("m", "a", 2e-3, 2)] = 9.0  # over both seeds the tuned rate is better
    assert best_rate(losses, study, "m", "a") == 2e-3 and own() == 1e-3
    del losses["m", "a", 1e-3, 1, False]
    assert best_rate(losses, study, "m", "a") is None
    assert best_rate(losses, study, "m", "b", whole=False) == 2e-3


def test_two_phases():
    """First the rates, of a large model on shorter runs, then the seeds."""
    paper = tiny_study(tuned=())
    assert {cell.row for cell in paper.tuning_cells(paper.rows)} == {"a"}
    study = tiny_study(tuning_seeds=(7, 8))  # seeds that only tune: they alone decide the rates
    losses = {cell: cell.learning_rate * (1 if cell.row == "a" else -1)
              for cell in study.tuning_cells(study.rows)}
    assert {(cell.row, cell.seed) for cell in losses} == {*itertools.product("ab", (7, 8))}
    losses |= {Cell("m", "b", 1e-3, 1): 4.0, Cell("m", "b", 2e-3, 1): 5.0}
    assert summarize(study, losses)["m"]["rows"]["b"] == {
        protocol: {"learning_rate": rate, "loss": loss, "seeds": 1, "diverged": 0}
        for protocol, rate, loss in (("tuned", 1e-3, 4.0), ("own", 2e-3, 5.0))}

    wider = {**MODEL, "more_rates": {"b": (4e-3,)}}  # a rate that only one row tries
    wider = tiny_study(models={"m": wider}, rows={"a": {}, "b": {}, "c": {}}, tuned=("b",),
                       follows={"c": "b"}, comparisons={})
    grid = {(c.row, c.learning_rate) for c in wider.tuning_cells(wider.rows)}
    assert grid == {(row, rate) for row in "ab" for rate in (1e-3, 2e-3)} | {("b", 4e-3)}
    losses = {cell: 1 / cell.learning_rate for cell in wider.tuning_cells(wider.rows)}
    best = evidence.best_rates(losses, wider)
    assert best == {("m", "a"): 2e-3, ("m", "b"): 4e-3, ("m", "c"): 4e-3}
    first = {**MODEL, "more_rates": {"a": (4e-3,)}}  # a rate that only the first row tries
    first = tiny_study(models={"m": first}, tuned=("b",), comparisons={})
    losses = {cell: 1 / cell.learning_rate for cell in first.tuning_cells(first.rows)}
    assert evidence.best_rates(losses, first, whole=False) == {("m", "a"): 4e-3, ("m", "b"): 2e-3}
    assert [c[1:3] for c in wider.seed_cells(wider.rows, (1,), best)] == [
        ("a", 2e-3), ("b", 2e-3), ("b", 4e-3), ("c", 4e-3)]
    figure_5 = load_study(ROOT / "studies" / "figure_5_step_by_step.py", "cpu")
    assert figure_5.select_rows(["HG + DP"]) == ["baseline", "HG", "HG + DP"]  # and those it needs
    assert wider.select_rows(["c"]) == ["a", "b", "c"]

    wider.own_rates_only = True  # b leaves out a's rate; c, which is not tuned, cannot
    assert [c[1:3] for c in wider.seed_cells(wider.rows, (1,), best)] == [
        ("a", 2e-3), ("b", 4e-3), ("c", 4e-3)]
    wider.follows = {}
    assert [c[1:3] for c in wider.seed_cells(["c"], (1,), {**best, ("m", "c"): None})] == [
        ("c", 2e-3)]

    long = load_study(FIGURE_6, "long")
    grid = long.tuning_cells(["baseline"])[:3]
    for tuning, steps, best in ((True, 1050, 4e-3), (False, 4200, None)):
        cells = [cell._replace(tuning=tuning) for cell in grid]
        assert {long.keys(cell)["max_iters"] for cell in cells} == {steps}
        assert best_rate({c: c.learning_rate for c in cells}, long, "0.11M", "baseline") == best


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_is_sound(path):
    """At every scale train.py takes every row, and no two rows of a study are one run."""
    for scale in runpy.run_path(str(path)).get("scales", ()):
        load_study(path, scale).check_rows()


def test_an_idea_is_a_row_of_the_track(tmp_path):
    """It differs in its strategy only, and has results of its own."""
    mine = tmp_path / "mine.py"
    mine.write_text("scale_placement = 'dual'\nout_dir = 'out/mine'\n", encoding="utf-8")
    idea = read_idea([ROOT / "configs" / "unified.py", mine], ["--scale_lr=3"])
    assert idea == {**load_study(TRACK, "cpu").rows["unified"], "scale_placement": "dual",
                    "scale_lr": 3}
    for key in ("max_iters", "batch_size", "block_size", "eval_interval", "seed", "learning_rate"):
        with pytest.raises(ValueError, match=f"{key} must be the same for every row"):
            read_idea([], [f"--{key}=9"])
    studies = [load_study(TRACK, "cpu", {**idea, "scale_reparam": reparam})
               for reparam in ("original", "exponential")]
    assert ("yours", "unified") in studies[0].comparisons and studies[0].name != studies[1].name


# ---- run folders ---------------------------------------------------------------------------------

def write_run(folder, arguments, val_loss=1.5, data="", **stored):
    """What train.py leaves, without training."""
    settings = to_dict(load_config([str(ROOT / arguments[0]), *arguments[1:]]))
    files = {"config.json": {**settings, **stored},
             "summary.json": {"val_loss": val_loss, "steps": 1, "tokens": 8, "params": 9,
                              "scale_params": 1, "seconds": 1.0}}
    if data:
        files["made_by.json"] = {"data": data}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")


def test_a_run_is_known_by_its_settings(tmp_path):
    """Not by its row, nor by keys that have gone. One that somebody continued is refused."""
    keys = {"seed": 3, "learning_rate": 0.002}
    first = find_run(tmp_path, {}, "baseline", CONFIG, keys)
    assert first.state == "missing"
    assert re.fullmatch(r"baseline-lr0.002-seed3-[0-9a-f]{6}", first.folder.name)
    first.folder.mkdir()
    write_run(first.folder, first.arguments, a_past_key=1)
    for more in ({}, {"checkpoint_interval": 7, "n_kv_head": 4}):
        found = find_run(tmp_path, {}, "another row", CONFIG, {**keys, **more})
        assert found.folder == first.folder and found.state == "done"
    other = find_run(tmp_path, {}, "baseline", CONFIG, {**keys, "n_kv_head": 2})
    assert other.state == "missing" and other.folder != first.folder

    write_run(first.folder, [CONFIG, "--seed=3", "--max_iters=9999"])
    with pytest.raises(ValueError, match="was continued with other settings: move it away"):
        find_run(tmp_path, {}, "baseline", CONFIG, keys)


def test_only_equal_data_counts_and_only_todays_code_for_yours(tmp_path, monkeypatch):
    data = "same"
    monkeypatch.setattr("studies.machinery.runs.data_of", lambda dataset: data)

    def find(out, records=None, **how):
        return find_run(tmp_path / out, records or {}, "x", CONFIG, {"seed": 1}, **how)

    key = digest(find("none").settings)
    records = {key: [{"state": "done", "data": "same", "val_loss": 1.0}]}
    ours = {key: [{**records[key][0], "code": code_now()}]}
    made = find("out")
    write_run(made.folder, made.arguments, data="same")
    mine = find("out", code=code_now())
    assert find("none", records).has_ended and find("out").has_ended
    assert find("none", ours, code=code_now()).has_ended
    assert not mine.has_ended and mine.folder.name.endswith(code_now()[:6])
    assert not find("none", records, code=code_now()).has_ended
    assert not find("none", ours).has_ended
    data = "other"
    assert not find("none", records).has_ended
    with pytest.raises(ValueError, match="holds a run on other data"):
        find("out")


def test_how_a_run_ended(tmp_path):
    """By its last line: an error of an earlier start, still in output.txt, is not this one's. A
    finished run whose loss is not finite counts as diverged."""
    study, cell = tiny_study(), Cell("m", "a", 1e-3, 1)
    run = find_run(tmp_path, {}, "a", CONFIG, study.keys(cell))
    write_run(run.folder, run.arguments, val_loss=None)
    assert outcome(run, 0) == ("done", "validation loss not finite")
    results = collect(study, "cpu", {cell: run}, [])
    [record] = results["runs"]
    assert record["state"] == "diverged" and "val_loss" not in record
    assert results["results"]["m"]["rows"]["a"]["tuned"] == {
        "learning_rate": 1e-3, "loss": None, "seeds": 1, "diverged": 1}

    (run.folder / "summary.json").unlink()
    old = "error: 3 steps in a row up to step 9 were not finite\n"
    output = run.folder / "output.txt"
    output.write_text(old + "error: out of memory\n", encoding="utf-8")
    assert outcome(run, 1) == ("failed", "out of memory") and run.state == "interrupted"
    assert outcome(run, -9)[0] == "failed" and outcome(run, 75)[0] == "stopped"
    output.write_text(old, encoding="utf-8")
    assert outcome(run, 1)[0] == "diverged" == run.state


def test_norms_of_matrices_are_found_by_a_part_of_their_name(tmp_path):
    """Whatever stands between. A norm that was not finite is left out."""
    norms = {"2.attn.q.weight": 2.0, "2.attn.qkv.weight.k": 3.0, "2.attn.o.weight": 4.0,
             "1.attn.q.weight": 5.0, "2.attn.v.weight": None}
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(
        json.dumps({"event": "matrix", "step": 0, "name": f"layers.{name}", "norm": norm})
        for name, norm in norms.items()), encoding="utf-8")
    found = {"q": [[0, 2.0]], "k": [[0, 3.0]]}
    assert curves(log, ("layers.2.attn.", ("q", "k", "v"))) == {"curve": [], "norms": found}
    assert curves(log, ()) == {"curve": []}


def test_every_window_and_each_document(dataset, tmp_path):
    """Token by token: each target once, by the document that it stands in."""
    out = tmp_path / "run"
    trained("configs/study_cpu.py", "--n_layer=1", "--n_embd=16", "--n_head=2", "--block_size=16",
            f"--dataset={dataset}", f"--out_dir={out}", "--max_iters=1", "--device=cpu",
            "--eval_windows=3", "--warmup_iters=1")
    summary = out / "summary.json"
    whole = summary.read_text(encoding="utf-8")
    summary.write_text(whole.replace('"steps": 1', '"steps": 2'), encoding="utf-8")
    windows.main([str(out)])  # its last checkpoint is damaged, say
    assert not (out / "windows.json").exists()
    summary.write_text(whole, encoding="utf-8")
    windows.main([str(out), str(tmp_path)])  # the second holds no run
    found = json.loads((out / "windows.json").read_text(encoding="utf-8"))
    model, encoding, _ = load_model(str(out))
    shard = Dataset(dataset, 16, 257).val.shards[0]
    tokens = torch.from_numpy(shard.read(0, len(shard)).astype("int64"))
    sums, counts, document = {}, {}, 0
    for first in range(0, (len(tokens) - 1) // 16 * 16, 16):
        with torch.no_grad():
            logits = model(tokens[None, first:first + 16])[0][0].double().log_softmax(-1)
        for i in range(16):
            document += int(tokens[first + i] == encoding.eot_token)
            target = tokens[first + i + 1]
            sums[document] = sums.get(document, 0) - logits[i, target].item()
            counts[document] = counts.get(document, 0) + 1
    assert len(counts) > 3 and found["tokens"] == list(counts.values())
    means = [sums[d] / counts[d] for d in sums]
    assert found["losses"] == pytest.approx(means, abs=1e-5)
    assert found["loss"] == pytest.approx(sum(sums.values()) / sum(counts.values()), abs=1e-5)


def test_all_windows_count_on_seeds_that_count(tmp_path):
    """The tuning seed has its val_loss, which alone decides the rate. The primary comparison has an
    interval over seeds and documents, the others have none."""
    study = tiny_study(seeds=(1, 2, 3, 4, 5), tuning_seeds=(7,), every_window=True,
                       primary=[("b", "a")], comparisons={("b", "a"): {}, ("a", "b"): {}})
    runs = {}
    for row, rate, seed in itertools.product("ab", (1e-3, 2e-3), (1, 2, 3, 4, 5, 7)):
        of_windows = {"loss": 1.0 + (row == "b") * seed, "tokens": [3, 1],
                      "losses": [1.0, 1.0 + (row == "b") * 4 * seed]}
        record = {"state": "done", "val_loss": 5.0 - (rate == 2e-3), "data": "", "curve": [],
                  "windows": of_windows}
        runs[Cell("m", row, rate, seed)] = Run([], {}, tmp_path, record)
    found = collect(study, "cpu", runs, list(runs))["results"]["m"]
    assert found["tuned_rate"] == 2e-3 and found["rows"]["b"]["own"]["loss"] == 4.0
    primary, other = found["comparisons"]
    assert primary["own"]["difference"] == 3.0 and other["own"]["difference"] == -3.0
    sides = ({s: [1.0, 1.0 + 4 * s] for s in range(1, 6)}, {s: [1.0, 1.0] for s in range(1, 6)})
    assert primary["own"]["documents"] == evidence.bootstrap(*sides, [3, 1])
    assert "documents" not in other["own"]

    runs[Cell("m", "b", 2e-3, 3)].record = {"state": "diverged", "data": "", "curve": []}
    found = collect(study, "cpu", runs, list(runs))
    own = found["results"]["m"]["comparisons"][0]["own"]
    assert own == {"difference": None, "low": None, "high": None, "seeds": 5, "diverged": 1}
    for scale in ("cpu", "long"):  # two more comparisons, so that all four are there
        twice = {**found, "scale": scale, "primary": [["b", "a"], ["a", "b"]]}
        (tmp_path / f"adopt_{scale}.json").write_text(as_text(twice), encoding="utf-8")
    page = tables.primary_table(tmp_path)
    assert page.count("diverged (1 of 5 seeds)") == 4 and "still to be made" not in page

    # the fifth stands below the four, without a part in their Holm's p
    fifth = {**found, "scale": "confirm", "primary": [["b", "a"]], "results": {"m": {
        "comparisons": [{**primary, "own": {**primary["own"], "low": 2.9, "high": 3.1}}]}}}
    (tmp_path / "adopt_confirm.json").write_text(as_text(fifth), encoding="utf-8")
    *four, last = tables.primary_table(tmp_path).splitlines()[2:]
    assert len(four) == 4 and all(line.endswith("|  | 1 |") for line in four)
    p = evidence.p_value({**primary["own"], "low": 2.9, "high": 3.1})
    assert last.startswith("| m, confirm | b | a | +3.0000 [+2.9000")
    assert last.endswith(f"| {p:.2g} |  |")

    with pytest.raises(ValueError, match="every_window needs tuning seeds that do not count"):
        tiny_study(every_window=True)


def test_runs_without_windows_are_made_anew(tmp_path):
    """Where all windows count. A tuning seed needs none."""
    study = tiny_study(every_window=True, tuning_seeds=(7,))
    path, args = tmp_path / "results" / "s_cpu.json", SimpleNamespace(
        out=tmp_path / "runs", rows=None, seeds=None)
    work, cells = Work(study, path, args), [Cell("m", "a", 1e-3, seed) for seed in (1, 2, 7)]
    runs = [{**cell._asdict(), "settings": digest(work.find(cell).settings), "state": "done",
             "data": work.find(cell).data, "val_loss": 2.0, "curve": []} for cell in cells]
    runs[1]["windows"] = {"loss": 1.0}
    path.parent.mkdir()
    path.with_name("other_cpu.json").write_text(
        as_text({"study": "other", "runs": runs}), encoding="utf-8")
    work = Work(study, path, args)
    assert [work.find(cell).state for cell in cells] == ["missing", "done", "done"]


def test_fits_are_of_the_seeds_that_count_and_of_sizes_in_order():
    study = tiny_study(models={name: MODEL for name in ("large", "small")}, picture="scaling",
                       seeds=(1, 2), tuning_seeds=(9,))
    losses = {Cell(model, row, rate, seed): loss - 0.1 * (row == "b") - (row == "b") * (seed == 9)
              for model, loss in (("large", 2.0), ("small", 2.5))
              for row in "ab" for rate in (1e-3, 2e-3) for seed in (1, 2, 9)}
    [fit] = evidence.fit_scaling(study, losses, summarize(study, losses),
                                 {"large": 1e16, "small": 1e15})
    assert fit["gain"]["difference"] == pytest.approx(-0.1) and fit["largest"] == "large"


# ---- running -------------------------------------------------------------------------------------

def places(folder):
    return [f"--out={folder}/runs", f"--results={folder}/results"]


def smoke_and(lines, folder):
    """A study file: the smoke test's, and these lines."""
    path = folder / "mine.py"
    path.write_text(SMOKE.read_text(encoding="utf-8") + lines, encoding="utf-8")
    return str(path)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != "lock"}


@pytest.mark.slow
def test_interrupted_resumed_and_not_repeated(tmp_path, monkeypatch, capsys):
    """Real runs, one of them diverging, from another folder and without matplotlib. After Ctrl-C
    the same command leaves what was finished and resumes the rest; once more, it makes nothing; and
    the JSON stands for the runs where they are gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "studies.machinery.pictures", None)
    smoke_and("""
rows["wild"] = {"init_std": 1e30}
model["keys"] |= {"max_iters": 200, "eval_interval": 100}
scales["cpu"] |= {"seeds": (1,), "tuned": ()}
""", tmp_path)
    command = ["mine.py", *places(tmp_path), "--jobs=2"]
    with subprocess.Popen(command_of("-m", "studies", *command), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as child:
        while child.poll() is None and not list(tmp_path.glob("runs/unified*/config.json")):
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate()
    assert child.returncode == 130 and "the same command resumes them" in errors
    assert not list(tmp_path.glob("results/*"))
    done, = tmp_path.glob("runs/baseline*")
    before = snapshot(done)

    assert main(command) == 0 and snapshot(done) == before
    said += capsys.readouterr().out  # the wild run may have ended before Ctrl-C
    assert "resumes  unified" in said and "diverged: 10 steps in a row" in said
    results = json.loads((tmp_path / "results" / "mine_cpu.json").read_text(encoding="utf-8"))
    assert results["missing"] == 0 and all(run["device"] for run in results["runs"])
    baseline, unified, wild = results["runs"]
    assert [tokens for tokens, _ in unified["curve"]] == [0, 6400, 12800]
    difference = tables.signed(unified["val_loss"] - baseline["val_loss"])
    assert f"| unified | baseline | {difference} |" in said
    assert wild["state"] == "diverged" and "| tiny | wild | diverged (1 of 1)" in said
    assert "pip install matplotlib" in said

    before = snapshot(tmp_path / "runs")
    assert main(command) == 0 and snapshot(tmp_path / "runs") == before
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert main(command) == 0 and not list(tmp_path.glob("runs/*"))
    again = json.loads((tmp_path / "results" / "mine_cpu.json").read_text(encoding="utf-8"))
    assert again["runs"] == results["runs"]


def test_it_starts_without_optional_packages():
    without = "import sys; sys.modules |= dict.fromkeys(('scipy', 'matplotlib')); "
    run("-c", without + "import studies.machinery.run")


def test_a_parts_results_are_merged_and_never_replaced_by_fewer(tmp_path, capsys, monkeypatch):
    """Also where the runs' folders are gone, and for a seed that the study does not ask for."""
    monkeypatch.setattr("studies.machinery.runs.data_of", lambda dataset: "same")
    arguments = [str(FIGURE_1), *places(tmp_path), "--evaluate"]
    path = tmp_path / "results" / "figure_1_necessity_cpu.json"
    for seed, more in ((1, []), (77, ["--rows=baseline", "--seeds=77"])):
        keys = {"learning_rate": 4e-3, "seed": seed}
        run = find_run(tmp_path / "runs", {}, "baseline", CONFIG, keys)
        write_run(run.folder, run.arguments, 1.25)
        assert main([*arguments, *more]) == 0
        (tmp_path / "runs").rename(tmp_path / f"gone {seed}")
    said = capsys.readouterr().out
    assert "runs of this study, or more, are still to be made" in said
    assert main(arguments) == 0
    results = json.loads(path.read_text(encoding="utf-8"))
    assert [(run["seed"], run["val_loss"]) for run in results["runs"]] == [(1, 1.25), (77, 1.25)]

    for damage, says in (({"settings": "other"}, "with other settings: move them away"),
                         ({"row": "gone"}, "with other settings: move them away"),
                         ({"data": "other"}, "hold runs on other data than this machine has"),
                         (None, f"error: {path} does not hold a study's results")):
        [run, _] = results["runs"]
        text = json.dumps({"study": "s", "runs": [{**run, **damage}]}) if damage else "[]"
        path.write_text(text, encoding="utf-8")
        assert main(arguments) == 1 and path.read_text(encoding="utf-8") == text
        assert says in capsys.readouterr().err


def test_printed_lines_are_the_runs(tmp_path, capsys):
    """First the grid; when it is there, every run."""
    def printed():
        assert main([str(SMOKE), *places(tmp_path), "--print"]) == 0
        said = capsys.readouterr().out.splitlines()
        lines = [shlex.split(line) for line in said if line.startswith("python ")]
        return {Path(line[-1].removeprefix("--out_dir=")): line[2:-1] for line in lines}

    grid = printed()
    for folder, arguments in grid.items():
        write_run(folder, arguments)
    assert len(grid) == 2 and len(printed()) == 4 and grid.keys() < printed().keys()


@pytest.mark.parametrize("given, says", [
    # lines that make a study malformed
    ("scales['cpu']['seeds'] = 3", "not subscriptable: see studies/common.py"),
    ("del scales['cpu']['seeds']", "'seeds'"),
    ("panels = [['x']]", "names 'x'"),
    ("scales['cpu']['protocol'] = 'x'", "'protocol'"),
    ("rows['unified'] = {'seed': 3}", "a row sets learning_rate or seed"),
    ("rows['unified'] = {'scale_vectors': True}", "row 'unified' is the same run as 'baseline'"),
    ("rows['unified'] = {'min_lr': 5e-3}", "row 'unified': min_lr=0.005"),
    # commands
    (["nothing"], "study not found"),
    (["table_3_overhead"], "run `python -m bench.benchmark"),
    ([SMOKE, "--scale=huge"], "no such scale"),
    ([SMOKE, "--lerning_rate=1"], "unknown key"),
    ([SMOKE, "--scale_lr=2"], "use the study track"),
    ([TRACK, "--scale_reparam=none"], "row 'yours' is the same run as 'baseline'"),
    ([SMOKE, "--rows=x"], "no row 'x'")])
def test_what_cannot_be_met_is_refused_before_any_run(given, says, tmp_path, capsys):
    if isinstance(given, str):
        given = [smoke_and(given, tmp_path)]
    assert main([*map(str, given), *places(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


# ---- results, tables, docs -----------------------------------------------------------------------

NUMBER = r"[+−]0\.\d+(?: \[[^]]+\])?|\d\.\d\d \[[^]]+\]"


def rounded(value):
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_committed_summaries_follow_from_their_runs(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    study = load_study(ROOT / "studies" / f"{results['study']}.py", results["scale"])
    runs = {Cell(r["model"], r["row"], r["learning_rate"], r["seed"], r.get("tuning", False)): r
            for r in results["runs"]}
    losses = {}
    for cell, record in runs.items():
        if not study.every_window or not study.counts(cell.seed):
            losses[cell] = record.get("val_loss", math.inf)
        elif "windows" in record:
            losses[cell] = record["windows"]["loss"]
    flops = {name: model["flops"] for name, model in results["models"].items()}
    found = summarize(study, losses)
    by_documents(study, results["runs"], found)
    assert rounded(found) == rounded(results["results"])
    assert rounded(evidence.fit_scaling(study, losses, found, flops)) == rounded(results["fits"])
    for fit in results["fits"]:
        points = [(math.log10(flops[model]), c["tuned"]["difference"])
                  for model, found in results["results"].items() for c in found["comparisons"]
                  if (c["row"], c["other"]) == (fit["row"], fit["other"]) and c["tuned"]]
        slope = statistics.linear_regression(*zip(*points)).slope
        assert fit["trend"]["difference"] == pytest.approx(slope)
    for cell, record in runs.items():  # so that the runs count as done where out/ is gone
        config = config_of(study.models[cell.model].config, study.keys(cell))
        assert record["settings"] == digest(settings_of(to_dict(config))), cell
        assert record["data"], "evaluated where the dataset was missing"
    assert as_text(results) == path.read_text(encoding="utf-8")


def test_the_pages_hold_the_results_tables():
    """A sentence of docs/studies.md quotes only numbers of the table in its section."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        assert tables.fill(text) == text, f"{path.name}: run `python -m studies --docs`"
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE):
        prose, table = tables.BLOCK.sub("", section), " ".join(
            m[0] for m in tables.BLOCK.finditer(section))
        for number in re.findall(NUMBER, prose):
            assert number in table, f"{section.splitlines()[0]}: {number}"
    adopt, readme = ((ROOT / path).read_text(encoding="utf-8")
                     for path in ("docs/adopt.md", "README.md"))
    page += " ".join(m[0] for m in tables.BLOCK.finditer(adopt))
    adopt, readme = tables.BLOCK.sub("", adopt), tables.BLOCK.sub("", readme)
    assert len(numbers := re.findall(NUMBER, adopt + readme)) > 12
    for number in numbers:  # from any section; the other way round they have the other sign
        turned = number.translate(str.maketrans("+−", "−+"))
        ends = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", turned)
        turned = f"{ends[1]} [{ends[3]}, {ends[2]}]" if ends else turned
        assert number in page or turned in page, number
    baseline, unified = (next(run["val_loss"] for run in json.loads(
        (FOLDER / "figure_5_step_by_step_cpu.json").read_text(encoding="utf-8"))["runs"]
        if run["row"] == row and run["seed"] == 1 and run["learning_rate"] == 4e-3)
        for row in ("baseline", "unified"))
    assert f"is {unified:.4f}, and the baseline's {baseline:.4f}" in readme


def test_the_cost_of_a_step():
    """A multiplier is net of the benchmark's, and docs/performance.md has them."""
    cpu, gpu_b, gpu_c = (json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
                         for name in ("bench_cpu", "gpu_B", "gpu_C"))
    races = {**cpu["races"], **gpu_c["one_billion"], **gpu_b["dense_and_mixture"]}
    medians = [races[name]["variants"]["unified"]["time_over_baseline"]["median"]
               for name in ("configs/quickstart_baseline.py", "0.12B, 16 x 1024", "1B, 4 x 4096",
                            "MoE-0.5B, 4 x 1024")]
    costs = [cost for study in (FIGURE_6, FIGURE_7)
             for cost in load_study(study, "cpu").costs.values()]
    assert costs == pytest.approx(medians, abs=0.001)

    # beside a forest stand the times on a CPU, eagerly, at two sizes
    times = load_study(ROOT / "studies" / "adopt.py", "cpu").step_times
    for place, name in enumerate(("bench_quickstart_eager", "bench_cpu_eager")):
        [race] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))["races"].values()
        for label, words in times.items():
            timed = race["variants"].get(label.removesuffix(" without decay on γ"))
            if timed and label != "baseline without decay on γ":
                found = words.partition(";")[0].split(", ")[place]
                assert found == f"{timed['time_over_baseline']['median']:.2f}"
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for row in (row for race in races.values() for row in race["variants"].values()):
        ratio = row["time_over_baseline"]
        if ratio["min"] != 1 and row["memory"]:
            assert (f"| {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) | "
                    f"{row['tokens_per_s']:,.0f} | {row['mfu']:.1%} | "
                    f"{row['memory']['allocated'] / 1e9:.2f} |") in page


def test_docs_are_filled(tmp_path):
    """With a summary by both protocols whose numbers are known by hand."""
    study = tiny_study(paper_losses={"0.12B": 3.0})
    losses = losses_by({"a": {1e-3: 2.0, 2e-3: 1.0}, "b": {1e-3: 1.5, 2e-3: 3.0}})
    runs = {cell: Run([], {}, tmp_path, {
        "curve": [[8, loss]], "params": 1100 if cell.row == "b" else 1000, "tokens": 8,
        "seconds": 1, "val_loss": loss, "state": "done", "code": "", "data": ""})
        for cell, loss in losses.items()}
    path = tmp_path / "studies" / "results" / "s_cpu.json"
    own = as_text(collect(study, "cpu", runs, list(runs)))
    files = {path: own, path.with_name("a.json"): own.replace('"data":""', '"data":"theirs"'),
             path.with_name("bench.json"): '{"races": {}}',  # of another tool
             tmp_path / "README.md": "a <!-- primary --><!-- end --> b",
             tmp_path / "docs" / "a.md": (
                 "<!-- study s_cpu -->x<!-- end --> <!-- study none_cpu --><!-- end -->.")}
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")

    assert len(write_docs(tmp_path)) == 2 and write_docs(tmp_path) == []
    page = (tmp_path / "docs" / "a.md").read_text("utf-8")
    assert "| b, +10.0% parameters | 3.1500 at 0.002 \\* | 2 | 1.6500 at 0.001 \\* | 2 |" in page
    assert ("| m | b | a | +2.0000 [+2.0000, +2.0000] | +173.9% | +0.5000 [+0.5000, +0.5000] | "
            "+0.1000 (0.12B) | agrees, excludes the paper's size |") in page
    assert tables.EDGE in page and "still to be made" not in page and "Not run yet." in page
    [same] = load_records(path).values()
    assert [run["data"] for run in same] == 8 * [""] + 8 * ["theirs"]  # its own come first



def test_pictures_do_not_compare_what_cannot_be():
    """A row that trains for longer is not drawn; of one with a diverged run the legend tells the
    seeds, and at that rate only the dots of the others stand."""
    pytest.importorskip("matplotlib", reason="pictures need the optional package matplotlib")
    from studies.machinery.pictures import learning_rates, relative_loss
    runs = [{"model": "m", "learning_rate": 0.1, "row": row, "seed": seed, "state": "done",
             "val_loss": 1.0, "curve": [[10, 2.0], [end, 1.0]]}
            for row, end in (("a", 20), ("longer", 30), ("b", 20)) for seed in (1, 2)]
    runs[-1] |= {"state": "diverged", "curve": []}
    rows = ["a", "longer", "b"]
    results = {"results": {"m": {"tuned_rate": 0.1, "rows": rows, "comparisons": []}},
               "panels": [rows], "rows": dict.fromkeys(rows), "runs": runs, "paper_losses": {}}
    axis, _ = relative_loss(results).axes
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["a", "b, 1 seeds"]
    axis, = learning_rates(results).axes
    lines = {line.get_label(): len(line.get_xdata()) for line in axis.lines}
    assert lines["a"] == 1 and lines["b"] == 0


def test_a_forest_shows_a_row_at_both_rates():
    """Filled at its own rate, hollow at the first row's where that is another difference, with an
    interval; below the axis it says so."""
    pytest.importorskip("matplotlib", reason="pictures need the optional package matplotlib")
    from studies.machinery.pictures import forest

    def found(mean, **ends):
        return {"difference": mean, "low": mean - 1, "high": mean + 2, "seeds": 4, **ends}
    both = [("b", found(3.0), found(5.0)), ("c", found(-7.0), found(-7.0)),
            ("d", found(11.0, low=None, high=None), found(13.0)), ("e", None, found(17.0))]
    results = {"rows": dict.fromkeys("abcde"), "paper_losses": {}, "step_times": {}, "results": {
        "m": {"comparisons": [{"row": row, "other": "a", "paper": {}, "tuned": tuned, "own": own}
                              for row, tuned, own in both]}}}
    axis, = forest(results).axes
    dots = [(line.get_xdata()[0], line.get_markerfacecolor() == "white")
            for line in axis.lines if line.get_marker() == "o"]
    assert sorted(dots) == [(-7.0, False), (3.0, True), (5.0, False), (13.0, False), (17.0, False)]
    assert axis.get_xlabel().endswith("\n○: at the rate of a")
    assert [2.0, 5.0] in [list(line.get_xdata()) for line in axis.lines]

    for c in results["results"]["m"]["comparisons"]:
        c["tuned"] = c["own"]
    assert "○" not in forest(results).axes[0].get_xlabel()
