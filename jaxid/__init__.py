"""Spatial and temporal identifiers of vision-language models, and dense similarity maps of CLIP-like ones, in JAX.

Every public name is listed once, in the table below, and is imported when it is first used: `import jaxid`
itself loads neither JAX models, tokenizers nor plotting.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
    from jaxid.engine import Output as Output
    from jaxid.engine import forward as forward
    from jaxid.errors import CheckpointError as CheckpointError
    from jaxid.errors import DataError as DataError
    from jaxid.errors import InputError as InputError
    from jaxid.errors import JaxidError as JaxidError
    from jaxid.errors import OutputError as OutputError
    from jaxid.errors import PromptError as PromptError
    from jaxid.errors import UnknownWordsWarning as UnknownWordsWarning
    from jaxid.generation import Generation as Generation
    from jaxid.generation import generate as generate
    from jaxid.ids import IDBatch as IDBatch
    from jaxid.ids import SpatialIDs as SpatialIDs
    from jaxid.ids import accumulate_ids as accumulate_ids
    from jaxid.inputs import Processor as Processor
    from jaxid.inputs import Prompts as Prompts
    from jaxid.interventions import add as add
    from jaxid.interventions import chain as chain
    from jaxid.interventions import project_out as project_out
    from jaxid.interventions import replace as replace
    from jaxid.interventions import scale as scale
    from jaxid.interventions import stack as stack
    from jaxid.models.base import Encoder as Encoder
    from jaxid.models.base import Model as Model
    from jaxid.models.sites import Capture as Capture
    from jaxid.models.sites import Intervention as Intervention
    from jaxid.models.sites import Site as Site
    from jaxid.processing.pictures import Clip as Clip
    from jaxid.temporal_ids import TemporalIDs as TemporalIDs
    from jaxid.tracing import Trace as Trace
    from jaxid.tracing import rerun as rerun
    from jaxid.tracing import swap as swap
    from jaxid.tracing import trace as trace

__version__ = "0.1.0"

# Public name -> the module that defines it. Add a name here and, for static checkers, to the block above.
_HOME = {
    "Capture": "jaxid.models.sites",
    "CheckpointError": "jaxid.errors",
    "Clip": "jaxid.processing.pictures",
    "DataError": "jaxid.errors",
    "Encoder": "jaxid.models.base",
    "Generation": "jaxid.generation",
    "IDBatch": "jaxid.ids",
    "InputError": "jaxid.errors",
    "Intervention": "jaxid.models.sites",
    "JaxidError": "jaxid.errors",
    "Model": "jaxid.models.base",
    "Output": "jaxid.engine",
    "OutputError": "jaxid.errors",
    "Processor": "jaxid.inputs",
    "PromptError": "jaxid.errors",
    "Prompts": "jaxid.inputs",
    "Scorer": "jaxid.dcsm.scoring",
    "Site": "jaxid.models.sites",
    "SpatialIDs": "jaxid.ids",
    "TemporalIDs": "jaxid.temporal_ids",
    "Trace": "jaxid.tracing",
    "UnknownWordsWarning": "jaxid.errors",
    "accumulate_ids": "jaxid.ids",
    "add": "jaxid.interventions",
    "chain": "jaxid.interventions",
    "embed_images": "jaxid.dcsm.embedding",
    "embed_texts": "jaxid.dcsm.embedding",
    "export": "jaxid.checkpoints.export",
    "forward": "jaxid.engine",
    "generate": "jaxid.generation",
    "load": "jaxid.checkpoints.loading",
    "load_encoder": "jaxid.checkpoints.encoders",
    "project_out": "jaxid.interventions",
    "read_video": "jaxid.data.videos",
    "replace": "jaxid.interventions",
    "rerun": "jaxid.tracing",
    "scale": "jaxid.interventions",
    "score": "jaxid.dcsm.scoring",
    "score_own": "jaxid.dcsm.scoring",
    "stack": "jaxid.interventions",
    "swap": "jaxid.tracing",
    "trace": "jaxid.tracing",
}

if not TYPE_CHECKING:  # or static checkers would take every misspelt name for a public one

    def __getattr__(name: str) -> Any:
        """Imports a public name on first use and keeps it, so that later uses cost nothing."""
        if name not in _HOME:
            raise AttributeError(f"module 'jaxid' has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted({*globals(), *_HOME})
