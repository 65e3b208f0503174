"""Records a reference of a small random MAR, by plain torch code that shares nothing with the runtime's loop."""

import argparse
import math

import numpy as np
import torch

from export.models.mar import Mar, MarSize, visible_set
from specdec_rt.schedule import ChainSpec, compile_chain

__all__ = ["random_mar", "record", "save_published"]

IMAGES, ROWS, KNOWN = 2, 5, (0, 3)


def random_mar(**changes):
    """A small model none of whose layers is zero; patches of 2 x 2 latent positions unless changed."""
    torch.manual_seed(0)
    sizes = {
        "image": 24, "stride": 4, "patch": 2, "channels": 3, "classes": 7, "buffer": 5,
        "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 4,
        "decoder_width": 48, "decoder_depth": 2, "decoder_heads": 2, "head_width": 24, "head_depth": 2,
    }  # fmt: skip
    model = Mar(MarSize(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save_published(model, path, **options):
    """Write the model in the published format."""
    size = model.size
    args = argparse.Namespace(
        model="mar_small", img_size=size.image, vae_stride=size.stride, vae_embed_dim=size.channels,
        patch_size=size.patch, class_num=size.classes, buffer_size=size.buffer, diffloss_w=size.head_width,
        diffloss_d=size.head_depth, encoder_num_heads=size.encoder_heads, decoder_num_heads=size.decoder_heads,
        **options,
    )  # fmt: skip
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict(), "epoch": 1, "args": args}, path)


class Recorder:
    """The model, the respaced chain, and where its draws come from."""

    def __init__(self, model, steps):
        self.model, self.size = model, model.size
        self.chain = compile_chain(ChainSpec(steps=steps, variance="learned"))
        self.draw = torch.Generator().manual_seed(1)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def condition(self, tokens, mask, label, *, dropped):
        label = torch.full_like(label, self.size.classes) if dropped else label
        return self.model(tokens, *visible_set(mask), label)

    def transition(self, z, state, row):
        """Prediction, mean, log variance and x̂₀ of `state [R, D]` at transition `row [R]`, z `[R, Z]`."""
        head, chain = self.model.head, self.chain
        condition = head.time_embed(torch.from_numpy(chain.timestep)[row]) + head.cond_embed(z)
        return head(state, condition)

    def reverse(self, z, scale, start, noise, temperature):
        """The whole process: z `[2 R, Z]` with guidance `scale`, or `[R, Z]`; noise `[T, rows, D]`."""
        dim, state = start.shape[1], start
        for j, (of_state, of_epsilon, std, log_range) in enumerate(torch.from_numpy(self.chain.coefficients).float()):
            row = torch.full((len(z),), j)
            output = self.transition(z, state.repeat(len(z) // len(state), 1), row)
            epsilon, share = output[: len(state), :dim], output[: len(state), dim:]
            if len(z) > len(state):
                epsilon = output[len(state) :, :dim] + scale * (epsilon - output[len(state) :, :dim])
            sigma = temperature * std * torch.exp(log_range * (share + 1) / 2)
            state = of_state * state + of_epsilon * epsilon + sigma * noise[j, : len(state)]
        return state

    def image(self, kind, label, orders, ar_steps, guidance, schedule, temperature):
        """Every AR step's draws and the unpatchified image."""
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
            start, noise = self.normal(rows, size.token_dim), self.normal(self.chain.length, len(z), size.token_dim)
            tokens[chosen] = self.reverse(z, scale, start, noise, temperature)
            found[f"image_{kind}_xT_{step}"], found[f"image_{kind}_noise_{step}"] = start, noise
            mask = torch.where(chosen, 0.0, mask)
        side, patch = size.image // size.stride // size.patch, size.patch
        grid = tokens.view(IMAGES, side, side, size.channels, patch, patch)
        image = torch.einsum("nhwcpq->nchpwq", grid).reshape(IMAGES, size.channels, side * patch, side * patch)
        return {**found, f"image_{kind}": image}

    def evaluations(self, label, orders):
        """Z with known tokens, and one head evaluation."""
        size, chain = self.size, self.chain
        found = {"tokens": self.normal(IMAGES, size.tokens, size.token_dim)}
        for known in KNOWN:
            mask = torch.zeros(IMAGES, size.tokens).scatter(1, orders[:, : size.tokens - known], 1.0)
            found[f"mask_{known}"] = mask
            for name, dropped in (("z", False), ("z_uncond", True)):
                found[f"{name}_{known}"] = self.condition(found["tokens"], mask, label, dropped=dropped)
        step = torch.tensor([0, chain.length - 1, *torch.randint(chain.length, (ROWS - 2,), generator=self.draw)])
        row = chain.length - 1 - step
        state, z = self.normal(ROWS, size.token_dim), self.normal(ROWS, size.decoder_width)
        output = self.transition(z, state, row)
        epsilon, share = output.chunk(2, dim=1)
        alpha_bar = torch.from_numpy(1 / chain.prediction_state**2)
        previous = torch.cat([alpha_bar[1:], torch.ones(1)])
        beta = 1 - alpha_bar / previous
        posterior = beta * (1 - previous) / (1 - alpha_bar)
        posterior[-1] = posterior[-2]
        low, high = posterior.log()[row, None], beta.log()[row, None]
        of_state, of_epsilon = torch.from_numpy(chain.coefficients[:, :2].T)[:, row, None]
        found |= {"head_x": state, "head_c": z, "head_step": step, "head_out": output}
        found["head_timestep"] = torch.from_numpy(chain.timestep)[row]
        found["p_mean"] = of_state * state + of_epsilon * epsilon
        found["p_log_variance"] = low + (high - low) * (share + 1) / 2
        found["p_xstart"] = (state - (1 - alpha_bar[row, None]).sqrt() * epsilon) / alpha_bar[row, None].sqrt()
        found["betas"], found["timestep_map"] = beta.flip(0), torch.from_numpy(chain.timestep.copy()).flip(0)
        return found

    def chains(self, guidance, temperature):
        """Some tokens through the whole reverse process, without and with guidance."""
        found = {}
        for kind, branches in (("plain", 1), ("cfg", 2)):
            z = self.normal(branches * ROWS, self.size.decoder_width)
            start = self.normal(ROWS, self.size.token_dim)
            noise = self.normal(self.chain.length, len(z), self.size.token_dim)
            found |= {f"chain_{kind}_z": z, f"chain_{kind}_xT": start, f"chain_{kind}_noise": noise}
            found[f"chain_{kind}_x"] = self.reverse(z, guidance, start, noise, temperature)
        return found


@torch.no_grad()
def record(model, *, steps, ar_steps, guidance, schedule, temperature):
    """All arrays of a reference."""
    recorder = Recorder(model, steps)
    label = torch.randint(model.size.classes, (IMAGES,), generator=recorder.draw)
    orders = torch.stack([torch.randperm(model.size.tokens, generator=recorder.draw) for _ in range(IMAGES)])
    found = {"labels": label, "orders": orders, **recorder.evaluations(label, orders)}
    found |= recorder.chains(guidance, temperature)
    for kind in ("plain", "cfg"):
        found |= recorder.image(kind, label, orders, ar_steps, guidance, schedule, temperature)
    meta = f"ar_steps={ar_steps} cfg={guidance} cfg_schedule={schedule} temperature={temperature}"
    return {**{name: value.numpy() for name, value in found.items()}, "meta": np.array([meta])}
