"""autopar: one call that makes any PyTorch module train on a whole cluster, by a plan that it finds itself."""

from .capture.export import capture
from .capture.opaque import opaque
from .cluster.spec import Cluster
from .parallelize import Model, parallelize
from .plan import Plan
from .planner.search import search
from .runtime.checkpoint import CheckpointInfo, load, save
from .runtime.clip import clip_grad_norm_
from .runtime.weights import load_safetensors, save_safetensors
from .simulate import simulate

__version__ = "0.1.0"

__all__ = [
    "CheckpointInfo",
    "Cluster",
    "Model",
    "Plan",
    "capture",
    "clip_grad_norm_",
    "load",
    "load_safetensors",
    "opaque",
    "parallelize",
    "save",
    "save_safetensors",
    "search",
    "simulate",
]
