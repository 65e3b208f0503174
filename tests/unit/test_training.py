"""Training of the digits pairs: what a batch predicts, the two losses of both families, and the loop."""

import itertools

import pytest
import torch
from rich.progress import Progress
from torch import nn

from export.digits.data import CLASSES, SIDE, TOKEN_DIM, TOKENS, Digits
from export.digits.losses import Masked, NextToken, backbone_of, denoising_loss, path_divergence_loss
from export.digits.training import FitOptions, fit
from export.models.causal import CausalBackbone, CausalBackboneSize, CausalModel
from export.models.head import DiffusionHead
from export.models.mar import Mar, MarBackbone, MarSize
from specdec_rt.chain import ChainSpec, compile_chain

WIDTH, OTHER_WIDTH = 16, 8
CHAIN = compile_chain(ChainSpec(steps=25, t_max=975, drop_last=2, final_std=0.1, emit="mean"))
PATH = {"context_std": 0.1, "draws": 2, "most_guidance": 2.0}


def causal_size(width):
    return CausalBackboneSize(tokens=TOKENS, token_dim=TOKEN_DIM, classes=CLASSES, width=width, depth=1, heads=2)


def mar_size(width):
    encoder = {"encoder_width": width, "encoder_depth": 1, "encoder_heads": 2}
    decoder = {"decoder_width": width, "decoder_depth": 1, "decoder_heads": 2}
    tiling = {"image": SIDE, "stride": 1, "patch": 4, "channels": 1, "classes": CLASSES, "buffer": 2}
    return MarSize(**tiling, **encoder, **decoder, head_width=8, head_depth=1, learned_variance=False)


@pytest.fixture(params=["causal", "mar"])
def family(request):
    """Task, target, and a draft that drives the target's head; no weight is 0, as those of a new head are."""
    torch.manual_seed(0)
    if request.param == "causal":
        head = DiffusionHead(TOKEN_DIM, WIDTH, 8, 1, learned_variance=False)
        task, target = NextToken(), CausalModel(CausalBackbone(causal_size(WIDTH)), head)
        draft = CausalBackbone(causal_size(OTHER_WIDTH), adapter_dim=WIDTH)
    else:
        task, target = Masked(), Mar(mar_size(WIDTH))
        draft = MarBackbone(mar_size(OTHER_WIDTH), adapter_dim=WIDTH)
    for parameter in (*target.parameters(), *draft.parameters()):
        nn.init.normal_(parameter, std=0.1)
    return task, target, draft


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (8, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return images, torch.arange(8)


def without_gradient(module):
    return [name for name, value in module.named_parameters() if value.grad is None or not value.grad.abs().max() > 0]


def test_masked_training_predicts_or_sees_every_token():
    torch.manual_seed(0)
    counts = []
    for _ in range(300):
        split = Masked().split(3)
        counts.append(split.predicted.shape[1])
        both = torch.cat([split.predicted, split.visible], dim=1)
        assert torch.equal(both.sort(dim=1).values, torch.arange(TOKENS).expand(3, -1))
    assert min(counts) >= 1
    assert max(counts) == TOKENS
    assert sum(counts) / len(counts) == pytest.approx(2 / torch.pi * TOKENS, rel=0.1)


def test_each_image_is_masked_in_an_order_of_its_own():
    torch.manual_seed(0)
    first, second = Masked().split(2).predicted
    assert not torch.equal(first, second)


def test_picked_tokens_are_those_that_are_predicted():
    torch.manual_seed(0)
    split = Masked().split(2)
    tokens = torch.arange(2 * TOKENS).view(2, TOKENS, 1).expand(-1, -1, TOKEN_DIM)
    expected = split.predicted + TOKENS * torch.arange(2)[:, None]
    assert torch.equal(split.pick(tokens)[..., 0], expected)


def test_the_denoising_loss_reaches_every_weight(family, batch):
    task, target, _ = family
    torch.manual_seed(2)
    loss = denoising_loss(target, task, context_std=0.1, draws=2)
    values = [loss(*batch) for _ in range(4)]  # several: not every batch drops a label
    torch.stack(values).sum().backward()
    assert all(value.shape == () and value.isfinite() for value in values)
    assert without_gradient(target) == []


def test_the_path_divergence_reaches_every_weight_of_the_draft_alone(family, batch):
    task, target, draft = family
    torch.manual_seed(2)
    value = path_divergence_loss(draft, target, task, CHAIN, **PATH)(*batch)
    value.backward()
    assert value.shape == ()
    assert 0 < value.item() < float("inf")
    assert without_gradient(draft) == []
    assert all(parameter.grad is None for parameter in target.parameters())


def test_the_path_of_a_model_does_not_diverge_from_itself(family, batch):
    task, target, _ = family
    torch.manual_seed(2)
    with torch.no_grad():
        assert path_divergence_loss(backbone_of(target), target, task, CHAIN, **PATH)(*batch).item() == 0


def small_data():
    """Twelve random images to train on, ten to test on."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (22, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = torch.arange(22) % CLASSES
    return Digits(train_images=images[:12], train_labels=labels[:12], test_images=images[12:], test_labels=labels[12:])


def trained(folder, interrupt_at=None):
    """A linear model's parameters after three epochs of three steps; the loss can interrupt a step."""
    torch.manual_seed(0)
    model, calls = nn.Linear(SIDE, 1), itertools.count()

    def loss(images, label):
        if model.training and torch.is_grad_enabled() and next(calls) == interrupt_at:
            raise KeyboardInterrupt
        return (model(images / 255) + torch.randn(()) - label[:, None, None]).square().mean()

    options = FitOptions(epochs=3, batch=4, warm_up=2, ema=0.5)
    fit(model, loss, small_data(), options, folder / "model.pt", Progress(disable=True))
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_interrupted_training_resumes_to_the_same_weights(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, interrupt_at=4)  # in the second epoch
    assert torch.equal(trained(tmp_path), whole)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    trained(tmp_path)
    with pytest.raises(SystemExit, match=r"model\.pt was trained with other options, .* delete it to train anew"):
        fit(nn.Linear(1, 1), None, small_data(), FitOptions(epochs=4), tmp_path / "model.pt", Progress(disable=True))
