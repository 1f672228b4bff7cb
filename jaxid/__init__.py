"""Spatial and temporal identifiers of vision-language models, and dense similarity maps of CLIP-like ones, in JAX.

Every public name is listed once, in the table below, and is imported when it is first used: `import jaxid`
itself loads neither JAX models, tokenizers nor plotting.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxid.checkpoints.encoders import load_encoder as load_encoder
    from jaxid.checkpoints.export import export as export
    from jaxid.checkpoints.loading import load as load
    from jaxid.data.videos import read_video as read_video
    from jaxid.dcsm.embedding import embed_images as embed_images
    from jaxid.dcsm.embedding import embed_texts as embed_texts
    from jaxid.dcsm.scoring import Scorer as Scorer
    from jaxid.dcsm.scoring import score as score
    from jaxid.dcsm.scoring import score_own as score_own
    from jaxid.errors import CheckpointError as CheckpointError
    from jaxid.errors import DataError as DataError
    from jaxid.errors import InputError as InputError
    from jaxid.errors import JaxidError as JaxidError
    from jaxid.errors import OutOfMemoryError as OutOfMemoryError
    from jaxid.errors import OutputError as OutputError
    from jaxid.errors import PromptError as PromptError
    from jaxid.errors import UnknownWordsWarning as UnknownWordsWarning
    from jaxid.experiments.viewing import view as view
    from jaxid.families.base import Encoder as Encoder
    from jaxid.families.base import Model as Model
    from jaxid.ids.accumulate import IDBatch as IDBatch
    from jaxid.ids.spatial import SpatialIDs as SpatialIDs
    from jaxid.ids.spatial import accumulate_ids as accumulate_ids
    from jaxid.ids.temporal import TemporalIDs as TemporalIDs
    from jaxid.interp.forward import Output as Output
    from jaxid.interp.forward import forward as forward
    from jaxid.interp.generate import Generation as Generation
    from jaxid.interp.generate import generate as generate
    from jaxid.interp.interventions import add as add
    from jaxid.interp.interventions import chain as chain
    from jaxid.interp.interventions import project_out as project_out
    from jaxid.interp.interventions import replace as replace
    from jaxid.interp.interventions import scale as scale
    from jaxid.interp.interventions import stack as stack
    from jaxid.interp.trace import Trace as Trace
    from jaxid.interp.trace import rerun as rerun
    from jaxid.interp.trace import swap as swap
    from jaxid.interp.trace import trace as trace
    from jaxid.nn.sites import Capture as Capture
    from jaxid.nn.sites import Intervention as Intervention
    from jaxid.nn.sites import Site as Site
    from jaxid.prompts.pictures import Clip as Clip
    from jaxid.prompts.processor import Processor as Processor
    from jaxid.prompts.processor import Prompts as Prompts

__version__ = "0.2.0"

# Public name -> the module that defines it. New names are added here and, for type checkers, in the block above.
_HOME = {
    "Capture": "jaxid.nn.sites",
    "CheckpointError": "jaxid.errors",
    "Clip": "jaxid.prompts.pictures",
    "DataError": "jaxid.errors",
    "Encoder": "jaxid.families.base",
    "Generation": "jaxid.interp.generate",
    "IDBatch": "jaxid.ids.accumulate",
    "InputError": "jaxid.errors",
    "Intervention": "jaxid.nn.sites",
    "JaxidError": "jaxid.errors",
    "Model": "jaxid.families.base",
    "OutOfMemoryError": "jaxid.errors",
    "Output": "jaxid.interp.forward",
    "OutputError": "jaxid.errors",
    "Processor": "jaxid.prompts.processor",
    "PromptError": "jaxid.errors",
    "Prompts": "jaxid.prompts.processor",
    "Scorer": "jaxid.dcsm.scoring",
    "Site": "jaxid.nn.sites",
    "SpatialIDs": "jaxid.ids.spatial",
    "TemporalIDs": "jaxid.ids.temporal",
    "Trace": "jaxid.interp.trace",
    "UnknownWordsWarning": "jaxid.errors",
    "accumulate_ids": "jaxid.ids.spatial",
    "add": "jaxid.interp.interventions",
    "chain": "jaxid.interp.interventions",
    "embed_images": "jaxid.dcsm.embedding",
    "embed_texts": "jaxid.dcsm.embedding",
    "export": "jaxid.checkpoints.export",
    "forward": "jaxid.interp.forward",
    "generate": "jaxid.interp.generate",
    "load": "jaxid.checkpoints.loading",
    "load_encoder": "jaxid.checkpoints.encoders",
    "project_out": "jaxid.interp.interventions",
    "read_video": "jaxid.data.videos",
    "replace": "jaxid.interp.interventions",
    "rerun": "jaxid.interp.trace",
    "scale": "jaxid.interp.interventions",
    "score": "jaxid.dcsm.scoring",
    "score_own": "jaxid.dcsm.scoring",
    "stack": "jaxid.interp.interventions",
    "swap": "jaxid.interp.trace",
    "trace": "jaxid.interp.trace",
    "view": "jaxid.experiments.viewing",
}

if not TYPE_CHECKING:  # or static checkers would take every misspelt name for a public one

    def __getattr__(name: str) -> object:
        """Imports a public name on first use and keeps it, so that later uses cost nothing."""
        if name not in _HOME:
            raise AttributeError(f"module 'jaxid' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *_HOME})
