"""Options of bottlenecks that do not fit: one clear sentence each."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fairseq_vqem.bottlenecks import BottleneckOptions, build_bottleneck
from fairseq_vqem.errors import UserError


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(codebook_size=0), "--codebook-size is 0"),
        (dict(num_codebooks=2, codebook_size=8), "not a whole number to the power of 2"),
        (dict(num_codebooks=0), "--num-codebooks is 0"),
        (dict(posterior_temperature=0.0), "--posterior-temperature is 0.0"),
        (dict(codebook_update="sums"), "--codebook-update is sums: choose sums-counts"),
        (dict(em_samples=0), "--em-samples is 0"),
        (dict(codebook_decay=1.0), "--codebook-decay is 1.0"),
        (dict(codebook_decay=-0.1), "--codebook-decay is -0.1"),
        (dict(codebook_decay=float("nan")), "--codebook-decay is nan"),
    ],
)
def test_bad_options(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names) as error:
        BottleneckOptions(**{"codebook_size": 4, "dimension": 2, **options})
    assert "\n" not in str(error.value) and ". " not in str(error.value)


def test_unknown_bottleneck() -> None:
    with pytest.raises(UserError, match=r"choose one of .*hard-em.*soft-em"):
        build_bottleneck("k-means", BottleneckOptions(4, 2))
    for care in (dict(codebook_init="kmeans++"), dict(dead_code_threshold=1.0)):
        with pytest.raises(UserError, match="--bottleneck gumbel knows neither"):
            build_bottleneck("gumbel", BottleneckOptions(4, 2, **care))  # type: ignore[arg-type]
    for name in ("no.such:Thing", "fairseq_vqem.errors:Nothing", "fairseq_vqem.errors:UserError"):
        with pytest.raises(UserError, match=f"--bottleneck {name}"):
            build_bottleneck(name, BottleneckOptions(4, 2))


@pytest.mark.parametrize(
    ("text", "message"), [("levels=8", "is not JSON"), ("[8]", "has no names")]
)
def test_options_of_an_own_class_are_json_by_name(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"{message}.* for example"):
        BottleneckOptions(4, 2, bottleneck_args=text)


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize(
    ("option", "message"),
    [("gm_gamma", "must not be negative"), ("posterior_temperature", "must be above 0")],
)
def test_numbers_out_of_range(option: str, value: float, message: str) -> None:
    flag = "--" + option.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag} is {value}: it {message}"):
        BottleneckOptions(4, 2, **{option: value})


@pytest.mark.parametrize(
    ("kind", "options", "names"),
    [
        ("semhash", dict(codebook_size=12), "--codebook-size is 12.* 8 or 16"),
        ("semhash", dict(semhash_discrete="0:2@10"), "0:2@10"),
        ("gumbel", dict(gumbel_temperature="1:0@10"), "--gumbel-temperature is 1:0@10"),
        ("gm-vq", dict(gumbel_temperature="-1"), "--gumbel-temperature is -1"),
        (
            "gumbel",
            dict(gumbel_noise="-1:1@10"),
            "--gumbel-noise: The schedule '-1:1@10' goes below",
        ),
        ("gm-vq", dict(gumbel_noise="often"), "'often' is not a schedule"),
    ],
)
def test_bad_options_of_one_kind(kind: str, options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError, match=names):
        build_bottleneck(kind, BottleneckOptions(**{"codebook_size": 4, "dimension": 2, **options}))
