"""Records a reference of a small random MAR in plain torch code, which shares nothing with the runtime."""

import argparse
import math
from itertools import pairwise

import numpy as np
import torch

from export.models.mar import Mar, MarSize, visible_set

__all__ = ["random_mar", "record", "save_published"]

IMAGES, ROWS, KNOWN = 2, 5, (0, 3)


def random_mar(**changes):
    """A small model without zero layers, with patches of 2 x 2 latent positions; `changes` are fields of `MarSize`."""
    torch.manual_seed(0)
    sizes = {
        "image": 24, "stride": 4, "patch": 2, "channels": 3, "classes": 7, "buffer": 5,
        "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 4,
        "decoder_width": 48, "decoder_depth": 1, "decoder_heads": 2, "head_width": 24, "head_depth": 1,
    }  # fmt: skip
    model = Mar(MarSize(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save_published(model, path, **options):
    """Write the model as a checkpoint in the published format; `options` are further ones of its training command."""
    size = model.size
    args = argparse.Namespace(
        model="mar_small", img_size=size.image, vae_stride=size.stride, vae_embed_dim=size.channels,
        patch_size=size.patch, class_num=size.classes, buffer_size=size.buffer, diffloss_w=size.head_width,
        diffloss_d=size.head_depth, encoder_num_heads=size.encoder_heads, decoder_num_heads=size.decoder_heads,
        **options,
    )  # fmt: skip
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict(), "epoch": 1, "args": args}, path)


