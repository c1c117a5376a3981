"""``fairseq-vqem planted``: which bottleneck finds the centres of a known Gaussian mixture.

C centres are drawn from N(0, spread²·I), points from the centres plus N(0, ½·I), for which the
posterior softmax(-‖e - x‖²) of soft EM is the true one. Each bottleneck has K = C codes and sees
the same points. A centre is recovered if some code in use lies nearer to it than half the way to
its nearest neighbour.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_vqem.benchmark.signature import make_signature
from fairseq_vqem.benchmark.tables import (
    ResultRow,
    ResultTable,
    mean_and_spread,
    render_table,
    write_table,
)
from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOptions, build_bottleneck
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.errors import UserError

WARM_UP_STEPS = 4
PLOT = ".png"
RANDOM_START = ", random start"
"""Names that end so have no warm-up: their first codebook is N(0, I), inside the data."""
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "hard-em": ("hard-em", {}),
    "soft-em, m = 1": ("soft-em", {"em_samples": 1}),
    "soft-em, m = 10": ("soft-em", {}),
    "soft-em, temperature 4": ("soft-em", {"posterior_temperature": 4.0}),
    "hard-em" + RANDOM_START: ("hard-em", {}),
    "soft-em" + RANDOM_START: ("soft-em", {}),
    "soft-em, temperature 4" + RANDOM_START: ("soft-em", {"posterior_temperature": 4.0}),
    "soft-em, learned prior": ("soft-em", {"cluster_prior": "learned"}),
    "hard-em, k-means++": ("hard-em", {"codebook_init": "kmeans++"}),
    "soft-em, k-means++": ("soft-em", {"codebook_init": "kmeans++"}),
    "hard-em, restarts": ("hard-em", {"dead_code_threshold": 1.0}),
    "soft-em, restarts": ("soft-em", {"dead_code_threshold": 1.0}),
    "gradient-vq": ("gradient-vq", {}),
    "gumbel": ("gumbel", {}),
    "semhash": ("semhash", {}),
    "gm-vq": ("gm-vq", {}),
}
COLUMNS = ("system", "Centres", "Least", "Codes in use", "Error")


@dataclass(frozen=True)
class Planted:
    """The task: C ``centres`` in D dimensions, ``steps`` batches of ``batch`` points."""

    centres: int = 64
    dimension: int = 8
    spread: float = 2.0
    steps: int = 1500
    batch: int = 256
    learning_rate: float = 3e-3
    decay: float = 0.99


@dataclass(frozen=True)
class Outcome:
    """What one bottleneck with one seed came to.

    Attributes:
        recovered: how many centres.
        used: how many codes a held-out batch uses.
        error: mean squared distance of held-out points to their code's vector, over the same for
            the true centres; 1 is perfect.
    """

    recovered: int
    used: int
    error: float


def draw_centres(task: Planted, seed: int) -> Tensor:
    """``[C, D]``."""
    generator = torch.Generator().manual_seed(seed)
    return task.spread * torch.randn(task.centres, task.dimension, generator=generator)


def draw_points(centres: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``[count, D]``."""
    chosen = torch.randint(centres.size(0), (count,), generator=generator)
    noise = torch.randn(count, centres.size(1), generator=generator)
    return centres[chosen] + 0.5**0.5 * noise


def make(task: Planted, kind: str, options: Mapping[str, Any]) -> Bottleneck:
    """An untrained bottleneck for the task."""
    schedules = {
        "gumbel_temperature": f"1.2:0.2@{task.steps}",
        "gumbel_noise": f"0:1@{task.steps // 10}",
    }
    chosen = {**schedules, **options}
    return build_bottleneck(
        kind,
        BottleneckOptions(task.centres, task.dimension, codebook_decay=task.decay, **chosen),
    )


