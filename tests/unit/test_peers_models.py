"""Peer models through fairseq's generator: complete, batch-invariant, blind to references."""

from __future__ import annotations

import itertools
import math
import random
from argparse import Namespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import TransformerModel
from torch import Tensor

from fairseq_vqem.generation import parts
from fairseq_vqem.modules.ctc import frames_needed, frames_to_show, upsample
from fairseq_vqem.peers.config import CTCNATConfig, FertilityNATConfig
from fairseq_vqem.peers.generator import ParallelGenerator
from fairseq_vqem.peers.losses import CTCNATLoss, FertilityNATLoss
from fairseq_vqem.tasks.translation_nat import TranslationNATConfig, TranslationNATTask

BOS, PAD, EOS = 0, 1, 2
SIZES = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, encoder_layers=1)
SIZES |= dict(decoder_layers=1, dropout=0.0, share_all_embeddings=True)
FAIRSEQ = ("nonautoregressive_transformer", "cmlm_transformer", "levenshtein_transformer")
PEERS = ("ctc_nat", "fertility_nat")
WITH_CANDIDATES = ("fertility_nat", *FAIRSEQ[:2])
FAIRSEQ_SIZES = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in {
        "embed_dim": 16,
        "ffn_embed_dim": 32,
        "attention_heads": 2,
        "layers": 1,
    }.items()
}


def make_task(**options: Any) -> TranslationNATTask:
    dictionary = Dictionary()
    for number in range(20):
        dictionary.add_symbol(f"w{number}")
    config = TranslationNATConfig(source_lang="en", target_lang="de", **options)
    return TranslationNATTask(config, dictionary, dictionary)


def model_config(kind: str, **options: Any) -> Any:
    """Options of a tiny model; those that only fairseq's models have do not matter to the peers."""
    if kind in PEERS:
        classes = {"ctc_nat": CTCNATConfig, "fertility_nat": FertilityNATConfig}
        options = {name: v for name, v in options.items() if "normalize_before" not in name}
        if kind == "fertility_nat":
            options = {"max_fertility": 3, **options}
        config = classes[kind](**{**SIZES, **options})
        config._name = kind
        return config
    args = Namespace(**FAIRSEQ_SIZES, share_all_embeddings=True, dropout=0.0, **options)
    args.max_source_positions = args.max_target_positions = 100
    args.arch = args._name = kind
    ARCH_CONFIG_REGISTRY[kind](args)
    return args


def make_model(kind: str, task: TranslationNATTask | None = None, **options: Any) -> Any:
    """A random tiny model in evaluation mode; ``kind`` is an architecture."""
    torch.manual_seed(3)
    config = model_config(kind, **options)
    model: Any = ARCH_MODEL_REGISTRY[kind].build_model(config, task or make_task())
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides bugs
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("kind", PEERS)
def test_options_that_an_older_checkpoint_lacks_get_their_defaults(kind: str) -> None:
    """As a checkpoint of a named architecture, whose options fairseq does not complete."""
    config = Namespace(arch=f"{kind}_small", **vars(model_config(kind)))
    new = "glat_schedule" if kind == "ctc_nat" else "max_fertility"
    delattr(config, new)
    ARCH_MODEL_REGISTRY[kind].build_model(config, make_task())
    assert getattr(config, new) == {"glat_schedule": "0", "max_fertility": 50}[new]


def sentences(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(4, 24) for _ in range(draw.randint(0, longest))] for _ in range(count)]


def batch(
    sources: list[list[int]], targets: list[list[int]] | None = None, padding: int = 0
) -> dict[str, Any]:
    """BOS first, EOS last, sources padded on the left, by ``padding`` columns more than needed."""
    rows = [torch.tensor([BOS, *source, EOS]) for source in sources]
    width = max(map(len, rows)) + padding
    found: dict[str, Any] = {
        "id": torch.arange(len(rows)),
        "nsentences": len(rows),
        "net_input": {
            "src_tokens": collate_tokens(rows, PAD, left_pad=True, pad_to_length=width),
            "src_lengths": torch.tensor([len(row) for row in rows]),
            "prev_output_tokens": None,
        },
    }
    if targets is not None:
        rows = [torch.tensor([BOS, *target, EOS]) for target in targets]
        found["target"] = collate_tokens(rows, PAD)
        found["ntokens"] = sum(map(len, rows))
    return found


