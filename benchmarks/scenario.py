"""What is measured: a scenario is a TOML file, checked whole before anything runs."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from specdec_rt.config import AUTO, DecodeOptions
from specdec_rt.errors import UsageError
from specdec_rt.pipeline import make_options

__all__ = ["SCENARIOS", "Forced", "RuntimeVariant", "Scenario", "Style", "TorchVariant", "Variant", "read_scenario"]

SCENARIOS = Path(__file__).parent / "scenarios"

Style = Literal["eager", "cached", "hoisted", "compiled"]
"""How a PyTorch baseline decodes.

- eager: as published
- cached: with a cache of keys and values (causal family)
- hoisted: cached where that is possible, and with the head's embeddings made once per token
- compiled: hoisted, and passed through torch.compile
"""

_Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TorchVariant(_Table):
    """A baseline in PyTorch."""

    engine: Literal["torch"]
    name: str
    style: Style
    batches: tuple[_Count, ...] = ()
    """batch sizes; none: the scenario's"""
    adds: str = ""
    """what it adds to the row before it in the ablation; empty: it is no row there"""

    def distribution(self, scenario: "Scenario") -> tuple[bool, str]:  # noqa: ARG002  # as the other kind's
        """Whether it draws from the target's distribution, and the same in words."""
        return True, "the target's"


class Forced(_Table):
    """Verdicts that are forced, not found: a model with random weights has no acceptance of its own."""

    acceptance: float = Field(ge=0, le=1)
    """share of the drafts that is accepted"""
    left: float = Field(ge=0, le=1)
    """mean share of a chain that comes after the transition at which a draft is rejected"""
    resumed: float = Field(ge=0, le=1)
    """share of the chain suffixes that is accepted in resumed speculation"""


class RuntimeVariant(_Table):
    """The runtime, with some options."""

    engine: Literal["runtime"]
    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    """fields of `DecodeOptions`"""
    workers: _Count = 1
    """decoders that share the images and the threads"""
    published_head: bool = False
    """whether a denoising step computes what the model's own forward pass does, see `benchmarks.published_head`; only
    in mode `target`"""
    batches: tuple[_Count, ...] = ()
    """batch sizes; none: the scenario's"""
    adds: str = ""
    """what it adds to the row before it in the ablation; empty: it is no row there"""
    observe: bool = False
    """whether acceptance is also recorded position by position"""
    forced: Forced | None = None
    """None: verdicts are found, as always outside of benchmarks"""
    beside: str = ""
    """a variant whose requests take turns with this one's in the same process, so that no drift enters their ratio"""

    @field_validator("options")
    @classmethod
    def _known(cls, options: dict[str, Any]) -> dict[str, Any]:
        try:
            make_options(**options)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return options

    @property
    def automatic_length(self) -> bool:
        """Whether the draft length controller chooses the draft lengths."""
        return bool(self.options.get("draft_length") == AUTO)

    def decode_options(self, scenario: "Scenario") -> DecodeOptions:
        """A request's options: its own, and the scenario's AR steps where it names none."""
        steps = {} if scenario.ar_steps is None else {"ar_steps": scenario.ar_steps}
        return make_options(**{**steps, **self.options})

    def distribution(self, scenario: "Scenario") -> tuple[bool, str]:
        """Whether it draws from the target's distribution, and the same in words. The options decide it."""
        mode = self.options.get("mode", "exact")
        if self.options.get("ar_steps", scenario.ar_steps) != scenario.ar_steps:
            return False, f"another: {self.options['ar_steps']} AR steps"
        if self.options.get("temperature", 1.0) != 1.0:
            return False, "another: another temperature"
        return {
            "target": (True, "the target's"),
            "exact": (True, "exactly the target's"),
            "paper": (False, "approximate"),
            "draft": (False, "the draft's"),
        }[mode]


Variant = Annotated[TorchVariant | RuntimeVariant, Field(discriminator="engine")]


class Scenario(_Table):
    """Variants of one request to one bundle, over batch sizes."""

    title: str
    bundle: str | None = None
    """an embedded one, or a folder"""
    random_mar: Literal["mar_base", "mar_large", "mar_huge"] | None = None
    """in place of a bundle: the published size with random weights, exported once into the work folder"""
    int8_draft: str | None = None
    """a draft of the bundle that gets a copy with int8 weights, `NAME-int8`: see `benchmarks.int8_draft`"""
    ar_steps: _Count | None = None
    """None: the bundle's default"""
    first_ar_steps: _Count | None = None
    """time only so many AR steps, the first ones"""
    forced_source: str | None = None
    """where the verdicts that variants are forced to were measured"""
    batches: tuple[_Count, ...]
    seed: int = Field(default=1, ge=0)
    warmup: _Count = 2
    """requests of a process before any is timed"""
    samples: _Count = 5
    """timed requests of a process"""
    limit_seconds: float = Field(default=20.0, gt=0)
    """a process begins no further timed request after so long"""
    repeats: _Count = 3
    """processes of each variant and batch size; variants take turns"""
    draft_length: _Count = 4
    """γ for which the graphs are compared with the physical limit"""
    variants: tuple[Variant, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Scenario":
        if (self.bundle is None) == (self.random_mar is None):
            raise ValueError("name either bundle or random_mar")
        if self.int8_draft is not None and self.bundle is None:
            raise ValueError("int8_draft is given without bundle: random weights have no draft to quantise")
        runtime = [variant for variant in self.variants if isinstance(variant, RuntimeVariant)]
        names = [variant.name for variant in self.variants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two variants are called {twice[0]!r}")
        if self.first_ar_steps is not None and self.ar_steps is None:
            raise ValueError("first_ar_steps is given without ar_steps")
        for variant in runtime:
            if variant.published_head and variant.options.get("mode") != "target":
                raise ValueError(f"{variant.name!r} has published_head, which is for mode 'target'")
            if variant.forced is not None and (variant.workers > 1 or variant.observe):
                raise ValueError(f"{variant.name!r} has forced verdicts: leave out workers and observe")
            kind = variant.workers, variant.published_head
            like = {other.name for other in runtime if (other.workers, other.published_head) == kind}
            if variant.beside and variant.beside not in like - {variant.name}:
                raise ValueError(
                    f"{variant.name!r} runs beside {variant.beside!r}; expected a runtime variant with as many workers"
                )
        forced = any(variant.forced is not None for variant in runtime)
        if forced and self.bundle is not None:
            raise ValueError("forced is for random weights: a bundle has an acceptance of its own")
        if forced != (self.forced_source is not None):
            raise ValueError("verdicts are forced by variants, and forced_source says where they were measured")
        return self

    def cases(self) -> list[tuple[Variant, int]]:
        """Every variant at every batch size, ordered by batch size: what is compared stands together."""
        batches = sorted({batch for variant in self.variants for batch in variant.batches or self.batches})
        return [
            (variant, batch)
            for batch in batches
            for variant in self.variants
            if batch in (variant.batches or self.batches)
        ]


def read_scenario(name: str) -> tuple[str, Scenario]:
    """A scenario of this folder by its name, or of a TOML file; first its name. Raises UsageError."""
    path = Path(name) if name.endswith(".toml") else SCENARIOS / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in SCENARIOS.glob("*.toml")))
        raise UsageError(f"there is no scenario {name!r}; expected one of {known}, or a file that ends in .toml")
    try:
        # JSON, for strict models take no list for a tuple from Python.
        return path.stem, Scenario.model_validate_json(json.dumps(tomllib.loads(path.read_text(encoding="utf-8"))))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no TOML: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "scenario"
        raise UsageError(f"{path}: {where}: {problem['msg']}") from error
