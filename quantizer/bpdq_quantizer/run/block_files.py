"""The blocks of a model in a run's folder: a file for each, written when it is solved, and again when it is tuned."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from bpdq_kernels.format import Scheme
from bpdq_quantizer.checkpoint.writer import shard
from bpdq_quantizer.model.stream import Streamed, fill_block
from bpdq_quantizer.model.weights import check_numbers
from bpdq_quantizer.storage.files import check_intact, write_tensors


@dataclass(frozen=True)
class BlockFiles:
    """The files of the blocks of `source` in `folder`; schemes: of every Linear in them, by name."""

    source: Streamed
    schemes: Mapping[str, Scheme]
    folder: Path

    def path(self, index: int) -> Path:
        return shard(self.folder, index + 2, len(self.source.blocks) + 1)

    def tensors(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Those of block `index`, by their names in the checkpoint."""
        names, start = self.source.names, f"{self.source.prefix}.{index}"
        return {names.tensor(f"{start}.{name}"): tensor for name, tensor in block.state_dict().items()}

    def write(self, index: int, block: nn.Module) -> str:
        """Write block `index`; returns the combined digest of its tensors. Raises InputError for NaN and infinity."""
        tensors = self.tensors(index, block)
        check_numbers(tensors)
        return write_tensors(self.path(index), tensors)

    def read(self, digests: Mapping[str, Collection[str]], index: int) -> nn.Module:
        """Block `index` with what was written, on the CPU. digests: those that each file may have, by its name, else
        InputError."""
        file, start = self.path(index), f"{self.source.prefix}.{index}."
        check_intact(file, digests[file.name])
        stored = {self.source.names.in_model(name): tensor for name, tensor in load_file(file).items()}
        tensors, inside = ({n.removeprefix(start): v for n, v in named.items()} for named in (stored, self.schemes))
        fill_block(self.source.blocks[index], tensors, inside)
        return self.source.blocks[index]
