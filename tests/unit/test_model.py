"""The whole model: invariance to batching and padding, schedules, errors, every switch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from torch import Tensor

from fairseq_vqem.criterions.vqem_loss import VQEMLoss
from fairseq_vqem.errors import UserError
from fairseq_vqem.models import VQEMOutput, VQEMTransformer

CLOSE = dict(rtol=1e-3, atol=2e-5)
LENGTHS = ("end", "source")


def loss_function(tiny: Any, **options: Any) -> VQEMLoss:
    defaults = dict(label_smoothing=0.1, commitment_weight="0.25", latent_weight="1.0")
    return VQEMLoss(tiny.task(), **{**defaults, **options})


def forward(model: VQEMTransformer, batch: dict[str, Any], **more: Any) -> VQEMOutput:
    output: VQEMOutput = model(**batch["net_input"], target=batch["target"], **more)
    return output


def codes(model: VQEMTransformer, batch: dict[str, Any]) -> list[list[int]]:
    net = batch["net_input"]
    encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    found = model.posterior_codes(batch["target"], net["src_lengths"], encoder_out)
    return [row[row.ge(0)].tolist() for row in found]


def assert_user_error(match: str, action: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        action()
    assert "\n" not in str(error.value)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_length", LENGTHS)
@pytest.mark.parametrize("kind", ["soft-em", "hard-em"])
def test_batching_padding_and_order_change_nothing(
    tiny: Any, kind: str, latent_length: str
) -> None:
    model = tiny.model(
        bottleneck=kind, latent_length=latent_length, target_encoder_attend_source=True
    )
    criterion = loss_function(tiny)
    pairs = tiny.pairs(9, seed=5)
    pairs[4] = (pairs[4][0], [])  # an empty target
    alone = [tiny.batch([pair]) for pair in pairs]
    wanted_codes = [codes(model, batch)[0] for batch in alone]
    assert len({tuple(row) for row in wanted_codes}) > 3
    with torch.no_grad():
        wanted_loss = sum(float(criterion(model, batch)[0]) for batch in alone)
        wanted = [forward(model, batch) for batch in alone]
    order = [3, 8, 0, 7, 1, 2, 6, 5, 4]
    for padding in ((0, 0), (3, 0), (0, 5), (2, 9)):
        batch = tiny.batch([pairs[i] for i in order], *padding)
        assert codes(model, batch) == [wanted_codes[i] for i in order]
        with torch.no_grad():
            assert float(criterion(model, batch)[0]) == pytest.approx(wanted_loss, rel=1e-4)
            out = forward(model, batch)
        for row, i in enumerate(order):
            real = wanted[i].labels[0].ne(model.pad).nonzero().flatten()
            torch.testing.assert_close(out.logits[row, real], wanted[i].logits[0, real], **CLOSE)
            count = len(wanted_codes[i])
            torch.testing.assert_close(
                out.latent_logits[row, :count], wanted[i].latent_logits[0, :count], **CLOSE
            )


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_number_of_latents(tiny: Any, latent_length: str) -> None:
    model = tiny.model(latent_length=latent_length)
    pairs = [([5] * n, [6] * k) for n in (1, 4, 9) for k in (0, 3, 4, 11)]
    for (source, target), row in zip(pairs, codes(model, tiny.batch(pairs)), strict=True):
        positions = len(target) + 1
        if latent_length == "source":
            positions = max(positions, 2 * (len(source) + 1))
        assert len(row) == -(-positions // model.multiple)


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_padding_never_touches_the_statistics(tiny: Any, latent_length: str) -> None:
    """Exactly the real latents are counted, and more padding gathers the same sums."""
    pairs = tiny.pairs(6, seed=1)
    gathered = []
    for padding in ((0, 0), (4, 8)):
        model = tiny.model(bottleneck="hard-em", latent_length=latent_length).train()
        output = forward(model, tiny.batch(pairs, *padding))
        book = model.bottleneck.codebook
        assert book.pending_counts.sum() == sum(map(len, codes(model.eval(), tiny.batch(pairs))))
        assert output.bottleneck.codes.numel() == int(output.latent_mask.sum())
        gathered.append((book.pending_counts.clone(), book.pending_sums.clone()))
    assert torch.equal(gathered[0][0], gathered[1][0])
    torch.testing.assert_close(gathered[0][1], gathered[1][1], **CLOSE)


def test_latent_tokens_end_where_the_sentence_ends(tiny: Any) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    numbers = torch.tensor([4, 5, 6, 7, 8])
    for latent_length in LENGTHS:
        model = tiny.model(latent_length=latent_length)
        d = model.latent_dictionary
        end = d.eos() if latent_length == "end" else d.pad()
        o, pad = d.offset, d.pad()
        assert model.latent_tokens(numbers, mask).tolist() == [
            [4 + o, 5 + o, end, pad],
            [6 + o, 7 + o, 8 + o, end],
        ]


def test_the_predictor_sees_only_earlier_codes(tiny: Any) -> None:
    model = tiny.model()
    net = tiny.batch(tiny.pairs(1))["net_input"]
    out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    d = model.latent_dictionary
    tokens = torch.tensor([[0, 1, 2, 3]]) + d.offset
    tokens = torch.cat([tokens, torch.tensor([[d.eos()]])], 1)
    changed = tokens.clone()
    changed[0, 2] = 9 + d.offset
    moved = model.predict_latents(tokens, out) - model.predict_latents(changed, out)
    reached = moved.abs().amax(-1)[0] > 1e-5
    assert reached.tolist() == [False, False, False, True, True]


def test_decoding_the_posterior_codes_is_the_evaluation_forward(tiny: Any) -> None:
    model = tiny.model(target_encoder_attend_source=True)
    batch = tiny.batch(tiny.pairs(5))
    net = batch["net_input"]
    out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    found = model.posterior_codes(batch["target"], net["src_lengths"], out)
    expected = forward(model, batch)
    real = expected.labels.ne(model.pad)
    logits = model.decode_codes(found, out)
    torch.testing.assert_close(logits[real], expected.logits[real], **CLOSE)


# --- schedules and evaluation -------------------------------------------------------------------


def test_warm_up_observes_and_does_not_quantise(tiny: Any) -> None:
    model = tiny.model(quantise_schedule="0:1@2-2").train()
    batch = tiny.batch(tiny.pairs(3))
    before = model.bottleneck.codebook.embeddings.clone()
    output = forward(model, batch)
    assert output.bottleneck is None and output.latent_logits is None
    model.bottleneck.commit()
    book = model.bottleneck.codebook
    assert int(book.observed) == min(int(output.latent_mask.sum()), 12)
    assert not torch.equal(book.embeddings, before) and book.counts.eq(1).all()
    output.logits.sum().backward()
    assert model.target_encoder.compressor.strided[0].weight.grad.abs().sum() > 0
    model.set_num_updates(2)
    assert forward(model, batch).bottleneck is not None
    assert int(book.pending_counts.sum().round()) == int(output.latent_mask.sum())
    model.set_num_updates(0)
    assert forward(model.eval(), batch).bottleneck is not None  # evaluation always quantises


@pytest.mark.parametrize("attend", [True, False])
def test_warm_up_gives_every_parameter_a_gradient(tiny: Any, attend: bool) -> None:
    """DistributedDataParallel, fairseq's default for several workers, fails otherwise."""
    model = tiny.model(quantise_schedule="0", decoder_attend_source=attend).train()
    loss, _, _ = loss_function(tiny)(model, tiny.batch(tiny.pairs(3)))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert all(parameter.grad.eq(0).all() for parameter in model.latent_predictor.parameters())


