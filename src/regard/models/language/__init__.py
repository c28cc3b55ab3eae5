"""Language models of `regard`'s own: a small masked-diffusion model that runs on any machine."""

from regard.models.language.masked_diffusion import MaskedDiffusionConfig, MaskedDiffusionLM

__all__ = ["MaskedDiffusionConfig", "MaskedDiffusionLM"]
