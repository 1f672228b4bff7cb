"""The figures: plain arrays in, a Matplotlib `Figure` out, in one house style; `save` writes it as PNG.

No function opens a window or leaves a setting changed. Arrays that do not fit each other, are empty, or hold nothing
finite raise `InputError`; `about`, what was measured on what, is written in a line below the panels.
Layers are decoder layers, counted from 0; log-probabilities are in nats.
"""

from jaxid.plots.blank_image import blank_image
from jaxid.plots.dcsm import benchmark_bars, caption_maps, training_curves
from jaxid.plots.diagnosis import margin_histogram, margins_by_layer, occlusion_example, sensitivities
from jaxid.plots.finetune import finetune_comparison, finetune_curves, finetune_geometry
from jaxid.plots.geometry import attainable_margins
from jaxid.plots.ids import id_plane, variance_by_layer
from jaxid.plots.recipes import recipe_curves
from jaxid.plots.scenes import scenes_with_answers
from jaxid.plots.steering import depth_by_row, steering_by_column, steering_by_layer, steering_map, steering_maps
from jaxid.plots.style import About, means_note, save
from jaxid.plots.swaps import accuracy_against_steerability, belief_swap_bars, belief_swap_by_layer, swap_scores
from jaxid.plots.temporal import temporal_line, temporal_steering

__all__ = [
    "About",
    "accuracy_against_steerability",
    "attainable_margins",
    "belief_swap_bars",
    "belief_swap_by_layer",
    "benchmark_bars",
    "blank_image",
    "caption_maps",
    "depth_by_row",
    "finetune_comparison",
    "finetune_curves",
    "finetune_geometry",
    "id_plane",
    "margin_histogram",
    "margins_by_layer",
    "means_note",
    "occlusion_example",
    "recipe_curves",
    "save",
    "scenes_with_answers",
    "sensitivities",
    "steering_by_column",
    "steering_by_layer",
    "steering_map",
    "steering_maps",
    "swap_scores",
    "temporal_line",
    "temporal_steering",
    "training_curves",
    "variance_by_layer",
]