def test_a_share_is_quantised(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(quantise_schedule="0.5").train()
    rows: list[Tensor] = []
    model.expander.register_forward_pre_hook(lambda _, args: rows.append(args[0][args[1]]))
    output = forward(model, tiny.batch(tiny.pairs(200)))
    quantised = (rows[0] - output.bottleneck.latents).abs().amax(1) < 1e-6
    assert abs(quantised.float().mean() - 0.5) < 0.12
    assert model.bottleneck.codebook.pending_counts.sum().round() == quantised.numel()


def test_a_share_of_latents_is_the_predictor_s(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(predicted_schedule="0.5").train()
    rows: list[Tensor] = []
    model.expander.register_forward_pre_hook(lambda _, args: rows.append(args[0][args[1]]))
    output = forward(model, tiny.batch(tiny.pairs(200)))
    at_codes = output.latent_logits[:, :-1][output.latent_mask]
    choice = at_codes[:, model.latent_dictionary.offset :].argmax(-1)
    from_predictor = (rows[0] - model.bottleneck.lookup(choice)).abs().amax(1) < 1e-6
    from_posterior = (rows[0] - output.bottleneck.latents).abs().amax(1) < 1e-6
    assert (from_predictor | from_posterior).all()
    differs = (model.bottleneck.lookup(choice) - output.bottleneck.latents).abs().amax(1) > 1e-6
    assert abs(from_predictor[differs].float().mean() - 0.5) < 0.12
    in_evaluation = forward(model.eval(), tiny.batch(tiny.pairs(200)))
    assert torch.allclose(rows[1], in_evaluation.bottleneck.latents)


def test_gold_words_are_no_labels(tiny: Any) -> None:
    torch.manual_seed(0)
    model = tiny.model(gold_schedule="0.4").train()
    inputs: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    batch = tiny.batch(tiny.pairs(150))
    output = forward(model, batch)
    target = torch.nn.functional.pad(
        batch["target"], (0, output.labels.size(1) - batch["target"].size(1)), value=model.pad
    )
    real = target.ne(model.pad)
    gold = real & output.labels.eq(model.pad)
    assert abs(gold.sum() / real.sum() - 0.4) < 0.06
    assert torch.equal(output.labels[real & ~gold], target[real & ~gold])
    embedded = 4.0 * model.decoder.embed_tokens(target)  # sqrt of 16
    is_gold = (inputs[0] - embedded).abs().amax(-1) < 1e-6
    assert torch.equal(is_gold & real, gold)
    assert forward(model.eval(), batch).labels.eq(target).all()  # no gold words in evaluation


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_evaluation_changes_nothing(tiny: Any, latent_length: str) -> None:
    model = tiny.model(latent_length=latent_length, dropout=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    book = model.bottleneck.codebook
    batch = tiny.batch(tiny.pairs(4))
    first, second = forward(model, batch), forward(model, batch)
    codes(model, batch)
    model.bottleneck.commit()
    assert torch.equal(first.logits, second.logits)
    assert book.pending_counts.eq(0).all() and not book._has_pending_hits
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_generator_may_be_built_for_a_model_in_training_mode(tiny: Any) -> None:
    """Finding the PAD latent must neither gather statistics nor depend on dropout."""
    task = tiny.task(stop_at_pad_latent=True)
    model = tiny.model(task, latent_length="source", dropout=0.5)
    wanted = model.pad_code()
    model.train()
    for _ in range(5):
        assert task.build_generator([model], SimpleNamespace()).search.stop_code == wanted
        model.train()
    assert model.bottleneck.codebook.pending_counts.eq(0).all()


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_low_precision_keeps_the_codebook(tiny: Any, cast: str) -> None:
    model = tiny.model()
    before = model.bottleneck.codebook.embeddings.clone()
    getattr(model, cast)()
    after = model.bottleneck.codebook.embeddings
    assert after.dtype == torch.float32 and torch.equal(after, before)
    output = forward(model.train(), tiny.batch(tiny.pairs(4)))
    assert output.logits.dtype != torch.float32 and output.logits.isfinite().all()
    model.bottleneck.commit()
    assert model.bottleneck.codebook.sums.dtype == torch.float32


# --- the task's training step ---------------------------------------------------------------------


class Optimiser:
    """As much of fairseq's optimiser as a task's training step uses."""

    def __init__(self, model: VQEMTransformer) -> None:
        self.inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.inner.step()


def train(model: VQEMTransformer, task: Any, batches: list[tuple[dict[str, Any], bool]]) -> None:
    optimiser, criterion = Optimiser(model), VQEMLoss(task, 0.0, "0.25", "1")
    for batch, dummy in batches:
        task.train_step(batch, model, criterion, optimiser, 0, ignore_grad=dummy)
    task.optimizer_step(optimiser, model, 0)


@pytest.mark.parametrize("schedule", ["1", "0"])
def test_a_dummy_batch_leaves_no_trace(tiny: Any, schedule: str) -> None:
    """Not even if it is accumulated after a real one, as at the end of an epoch."""
    task = tiny.task()
    real, dummy = tiny.batch(tiny.pairs(4)), tiny.batch(tiny.pairs(2, seed=9))
    results = []
    for batches in (
        [(real, False)],
        [(real, False), (dummy, True)],
        [(dummy, True), (real, False)],
    ):
        model = tiny.model(task, bottleneck="hard-em", quantise_schedule=schedule)
        train(model, task, batches)
        results.append(model.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_noise_reaches_only_the_target_encoder(tiny: Any) -> None:
    task = tiny.task(word_dropout=1.0, word_shuffle=1.0)
    model, batch = tiny.model(task), tiny.batch(tiny.pairs(3))
    seen: list[Tensor] = []
    model.target_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    target = batch["target"].clone()
    train(model, task, [(batch, False)])
    words = target.ne(1) & target.ne(2)
    assert seen[0][:, : target.size(1)][words].eq(3).all()
    assert torch.equal(batch["target"], target)
    for name in ("word_dropout", "word_shuffle"):
        option = name.replace("_", "-")
        assert_user_error(f"--{option} is 1.5", lambda name=name: tiny.task(**{name: 1.5}))


class Wrapper(torch.nn.Module):
    """As fairseq's wrapper for several workers, which passes attributes on."""

    def __init__(self, model: VQEMTransformer) -> None:
        super().__init__()
        self.module = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_validation_bleu_with_one_and_several_workers(tiny: Any) -> None:
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args="{}")
    model, batch = tiny.model(task), tiny.batch(tiny.pairs(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logs = []
    for each in (model, Wrapper(model)):
        loss, _, log = task.valid_step(batch, each, VQEMLoss(task, 0.0, "0.25", "1"))
        assert loss.isfinite()
        logs.append({key: value for key, value in log.items() if key.startswith("_")})
    assert logs[0] == logs[1]
    references = batch["ntokens"] - 3  # without ends; a word is a token here
    assert logs[0]["_bleu_ref_len"] == logs[0]["_posterior_bleu_ref_len"] == references
    assert logs[0]["_posterior_bleu_totals_0"] == logs[0]["_posterior_bleu_sys_len"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_subwords_are_joined_for_bleu(tiny: Any) -> None:
    plain = tiny.task()
    assert plain.detokenise(torch.tensor([5, 6, 2])) == "w1 w2"
    pieces = tiny.dictionary(0)
    for symbol in ("\u2581ge", "hen", "\u2581wir"):
        pieces.add_symbol(symbol)
    assert tiny.task(pieces).detokenise(torch.tensor([4, 5, 6, 2])) == "gehen wir"
    halves = tiny.dictionary(0)
    for symbol in ("ge@@", "hen", "wir"):
        halves.add_symbol(symbol)
    task = tiny.task(halves, eval_bleu_remove_bpe="@@ ")
    assert task.detokenise(torch.tensor([4, 5, 6, 2])) == "gehen wir"


# --- every switch ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(bottleneck="hard-em"),
        dict(codebook_update="literal"),
        dict(em_samples=1),
        dict(compress_steps=1),
        dict(compress_steps=4),
        dict(residual_blocks=0),
        dict(residual_blocks=2, residual_placement="before"),
        dict(expander="transposed-conv"),
        dict(decoder_attend_source=False),
        dict(target_encoder_attend_source=True),
        dict(causal_decoder=True),
        dict(latent_length="source"),
        dict(share_all_embeddings=False),
        dict(gold_schedule="0.5"),
        dict(quantise_schedule="0.5"),
        dict(predicted_schedule="0.3"),
        dict(dropout=0.2, attention_dropout=0.1, activation_dropout=0.1),
        dict(encoder_layers=2, latent_layers=3, decoder_layers=2),
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()) or "default",
)
def test_every_switch_trains(tiny: Any, options: dict[str, Any]) -> None:
    model = tiny.model(**options).train()
    loss, size, _ = loss_function(tiny)(model, tiny.batch(tiny.pairs(4)))
    assert loss.isfinite() and size > 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    before = model.bottleneck.codebook.embeddings.clone()
    model.bottleneck.commit()
    after = model.bottleneck.codebook.embeddings
    assert after.isfinite().all() and not torch.equal(before, after)


def test_layer_counts(tiny: Any) -> None:
    model = tiny.model(encoder_layers=1, latent_layers=2, decoder_layers=3)
    parts = (model.encoder, model.latent_predictor, model.decoder)
    assert [len(part.layers) for part in parts] == [1, 2, 3]


# --- errors ---------------------------------------------------------------------------------------


def test_wrong_task(tiny: Any) -> None:
    plain = SimpleNamespace(source_dictionary=tiny.dictionary(), target_dictionary=None)
    assert_user_error("--task translation_vqem", lambda: tiny.model(plain))


def test_differing_dictionaries(tiny: Any) -> None:
    task = tiny.task(tiny.dictionary(20), tiny.dictionary(21))
    assert_user_error("--no-share-all-embeddings", lambda: tiny.model(task))
    model = tiny.model(task, share_all_embeddings=False)
    assert len(model.encoder.embed_tokens.weight) + 1 == len(model.decoder.embed_tokens.weight)


def test_too_long_target(tiny: Any) -> None:
    model = tiny.model(max_target_positions=8)
    forward(model, tiny.batch([([5], [6] * 7)], target_padding=20))
    long = tiny.batch([([5], [6] * 8)])
    assert_user_error("9 positions exceeds --max-target-positions 8", lambda: forward(model, long))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(compress_steps=0), "--compress-steps is 0"),
        (dict(attention_heads=3), "not divisible"),
        (dict(codebook_size=1), "--codebook-size is 1"),
        (dict(bottleneck="vq"), "--bottleneck vq is not known"),
        (dict(quantise_schedule="2"), "above its maximum"),
        (dict(gold_schedule="soon"), "not a schedule"),
    ],
)
def test_options_that_do_not_fit(tiny: Any, options: dict[str, Any], match: str) -> None:
    assert_user_error(match, lambda: tiny.model(**options))


def test_checkpoint_of_other_sizes(tiny: Any) -> None:
    saved = tiny.model(codebook_size=13).state_dict()
    assert_user_error("--codebook-size", lambda: tiny.model().load_state_dict(saved))
    same = tiny.model(seed=1)
    same.load_state_dict(tiny.model(seed=2).state_dict())
    assert torch.equal(
        same.decoder.embed_tokens.weight, tiny.model(seed=2).decoder.embed_tokens.weight
    )


def test_pad_code_needs_the_source_length_mode(tiny: Any) -> None:
    assert_user_error("--latent-length source", lambda: tiny.model().pad_code())
    for longest in (1024, 24):  # shorter than the usual probe of 16 latents
        model = tiny.model(latent_length="source", max_target_positions=longest)
        assert 0 <= model.pad_code() < 12


# --- init_from ------------------------------------------------------------------------------------


def save_teacher(tiny: Any, folder: Path, size: int = 16, before: bool = True) -> Path:
    config = TransformerConfig()
    for part in (config.encoder, config.decoder):
        part.embed_dim, part.ffn_embed_dim, part.attention_heads = size, 32, 2
        part.layers, part.normalize_before = 2, before
    config.decoder.output_dim = config.decoder.input_dim = size
    config.share_all_embeddings = True
    config.max_source_positions = config.max_target_positions = 64
    torch.manual_seed(5)
    teacher = TransformerModelBase.build_model(config, tiny.task())
    path = folder / f"teacher{size}{before}.pt"
    torch.save({"model": teacher.state_dict(), "args": None, "cfg": {"model": {}}}, path)
    return path


@pytest.fixture()
def plain_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file above is only as much of a checkpoint as is read from it."""
    monkeypatch.setattr(
        "fairseq.checkpoint_utils.load_checkpoint_to_cpu", lambda path: torch.load(path)
    )


def build(tiny: Any, teacher: Path, **options: Any) -> VQEMTransformer:
    task = tiny.task()
    task.initialises_models = True
    from fairseq_vqem.models.config import VQEMTransformerConfig

    sizes = dict(embed_dim=16, ffn_embed_dim=32, attention_heads=2, encoder_layers=1)
    sizes |= dict(latent_layers=3, decoder_layers=2, codebook_size=12)
    return VQEMTransformer.build_model(
        VQEMTransformerConfig(**{**sizes, "init_from": str(teacher), **options}), task
    )


@pytest.mark.usefixtures("plain_loading")
def test_init_from_copies_what_it_says(tiny: Any, tmp_path: Path) -> None:
    path = save_teacher(tiny, tmp_path)
    teacher = torch.load(path)["model"]
    own = build(tiny, path).state_dict()
    assert torch.equal(own["encoder.embed_tokens.weight"], teacher["encoder.embed_tokens.weight"])
    assert torch.equal(own["decoder.output_projection.weight"], own["decoder.embed_tokens.weight"])
    compared = 0
    for name, value in own.items():
        origin = name.replace("latent_predictor.", "decoder.")
        has_place = ".layers." in name or ".layer_norm." in name
        if has_place and origin in teacher:
            assert torch.equal(value, teacher[origin]), name
            compared += 1
    assert compared > 60
    third = "latent_predictor.layers.2.fc1.weight"  # the teacher has two layers
    assert third in own and third.replace("latent_predictor", "decoder") not in teacher
    fresh = build(tiny, path, decoder_attend_source=False).state_dict()
    assert not any("decoder.layers.0.encoder_attn" in name for name in fresh)


@pytest.mark.usefixtures("plain_loading")
def test_init_from_refuses_other_teachers(tiny: Any, tmp_path: Path) -> None:
    path = save_teacher(tiny, tmp_path, size=8)
    assert_user_error(
        "use a Transformer teacher of the same --embed-dim", lambda: build(tiny, path)
    )
    path = save_teacher(tiny, tmp_path, before=False)
    assert_user_error("--encoder-normalize-before", lambda: build(tiny, path))


def test_init_from_is_not_read_for_a_checkpoint(tiny: Any) -> None:
    """A trained student must load where its teacher's file is long gone."""
    tiny.model(init_from="/nonexistent/teacher.pt")


def test_options_of_later_versions_get_their_defaults(tiny: Any) -> None:
    """A checkpoint's configuration holds only the options that existed when it was trained."""
    from argparse import Namespace

    from omegaconf import OmegaConf

    task, config = tiny.task(), tiny.model(decoder_layers=2).cfg
    saved = {name: value for name, value in vars(config).items() if name != "_name"}
    for option in ("cluster_prior", "predicted_schedule"):
        del saved[option]
    stored = OmegaConf.create(saved)
    OmegaConf.set_struct(stored, True)
    for old in (stored, Namespace(**saved)):
        model = VQEMTransformer.build_model(old, task)
        assert model.cfg.cluster_prior == "uniform" and model.cfg.predicted_schedule == "0"
        assert len(model.decoder.layers) == 2
