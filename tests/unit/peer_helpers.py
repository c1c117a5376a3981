"""Tiny peers, their batches and their candidates."""

from __future__ import annotations

import math
import random
from argparse import Namespace
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.data_utils import collate_tokens
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.models.transformer import TransformerModel
from torch import Tensor

from fairseq_vqem.peers.config import CTCNATConfig, DAGNATConfig, FertilityNATConfig
from fairseq_vqem.peers.generator import ParallelGenerator
from fairseq_vqem.tasks.translation_nat import TranslationNATConfig, TranslationNATTask

BOS, PAD, EOS = 0, 1, 2
SIZES = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, encoder_layers=1)
SIZES |= dict(decoder_layers=1, dropout=0.0, share_all_embeddings=True)
FAIRSEQ = ("nonautoregressive_transformer", "cmlm_transformer", "levenshtein_transformer")
PEERS = ("ctc_nat", "dag_nat", "fertility_nat")
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
        classes: dict[str, Any] = {"ctc_nat": CTCNATConfig, "dag_nat": DAGNATConfig}
        classes["fertility_nat"] = FertilityNATConfig
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
    if kind == "dag_nat":  # without preferences its path goes to the end at once
        model.edges.query.weight.data.mul_(20.0)
    return model.eval()


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
