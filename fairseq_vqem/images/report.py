"""What a finished picture experiment shows: tables over seeds, pages of pictures, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fairseq_vqem.benchmark.signature import Signature, make_signature
from fairseq_vqem.benchmark.tables import (
    ResultRow,
    ResultTable,
    mean_and_spread,
    render_table,
    write_table,
)
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.images.evaluate import Evaluation
from fairseq_vqem.images.experiment import Experiment, Generated, shown
from fairseq_vqem.images.grids import write_page
from fairseq_vqem.pipeline.report import training_summary
from fairseq_vqem.pipeline.training import LOG, read_log

RESULT, GENERATION_RESULT = "result.json", "generation.json"
PAGE, CURVES = "page.png", "curves.png"
PAGE_PICTURES = 10
Evaluations = Mapping[str, Mapping[int, Evaluation]]
"""System -> seed -> metrics."""

METRICS: dict[str, tuple[str, int, float]] = {
    "PSNR (dB)": ("psnr", 2, 1.0),
    "MSE": ("mse", 1, 1.0),
    "SSIM": ("ssim", 3, 1.0),
    "Likelihood (bits/dim)": ("likelihood_bits", 3, 1.0),
    "Codebook perplexity": ("code_perplexity", 1, 1.0),
    "Codes used (%)": ("codes_used", 1, 100.0),
}
"""Column -> field of ``Evaluation``, digits, factor."""
WORST, COLLAPSES, RUNS = "Worst PSNR", "Collapses", "Runs"
COLUMNS = ("system", RUNS, "PSNR (dB)", WORST, *list(METRICS)[1:], COLLAPSES)
BOUND, PRIOR, KNOWN = "Bits/dim", "Bits/dim of the codes", "Bits/dim of the codes, class known"
SAMPLES, REMADE = "Feature distance, samples", "Feature distance, reconstructions"
GENERATION_COLUMNS = ("system", BOUND, PRIOR, KNOWN, SAMPLES, REMADE)


def is_collapsed(evaluation: Evaluation, share: float) -> bool:
    """Whether a run's codebook perplexity is below ``share`` of its codebook's size."""
    return evaluation.code_perplexity < share * evaluation.codebook_size


def reconstruction_rows(evaluations: Evaluations, collapse_below: float) -> list[ResultRow]:
    """One row per system, over its seeds."""
    rows = []
    for system, by_seed in evaluations.items():
        runs = list(by_seed.values())
        extra: dict[str, float | str] = {RUNS: str(len(runs))}
        for heading, (name, digits, factor) in METRICS.items():
            values = [factor * getattr(each, name) for each in runs]
            extra[heading] = mean_and_spread(values, digits)
        extra[WORST] = f"{min(each.psnr for each in runs):.2f}"
        extra[COLLAPSES] = str(sum(is_collapsed(each, collapse_below) for each in runs))
        rows.append(ResultRow(system, extra=extra))
    return rows


def generation_rows(generated: Mapping[str, Generated], floor: float, real: int) -> list[ResultRow]:
    """One row per system, and one of ``real`` validation pictures in place of samples."""
    rows = []
    for system, each in generated.items():
        extra: dict[str, float | str] = {
            BOUND: f"{each.likelihood_bits + each.unknown_class_bits:.3f}",
            PRIOR: f"{each.unknown_class_bits:.3f}",
            KNOWN: f"{each.known_class_bits:.3f}",
            SAMPLES: f"{each.sample_distance:.2f}",
            REMADE: f"{each.reconstruction_distance:.2f}",
        }
        rows.append(ResultRow(system, extra=extra))
    return [*rows, ResultRow(f"{real} validation pictures", extra={SAMPLES: f"{floor:.2f}"})]


def write_reconstruction_report(experiment: Experiment, evaluations: Evaluations) -> str:
    """``result.json``, the page of all runs and the curves; the table as text."""
    recipe, out = experiment.recipe, experiment.out
    table = ResultTable(
        recipe.name, reconstruction_rows(evaluations, recipe.collapse_below), COLUMNS
    )
    signature = sign(experiment, None)
    runs = {
        f"{system}-{seed}": {
            **asdict(each),
            "collapsed": is_collapsed(each, recipe.collapse_below),
            "training": training_summary(experiment.run(system, seed), items="pictures"),
        }
        for system, by_seed in evaluations.items()
        for seed, each in by_seed.items()
    }
    write_table(out / RESULT, table, signature, runs=runs, recipe=asdict(recipe))
    write_run_page(experiment, evaluations, out / PAGE)
    draw_curves(experiment, evaluations, out / CURVES)
    return render_table(table, asdict(signature))


def write_generation_report(
    experiment: Experiment, generated: Mapping[str, Generated], floor: float, accuracy: float
) -> str:
    """The result file of generation; its table as text.

    Args:
        floor: feature distance of the validation pictures to the test pictures.
        accuracy: of the feature network on the test pictures.
    """
    wanted = experiment.recipe.generation
    assert wanted is not None
    name = f"{experiment.recipe.name}-generation"
    real = experiment.folder.manifest["splits"]["valid"]["count"]
    table = ResultTable(name, generation_rows(generated, floor, real), GENERATION_COLUMNS)
    signature = sign(experiment, wanted.seed)
    write_table(
        experiment.out / GENERATION_RESULT,
        table,
        signature,
        feature_network_accuracy=accuracy,
        generated={system: asdict(each) for system, each in generated.items()},
        generation=asdict(wanted),
    )
    return render_table(table, asdict(signature))


def sign(experiment: Experiment, seed: int | None) -> Signature:
    """The signature of this process, with the checksum of the pictures."""
    signature = make_signature(seed=seed, device=experiment.device)
    return replace(signature, data_checksum=experiment.folder.checksum)


def write_run_page(experiment: Experiment, evaluations: Evaluations, path: Path) -> None:
    """The same test pictures by every run, a column per system (Figure 5)."""
    first = slice(0, PAGE_PICTURES)
    runs = {}
    for system, by_seed in evaluations.items():
        runs[system] = [
            (
                f"seed {seed}: {each.psnr:.2f} dB, perplexity {each.code_perplexity:.0f}",
                shown(experiment, system, seed)[first],
            )
            for seed, each in by_seed.items()
        ]
    count = len(next(iter(runs.values()))[0][1])
    write_page(path, experiment.originals[:count], runs)


def draw_curves(experiment: Experiment, evaluations: Evaluations, path: Path) -> None:
    """Validation PSNR and codebook perplexity by update, one line per run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, (system, by_seed) in enumerate(evaluations.items()):
        for place, seed in enumerate(by_seed):
            records = list(read_log(experiment.run(system, seed) / LOG))
            valid = [values for kind, values in records if kind == "valid"]
            for axis, key in zip(axes, ("valid_psnr", "valid_code_perplexity"), strict=True):
                points = _points(valid, key)
                label = system if place == 0 else None
                axis.plot(*points, color=f"C{number}", alpha=0.6, label=label)
    for axis, title in zip(axes, ("validation PSNR (dB)", "codebook perplexity"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("update")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    pyplot.close(figure)


def _points(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Updates and values of the records that have ``key``; a resumed run may repeat updates."""
    by_update = {int(float(each["valid_num_updates"])): each for each in records if key in each}
    updates = sorted(by_update)
    return [float(each) for each in updates], [float(by_update[each][key]) for each in updates]
