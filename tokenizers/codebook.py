"""The files of a codebook artifact.

Axis letters: K codes, C their width, P cells.
"""

from __future__ import annotations

from torch import Tensor

from smalti import storage
from smalti.tokenizers import tensor_files
from smalti.tokenizers.code_index import CodeIndex, Probes

CENTROIDS = "centroids.safetensors"
TREE = "tree.safetensors"


def load_centroids(path: str) -> Tensor:
    """The codes of the codebook in folder or URL `path`: float32 (K, C)."""
    return tensor_files.read(storage.join(path, CENTROIDS))["centroids"]


def load_index(path: str) -> CodeIndex:
    """The codes of a codebook, with their tree and the search that the stage `codebook` chose."""
    tree = tensor_files.read(storage.join(path, TREE))
    probes = Probes(int(tree["searched_cells"]), float(tree["reach"]), float(tree["recall"]))
    return CodeIndex(load_centroids(path), tree["cells"], tree["cell_of"], probes)
