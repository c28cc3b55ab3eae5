"""Caches for masked-diffusion language models, whose keys and values change as masks become tokens.

`generate(model, tokens, cache)` decodes; a cache says which rows of which layers a step computes again.
"""

from regard.cache.diffusion.block import BlockCache
from regard.cache.diffusion.canvas import Blocks, Canvas, Sliding
from regard.cache.diffusion.checkpoints import load_denoiser
from regard.cache.diffusion.commit import confident
from regard.cache.diffusion.denoiser import Denoiser, DiffusionBlock
from regard.cache.diffusion.elastic import ElasticCache, attention_similarity
from regard.cache.diffusion.generate import Generation, generate
from regard.cache.diffusion.interval import FixedIntervalCache
from regard.cache.diffusion.none import NoCache
from regard.cache.diffusion.policy import DiffusionCache
from regard.cache.diffusion.transformers_model import TransformersDenoiser, adapt

__all__ = [
    "BlockCache",
    "Blocks",
    "Canvas",
    "Denoiser",
    "DiffusionBlock",
    "DiffusionCache",
    "ElasticCache",
    "FixedIntervalCache",
    "Generation",
    "NoCache",
    "Sliding",
    "TransformersDenoiser",
    "adapt",
    "attention_similarity",
    "confident",
    "generate",
    "load_denoiser",
]
