"""Language models of `regard`'s own: a small masked-diffusion model that runs on any machine."""

from regard.models.language.blocks import MaskedDiffusionConfig
from regard.models.language.masked_diffusion import MaskedDiffusionLM

__all__ = ["MaskedDiffusionConfig", "MaskedDiffusionLM"]