def best(
    models: list[Any], sample: dict[str, Any], remove_repeats: bool = False, **options: Any
) -> list[dict[str, Any]]:
    generator = ParallelGenerator(
        models[0].encoder.dictionary, models, Namespace(**options), remove_repeats
    )
    found = generator.generate(models, sample)
    assert all(len(hypotheses) == 1 for hypotheses in found)
    return [hypotheses[0] for hypotheses in found]


def decode(models: list[Any], sample: dict[str, Any], **options: Any) -> list[list[int]]:
    return [hypothesis["tokens"].tolist() for hypothesis in best(models, sample, **options)]


SOURCES = [*sentences(11), []]
TARGETS = [[5, 6], [7], [8, 9]]  # of the first ones


@pytest.mark.parametrize(
    ("kind", "beam"),
    [*((kind, 1) for kind in (*PEERS, *FAIRSEQ)), *((kind, 5) for kind in WITH_CANDIDATES)],
)
def test_batches_and_padding_never_change_a_hypothesis(kind: str, beam: int) -> None:
    model = make_model(kind)
    options = {"iter_decode_with_beam": beam}
    together = decode([model], batch(SOURCES), **options)
    assert len(together) == len(SOURCES)
    assert len({tuple(tokens) for tokens in together}) > 6
    assert decode([model], batch(SOURCES, padding=3), **options) == together
    assert decode([model], batch(SOURCES[::-1]), **options) == together[::-1]
    assert [decode([model], batch([source]), **options)[0] for source in SOURCES] == together


@pytest.mark.parametrize("kind", [*PEERS, *FAIRSEQ])
def test_references_never_change_a_hypothesis(kind: str) -> None:
    model = make_model(kind)
    blind = decode([model], batch(SOURCES))
    assert decode([model], batch(SOURCES, sentences(len(SOURCES), seed=5))) == blind


@pytest.mark.parametrize("kind", PEERS)
def test_hypotheses_begin_end_and_hold_words_only(kind: str) -> None:
    model = make_model(kind)
    model.decoder.embed_tokens.weight.data[[PAD, EOS]] *= 30  # would be chosen if they were allowed
    for tokens in decode([model], batch(SOURCES)):
        assert tokens[0] == BOS and tokens[-1] == EOS
        assert not {BOS, PAD, EOS} & set(tokens[1:-1])


@pytest.mark.parametrize("kind", [*PEERS, *FAIRSEQ])
def test_history_and_scores(kind: str) -> None:
    model = make_model(kind)
    options = Namespace(retain_iter_history=True)
    generator = ParallelGenerator(model.encoder.dictionary, [model], options)
    for (hypothesis,) in generator.generate([model], batch(SOURCES)):
        assert hypothesis["positional_scores"].shape == hypothesis["tokens"].shape
        assert hypothesis["history"][-1]["tokens"].tolist() == hypothesis["tokens"].tolist()
        assert float(hypothesis["score"]) <= 0.0
        assert (hypothesis["steps"] == 0) == (kind in PEERS or kind == FAIRSEQ[0])


def candidates_of(model: Any, source: list[int], count: int) -> list[dict[str, Any]]:
    """Every candidate of one sentence, each decoded alone."""
    inputs = batch([source])["net_input"]
    encoder_out = model.forward_encoder([inputs["src_tokens"], inputs["src_lengths"]])
    start = model.initialize_output_tokens(encoder_out, inputs["src_tokens"])
    starts = model.regenerate_length_beam(start, count).output_tokens
    found = []
    for row in starts:
        tokens = row[row.ne(PAD)].unsqueeze(0)
        record = start._replace(output_tokens=tokens, output_scores=torch.zeros(tokens.shape))
        out = model.forward_decoder(record, encoder_out)
        real = out.output_tokens[0].ne(PAD)
        scores = out.output_scores[0][real]
        words = scores[1:-1]
        score = float(words.mean()) if len(words) else -math.inf
        found.append({"tokens": out.output_tokens[0][real], "score": score})
    return found