def train(
    task: Planted, kind: str, options: Mapping[str, Any], seed: int, warm_up: int = WARM_UP_STEPS
) -> Bottleneck:
    """A bottleneck trained to reconstruct the points; the points are the encoder's outputs.

    ``warm_up`` batches beforehand give the first codebook.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    centres = draw_centres(task, seed)
    bottleneck = make(task, kind, options)
    parameters = list(bottleneck.parameters())
    optimiser = torch.optim.Adam(parameters, lr=task.learning_rate) if parameters else None
    bottleneck.train()
    for step in range(warm_up + task.steps):
        points = draw_points(centres, task.batch, generator)
        bottleneck.set_num_updates(max(0, step - warm_up))
        if step < warm_up:
            bottleneck.observe(points)
        else:
            output = bottleneck(points)
            if optimiser is not None:
                terms = (output.latents - points).pow(2).mean(1) + sum(output.losses.values())
                optimiser.zero_grad()
                terms.mean().backward()
                optimiser.step()
        bottleneck.commit()
    return bottleneck.eval()


@torch.no_grad()
def judge(task: Planted, bottleneck: Bottleneck, seed: int) -> Outcome:
    """Compare what was learned with the planted centres, on points that training did not see."""
    centres = draw_centres(task, seed)
    points = draw_points(centres, 64 * task.centres, torch.Generator().manual_seed(2000 + seed))
    codes = bottleneck(points).codes
    used = codes.unique()
    near = torch.cdist(centres, bottleneck.lookup(used)).amin(1)
    apart = torch.cdist(centres, centres).fill_diagonal_(float("inf")).amin(1)
    error = (bottleneck.lookup(codes) - points).pow(2).sum(1).mean()
    best = torch.cdist(points, centres).amin(1).pow(2).mean()
    return Outcome(int((near < apart / 2).sum()), used.numel(), float(error / best))


def run_all(task: Planted, names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Outcome]]:
    """Outcomes of each contestant of ``CONTESTANTS``, one per seed."""
    outcomes: dict[str, list[Outcome]] = {}
    for name in names:
        kind, options = CONTESTANTS[name]
        warm_up = 0 if name.endswith(RANDOM_START) else WARM_UP_STEPS
        outcomes[name] = [judge(task, train(task, kind, options, s, warm_up), s) for s in seeds]
        found = [each.recovered for each in outcomes[name]]
        print(f"{name}: {np.mean(found):.1f} of {task.centres} centres", flush=True)
    return outcomes


def result_rows(outcomes: Mapping[str, Sequence[Outcome]]) -> list[ResultRow]:
    """Means ± standard deviations over seeds."""

    return [
        ResultRow(
            name,
            extra={
                "Centres": mean_and_spread([o.recovered for o in each], 1),
                "Least": str(min(o.recovered for o in each)),
                "Codes in use": mean_and_spread([o.used for o in each], 1),
                "Error": mean_and_spread([o.error for o in each], 3),
            },
        )
        for name, each in outcomes.items()
    ]


def plot(path: Path, outcomes: Mapping[str, Sequence[Outcome]], centres: int) -> None:
    """One dot per seed, one line per contestant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 0.35 * len(outcomes) + 1.2))
    for height, each in enumerate(outcomes.values()):
        found = [outcome.recovered for outcome in each]
        axes.plot(found, [height] * len(found), "o", alpha=0.4)
        axes.plot([np.mean(found)], [height], "k|", markersize=14)
    axes.set_yticks(range(len(outcomes)), list(outcomes))
    axes.axvline(centres, color="grey", linewidth=0.8)
    axes.set_xlabel(f"centres recovered of {centres} (dots: seeds, bars: means)")
    axes.invert_yaxis()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem planted``."""
    parser = subparsers.add_parser(
        "planted", help="which bottleneck finds the centres of a known Gaussian mixture"
    )
    parser.add_argument("--kinds", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=Planted.steps)
    parser.add_argument("--centres", type=int, default=Planted.centres)
    parser.add_argument("--dimension", type=int, default=Planted.dimension)
    parser.add_argument("--spread", type=float, default=Planted.spread)
    parser.add_argument("--output", type=Path, help="result file (JSON); the plot lies beside it")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.seeds < 1:
        raise UserError(f"--seeds is {arguments.seeds}: there must be at least 1")
    for name in ("centres", "dimension", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    if arguments.output and arguments.output.suffix == PLOT:
        raise UserError(
            f"--output {arguments.output} is the plot beside it: name the result file .json"
        )
    task = Planted(arguments.centres, arguments.dimension, arguments.spread, steps=arguments.steps)
    for name in arguments.kinds:  # what does not go with these numbers is refused now
        try:
            make(task, *CONTESTANTS[name])
        except UserError as error:
            raise UserError(
                f"{name} does not go with --centres {task.centres} --dimension {task.dimension}"
                f" ({error}): give --kinds without it"
            ) from error
    outcomes = run_all(task, arguments.kinds, range(arguments.seeds))
    table = ResultTable("planted", result_rows(outcomes), COLUMNS)
    signature = make_signature()
    if arguments.output:
        details = {name: [asdict(o) for o in each] for name, each in outcomes.items()}
        write_table(
            arguments.output,
            table,
            signature,
            task=asdict(task),
            seeds=arguments.seeds,
            outcomes=details,
        )
        plot(arguments.output.with_suffix(PLOT), outcomes, task.centres)
    print(render_table(table, asdict(signature)))
    return 0