class Chain:
    """IDDPM's respaced chain. Index 0 is its least noisy step, and `step [R]` are indices."""

    def __init__(self, steps):
        stride, at, timesteps = 999 / (steps - 1), 0.0, []
        for _ in range(steps):
            timesteps.append(round(at))
            at += stride
        self.timestep = torch.tensor(timesteps)
        curve = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        kept = torch.tensor([1 - min(1 - after / before, 0.999) for before, after in pairwise(curve)]).double()
        self.alpha_bar = kept.cumprod(0)[self.timestep]
        self.previous = torch.cat([torch.ones(1), self.alpha_bar[:-1]])
        self.beta = 1 - self.alpha_bar / self.previous
        posterior = self.beta * (1 - self.previous) / (1 - self.alpha_bar)
        self.low, self.high = torch.cat([posterior[1:2], posterior[1:]]).log(), self.beta.log()

    def __len__(self):
        return len(self.timestep)

    def clean(self, step, state, epsilon):
        """x̂₀ `[R, D]`, from `state [R, D]` and the predicted noise `epsilon [R, D]`."""
        alpha_bar = self.alpha_bar[step, None]
        return (state - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()

    def mean(self, step, state, epsilon):
        """The posterior's mean `[R, D]`, given x̂₀."""
        beta, alpha_bar, previous = (x[step, None] for x in (self.beta, self.alpha_bar, self.previous))
        of_clean, of_state = beta * previous.sqrt(), (1 - previous) * (1 - beta).sqrt()
        return (of_clean * self.clean(step, state, epsilon) + of_state * state) / (1 - alpha_bar)

    def log_variance(self, step, share):
        """The log variance `[R, D]`: the head's `share` between the posterior's and β."""
        low, high = self.low[step, None], self.high[step, None]
        return low + (high - low) * (share + 1) / 2


class Recorder:
    """Evaluates a model on its respaced chain, and draws all inputs from one seeded generator."""

    def __init__(self, model, steps):
        self.model, self.size, self.chain = model, model.size, Chain(steps)
        self.draw = torch.Generator().manual_seed(1)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def condition(self, tokens, mask, label, *, dropped):
        label = torch.full_like(label, self.size.classes) if dropped else label
        return self.model(tokens, *visible_set(mask), label)

    def predict(self, z, state, step):
        """The head's output `[R, 2 D]` for `state [R, D]`, `z [R, Z]` at `step [R]`."""
        head = self.model.head
        return head(state, head.time_embed(self.chain.timestep[step]) + head.cond_embed(z))

    def reverse(self, z, scale, start, noise, temperature):
        """The whole chain, `[R, D]`: `z [2 R, Z]` with guidance `scale` or `[R, Z]` without; `noise [n, rows, D]`."""
        dim, rows, state = start.shape[1], len(start), start
        for j in range(len(self.chain)):
            step = torch.full((len(z),), len(self.chain) - 1 - j)
            output = self.predict(z, state.repeat(len(z) // rows, 1), step)
            epsilon, share = output[:rows, :dim], output[:rows, dim:]
            if len(z) > rows:
                epsilon = output[rows:, :dim] + scale * (epsilon - output[rows:, :dim])
            mean = self.chain.mean(step[:rows], state, epsilon)
            sigma = temperature * (self.chain.log_variance(step[:rows], share) / 2).exp() if step[0] else 0.0
            state = (mean + sigma * noise[j, :rows]).float()
        return state

    def image(self, kind, label, orders, ar_steps, guidance, schedule, temperature):
        """The draws of every AR step, and the image `[B, C, h, w]` without patches."""
        size, found = self.size, {}
        tokens, mask = torch.zeros(IMAGES, size.tokens, size.token_dim), torch.ones(IMAGES, size.tokens)
        length = size.tokens
        for step in range(ar_steps):
            wanted = math.floor(size.tokens * math.cos(math.pi / 2 * (step + 1) / ar_steps))
            length = max(1, min(length - 1, wanted))
            following = torch.zeros_like(mask).scatter(1, orders[:, :length], 1.0)
            chosen = (mask == 1) if step == ar_steps - 1 else (mask == 1) & (following == 0)
            scale = 1 + (guidance - 1) * (size.tokens - length) / size.tokens if schedule == "linear" else guidance
            z = self.condition(tokens, mask, label, dropped=False)[chosen]
            if kind == "cfg":
                z = torch.cat([z, self.condition(tokens, mask, label, dropped=True)[chosen]])
            rows = int(chosen.sum())
            start, noise = self.normal(rows, size.token_dim), self.normal(len(self.chain), len(z), size.token_dim)
            tokens[chosen] = self.reverse(z, scale, start, noise, temperature)
            found[f"image_{kind}_xT_{step}"], found[f"image_{kind}_noise_{step}"] = start, noise
            mask = torch.where(chosen, 0.0, mask)
        side, patch = size.image // size.stride // size.patch, size.patch
        grid = tokens.view(IMAGES, side, side, size.channels, patch, patch)
        image = torch.einsum("nhwcpq->nchpwq", grid).reshape(IMAGES, size.channels, side * patch, side * patch)
        return {**found, f"image_{kind}": image}

    def evaluations(self, label, orders):
        """Conditions with some tokens known, and one evaluation of the head."""
        size, chain = self.size, self.chain
        found = {"tokens": self.normal(IMAGES, size.tokens, size.token_dim)}
        for known in KNOWN:
            mask = torch.zeros(IMAGES, size.tokens).scatter(1, orders[:, : size.tokens - known], 1.0)
            found[f"mask_{known}"] = mask
            for name, dropped in (("z", False), ("z_uncond", True)):
                found[f"{name}_{known}"] = self.condition(found["tokens"], mask, label, dropped=dropped)
        step = torch.tensor([0, len(chain) - 1, *torch.randint(len(chain), (ROWS - 2,), generator=self.draw)])
        state, z = self.normal(ROWS, size.token_dim), self.normal(ROWS, size.decoder_width)
        output = self.predict(z, state, step)
        epsilon, share = output.chunk(2, dim=1)
        return found | {
            "head_x": state,
            "head_c": z,
            "head_step": step,
            "head_timestep": chain.timestep[step],
            "head_out": output,
            "p_mean": chain.mean(step, state, epsilon),
            "p_log_variance": chain.log_variance(step, share),
            "p_xstart": chain.clean(step, state, epsilon),
            "betas": chain.beta,
            "timestep_map": chain.timestep,
        }

    def chains(self, guidance, temperature):
        """Some tokens through the whole chain, without guidance and with it."""
        found = {}
        for kind, branches in (("plain", 1), ("cfg", 2)):
            z = self.normal(branches * ROWS, self.size.decoder_width)
            start = self.normal(ROWS, self.size.token_dim)
            noise = self.normal(len(self.chain), len(z), self.size.token_dim)
            found |= {f"chain_{kind}_z": z, f"chain_{kind}_xT": start, f"chain_{kind}_noise": noise}
            found[f"chain_{kind}_x"] = self.reverse(z, guidance, start, noise, temperature)
        return found


@torch.no_grad()
def record(model, *, steps, ar_steps, guidance, schedule, temperature):
    """All arrays of a reference, by name."""
    recorder = Recorder(model, steps)
    label = torch.randint(model.size.classes, (IMAGES,), generator=recorder.draw)
    orders = torch.stack([torch.randperm(model.size.tokens, generator=recorder.draw) for _ in range(IMAGES)])
    found = {"labels": label, "orders": orders, **recorder.evaluations(label, orders)}
    found |= recorder.chains(guidance, temperature)
    for kind in ("plain", "cfg"):
        found |= recorder.image(kind, label, orders, ar_steps, guidance, schedule, temperature)
    meta = f"ar_steps={ar_steps} cfg={guidance} cfg_schedule={schedule} temperature={temperature}"
    return {**{name: value.numpy() for name, value in found.items()}, "meta": np.array([meta])}