@torch.no_grad()
def teacher_score(teacher: Any, source: list[int], tokens: Tensor) -> float:
    """Mean log-probability per token of one unpadded pair, as the teacher was trained: no BOS."""
    src_tokens = torch.tensor([[*source, EOS]])
    target = tokens[1:].unsqueeze(0)
    previous = torch.cat([torch.tensor([[EOS]]), target[:, :-1]], 1)
    logits = teacher(src_tokens, torch.tensor([len(source) + 1]), previous)[0]
    log_probabilities = torch.log_softmax(logits, -1).gather(2, target.unsqueeze(2))
    return float(log_probabilities.mean())


def make_teacher(task: TranslationNATTask) -> Any:
    torch.manual_seed(8)
    args = Namespace(**FAIRSEQ_SIZES, share_all_embeddings=True, dropout=0.0)
    args.max_source_positions = args.max_target_positions = 100
    ARCH_CONFIG_REGISTRY["transformer"](args)
    return TransformerModel.build_model(args, task).eval()


@pytest.mark.parametrize("kind", WITH_CANDIDATES)
@pytest.mark.parametrize("count", [2, 10, 100])
def test_no_empty_candidate_wins_where_there_are_words(kind: str, count: int) -> None:
    """fairseq counts the ends as two sure words, which makes the empty one the best of all."""
    found = decode([make_model(kind)], batch(SOURCES[:8]), iter_decode_with_beam=count)
    alone = decode([make_model(kind)], batch(SOURCES[:8]))
    assert sum(len(tokens) == 2 for tokens in found) <= sum(len(tokens) == 2 for tokens in alone)
    assert any(len(tokens) > 2 for tokens in found)


@pytest.mark.parametrize("kind", ["fertility_nat", "nonautoregressive_transformer"])
@pytest.mark.parametrize("count", [2, 10, 100])
def test_best_candidate_by_own_and_by_teachers_score(kind: str, count: int) -> None:
    task = make_task()
    model, teacher = make_model(kind, task), make_teacher(task)
    sources = [*SOURCES[:3], []]
    options = dict(iter_decode_with_beam=count)
    own = decode([model], batch(sources), **options)
    options["iter_decode_with_external_reranker"] = True
    taught = best([model, teacher], batch(sources), **options)
    for row, source in enumerate(sources):
        candidates = candidates_of(model, source, count)
        assert len(candidates) == count
        likeliest = max(candidates, key=lambda candidate: candidate["score"])
        assert own[row] == likeliest["tokens"].tolist()
        scores = [teacher_score(teacher, source, each["tokens"]) for each in candidates]
        chosen = candidates[max(range(count), key=lambda i: scores[i])]
        assert taught[row]["tokens"].tolist() == chosen["tokens"].tolist()
        assert float(taught[row]["score"]) == pytest.approx(max(scores), abs=1e-5)


def test_first_candidate_is_the_most_probable() -> None:
    model = make_model("fertility_nat")
    for source, tokens in zip(SOURCES, decode([model], batch(SOURCES)), strict=True):
        assert candidates_of(model, source, 3)[0]["tokens"].tolist() == tokens


def test_large_batches_of_candidates_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("fertility_nat")
    whole = decode([model], batch(SOURCES), iter_decode_with_beam=5)
    rows = []
    forward = model.forward_decoder
    width = max(map(len, SOURCES)) + 2
    monkeypatch.setattr(parts, "MOST_TOKENS", 11 * width)
    monkeypatch.setattr(
        model,
        "forward_decoder",
        lambda out, *a, **k: rows.append(len(out[0])) or forward(out, *a, **k),
    )
    assert decode([model], batch(SOURCES), iter_decode_with_beam=5) == whole
    assert rows == [10] * 6


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("kind", ["nonautoregressive_transformer", "fertility_nat"])
def test_repeats_are_removed_before_the_teacher_judges(kind: str, count: int) -> None:
    task = make_task()
    model, teacher = make_model(kind, task), make_teacher(task)
    options = {"iter_decode_with_beam": count}
    plain = decode([model], batch(SOURCES), **options)
    removed = best([model], batch(SOURCES), remove_repeats=True, **options)
    assert [each["tokens"].tolist() for each in removed] == [collapsed(tokens) for tokens in plain]
    assert any(collapsed(tokens) != tokens for tokens in plain)
    if count > 1:
        options["iter_decode_with_external_reranker"] = True
        taught = best([model, teacher], batch(SOURCES), remove_repeats=True, **options)
        for source, each in zip(SOURCES, taught, strict=True):
            assert collapsed(each["tokens"].tolist()) == each["tokens"].tolist()
            wanted = teacher_score(teacher, source, each["tokens"])
            assert float(each["score"]) == pytest.approx(wanted, abs=1e-5)


def collapsed(tokens: list[int]) -> list[int]:
    return [token for token, _ in itertools.groupby(tokens)]


# ---------------------------------------------------------------------- ctc_nat


def test_each_source_token_gives_as_many_frames_as_asked() -> None:
    model = make_model("ctc_nat", upsample_scale=3)
    sample = batch([[4, 5], [6]], padding=2)
    encoder_out = model.encoder(sample["net_input"]["src_tokens"])
    inputs, frames = upsample(encoder_out, 3)
    assert frames.sum(1).tolist() == [12, 9]
    embed = model.encoder.embed_scale * model.encoder.embed_tokens.weight
    for row, source in enumerate([[BOS, 4, 5, EOS], [BOS, 6, EOS]]):
        for frame in range(3 * len(source)):
            assert frames[row, frame]
            assert torch.allclose(inputs[row, frame], embed[source[frame // 3]])


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_glancing_reveals_a_share_of_the_wrong_frames(ratio: float) -> None:
    model = make_model("ctc_nat", glat_schedule=f"{ratio}:0@10").train()
    sources = SOURCES[:8]
    targets = [*sentences(7, seed=2, longest=6), [5] * 30]  # the last does not fit
    sample = batch(sources, targets)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = model.decoder.forward
    model.decoder.forward = lambda x, mask, out: (
        seen.append((x, forward(x, mask, out))) or seen[-1][1]
    )
    output = model(**sample["net_input"], target=sample["target"])
    (plain, first), (shown, _) = seen
    changed = (plain != shown).any(-1)
    assert not (changed & ~output.glanced).any()
    torch.manual_seed(0)
    aligned, _ = frames_to_show(
        first, output.frames, output.words, output.counts, model.blank, ratio
    )
    embed = model.decoder.embed_scale * model.decoder.embed_tokens.weight
    assert torch.allclose(shown[output.glanced], embed[aligned[output.glanced]])
    for row in range(len(sources)):
        real = output.frames[row]
        wrong = int((first[row].argmax(-1) != aligned[row])[real].sum())
        expected = int(ratio * wrong) if row < 7 else 0
        assert int(output.glanced[row].sum()) == expected
    assert output.glanced.any()
    model.set_num_updates(10)
    assert not model(**sample["net_input"], target=sample["target"]).glanced.any()
    model.set_num_updates(0)
    assert not model.eval()(**sample["net_input"], target=sample["target"]).glanced.any()


def test_ctc_loss_counts_what_does_not_fit() -> None:
    task = make_task()
    model = make_model("ctc_nat", task)
    targets = [[5, 6], [7] * 4, [8], []]  # 4 frames of an empty source hold 2 equal words, not 4
    sample = batch([[4], [], [4, 5], [6]], targets)
    loss, size, log = CTCNATLoss(task, label_smoothing=0.0)(model, sample)
    kept = [0, 2, 3]
    rest = batch([[[4], [], [4, 5], [6]][i] for i in kept], [targets[i] for i in kept])
    alone, alone_size, alone_log = CTCNATLoss(task, label_smoothing=0.0)(model, rest)
    assert (size, alone_size) == (4, 4)  # the empty target has a likelihood too, and counts as one
    assert int(log["unfit"]) == 1 and int(alone_log["unfit"]) == 0
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    assert float(loss) > 0
    words, counts = torch.tensor([[7] * 4]), torch.tensor([4])
    assert frames_needed(words, counts).item() == 7


def test_ctc_end_penalty_is_taken_from_the_blank() -> None:
    model = make_model("ctc_nat")
    wanted = decode([model], batch(SOURCES))
    forward, favour = model.decoder.forward, torch.zeros(24)
    favour[model.blank] = 3.0
    model.decoder.forward = lambda *args: forward(*args) + favour
    favoured = decode([model], batch(SOURCES))
    assert sum(map(len, favoured)) < 0.7 * sum(map(len, wanted))
    assert decode([model], batch(SOURCES), iter_decode_eos_penalty=3.0) == wanted


def test_ctc_label_smoothing_adds_the_mean_uniform_cross_entropy() -> None:
    """For each word, of its sentence: so that a batch is the sum of its sentences."""
    task = make_task()
    model = make_model("ctc_nat", task)
    sample = batch(SOURCES[:3], TARGETS)
    nll, *_ = CTCNATLoss(task, label_smoothing=0.0)(model, sample)
    smoothed, _, log = CTCNATLoss(task, label_smoothing=0.2)(model, sample)
    output = model(**sample["net_input"], target=sample["target"])
    uniform = 0.0
    for row, mask, count in zip(output.logits, output.frames, output.counts, strict=True):
        uniform -= float(count * torch.log_softmax(row[mask], -1).mean())
    assert float(smoothed) == pytest.approx(0.8 * float(nll) + 0.2 * uniform, rel=1e-5)
    parts = [batch([source], [words]) for source, words in zip(SOURCES[:3], TARGETS, strict=True)]
    losses = [float(CTCNATLoss(task, label_smoothing=0.2)(model, part)[0]) for part in parts]
    assert sum(losses) == pytest.approx(float(smoothed), rel=1e-5)
    assert float(log["nll"]) == pytest.approx(float(nll))


# ---------------------------------------------------------------------- fertility_nat


def with_links(sample: dict[str, Any], links: list[list[int]]) -> dict[str, Any]:
    """Links as fairseq collates them, from the source place of each target word."""
    source, width = sample["net_input"]["src_tokens"], sample["target"].size(1)
    lengths = sample["net_input"]["src_lengths"]
    found = [
        [source.size(1) - int(lengths[row]) + place, row * width + target]
        for row, places in enumerate(links)
        for target, place in enumerate(places)
    ]
    return {**sample, "alignments": torch.tensor(found)}


def test_fertility_loss_by_hand() -> None:
    task = make_task()
    model = make_model("fertility_nat", task)
    sources, targets = [[4, 5, 6], [7], []], [[8, 9], [10, 11, 12, 13, 14], [15]]
    sample = with_links(batch(sources, targets, padding=1), [[2, 0], [0] * 5, []])
    criterion = FertilityNATLoss(task, label_smoothing=0.0, fertility_weight=0.5)
    loss, size, _ = criterion(model, sample)
    copies, gold = [[4, 6, EOS], [7] * 5 + [EOS]], [[1, 0, 1], [3]]  # 5 counts as the most, 3
    words, fertility = 0.0, 0.0
    for source, target, copied, counts in zip(sources, targets, copies, gold, strict=False):
        out = model.encoder(torch.tensor([[BOS, *source, EOS]]))
        head = torch.log_softmax(model.fertility_head(out["encoder_out"][0][1:-1, 0]), -1)
        fertility -= sum(float(head[i, count]) for i, count in enumerate(counts))
        inputs = model.encoder.embed_scale * model.encoder.embed_tokens(torch.tensor([copied]))
        logits = model.decoder(inputs, torch.ones(1, len(copied)).bool(), out)
        log_probabilities = torch.log_softmax(logits[0], -1)
        words -= sum(float(log_probabilities[i, t]) for i, t in enumerate([*target, EOS]))
    assert size == 3 + 6
    assert float(loss) == pytest.approx(words + 0.5 * fertility, rel=1e-5)


def test_what_the_teacher_could_not_align_is_left_out() -> None:
    task = make_task()
    model = make_model("fertility_nat", task)
    criterion = FertilityNATLoss(task, label_smoothing=0.1, fertility_weight=0.5)
    sources, targets, links = [[4, 5, 6], [7, 8], [9]], [[8, 9], [10], [11]], [[2, 0], [], [0]]
    loss, size, _ = criterion(model, with_links(batch(sources, targets), links))
    kept = [[each[0], each[2]] for each in (sources, targets, links)]
    alone, alone_size, _ = criterion(model, with_links(batch(*kept[:2]), kept[2]))
    assert size == alone_size == 3 + 2
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)


def test_output_is_as_long_as_the_fertilities_say() -> None:
    model = make_model("fertility_nat")
    hypotheses = decode([model], batch(SOURCES))
    for source, tokens in zip(SOURCES, hypotheses, strict=True):
        out = model.encoder(torch.tensor([[BOS, *source, EOS]]))
        fertilities = model.fertility_logits(out)[0, 1:-1].argmax(-1)
        assert len(tokens) == 1 + int(fertilities.sum()) + 1  # BOS, words, EOS
    assert hypotheses[-1] == [BOS, EOS]
