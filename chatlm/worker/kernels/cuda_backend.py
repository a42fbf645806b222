"""A model's steps on CUDA. Decode rows go to our kernels; a prompt's attention is torch's, over the same
pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TYPE_CHECKING

import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.kernels import cuda
from chatlm.worker.kernels.cuda_adapters import AdapterOps
from chatlm.worker.kernels.cuda_experts import ExpertOps, fits_experts
from chatlm.worker.kernels.cuda_latents import LatentOps, latents_of
from chatlm.worker.kernels.cuda_packed_kv import PackedPages, gathered, halves, turned
from chatlm.worker.kernels.cuda_prompts import PromptAttention, prompts_of
from chatlm.worker.kernels.cuda_references import CudaReferences
from chatlm.worker.kernels.cuda_runner import LISTS, CudaPlan, GraphRunner, record_words
from chatlm.worker.kernels.cuda_weights import PackedMatrix, ProductOps, as_stored, padded, unpacked
from chatlm.worker.kernels.kernels import EagerRunner, StepRunner
from chatlm.worker.kernels.proof import prove_cuda
from chatlm.worker.kernels.sampling import SampleBatch
from chatlm.worker.kernels.weights import KEPT_ON_CUDA, converted, file_row_bytes, held_bytes
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.ops.attention import decode_rows, page_table
from chatlm.worker.ops.references import REFERENCES
from chatlm.worker.ops.tensors import zeroed

if TYPE_CHECKING:
    from chatlm.common.answering import AnswerLease
    from chatlm.worker.arrays.kinds import AdapterMatrix
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.transformer import Transformer


# Before 2.9, torch computes an RMS norm with pow and mean, and how mean splits a row depends on the number of
# rows
NORMS_ROW_BY_ROW = torch.__version__ >= (2, 9)  # pyright: ignore[reportOperatorIssue]  a TorchVersion compares with tuples


def current_stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class CudaBackend:
    """See Backend. `kernels` is a cuda.CudaOps, or an emulated one.

    A layer's cache is (2, P, Hkv, PAGE_SIZE, D), keys before values. So a block of the decode kernel reads
    whole runs of PAGE_SIZE * D values of a page, and a prompt gathers such runs. rope_append scales queries
    by 1 / sqrt(D). A packed cache is PackedPages: then queries are turned too, and the output of attention is
    turned back. `latents` has the ops of a model with latent attention, and its cache.

    `ops` proves each kernel first, on `device`. `faults` says which of them do not compute, and why.
    """

    name = "decode_core/cuda"
    row_invariant = False
    quantizes = False
    groups_layers = True
    join = None
    activations = None
    dtype = "bfloat16"
    stored_dtype = "bfloat16"
    short_floats = ""
    packs_kv = True
    turns = False
    tensors = True
    converted = staticmethod(functools.partial(converted, kept_types=KEPT_ON_CUDA))

    def __init__(self, model: Model, kernels: cuda.CudaOps,
                 stream: Callable[[], int] = current_stream, device: Any = "cuda"):
        self.model = model
        self.kernels = kernels
        self.stream = stream
        self.device = device
        self.references = CudaReferences()
        self.prompts = PromptAttention(device)
        self.adapters = AdapterOps(kernels, stream)
        self.mixture = ExpertOps(kernels, stream)
        self.products = ProductOps(kernels, stream, self.adapters)
        self.as_stored = functools.partial(as_stored, device=device)
        self.held_bytes = functools.partial(held_bytes, row_bytes=file_row_bytes, kept_types=KEPT_ON_CUDA)
        self.faults: dict[str, str] = {}
        attn = latents_of(model)
        self.latents = LatentOps(attn, kernels, stream, self.faults, device) if attn else None

    def ops(self, max_tokens: int, max_rows: int, quantize: None, fine: bool = False) -> dict[str, Callable]:
        self.faults |= prove_cuda(self, self.device)
        fault = self.faults.get("prompt_attention")
        if fault and self.prompts.varlen:           # perhaps only varlen_attn is wrong: try without it
            self.prompts.varlen = None
            fault = prove_cuda(self, self.device, ["prompt_attention"])
        self.prompts.fused = not fault
        if self.latents and fault:
            self.latents.wide_scores = False
        names = ("pack", "make_cache", "rope_append", "plan_attention", "paged_attention", "sample")
        ops = {name: getattr(self, name) for name in names}
        if self.latents:
            del ops["rope_append"]
            ops |= {
                name: getattr(self.latents, name)
                for name in ("make_cache", "append_latents", "absorb", "by_head", "paged_attention")
            }
        if "linear" not in self.faults:
            ops |= {"linear": self.products.linear, "embed": self.products.embed}
        if self.model.experts and "experts" not in self.faults:
            ops["experts"] = self.mixture.experts
        instead = {"rope_append": self.references.rope_append, "sample": REFERENCES["sample"]}
        return ops | {name: op for name, op in instead.items() if name in self.faults}

    @property
    def few_rows_invariant(self) -> bool:
        """Do the bits of a row depend on it alone in steps of few rows? Ask once `ops` has proved the
        kernels.

        Then each op of such a step is a kernel of ours, or an op of torch that computes row by row. `sample`
        must be ours too, because only GraphRunner makes each draft a row of its own.
        """
        model = self.model
        needed = {"linear", "rope_append", "paged_attention", "sample", "append_latents", "absorb", "by_head"}
        if needed & self.faults.keys() or self.latents and not self.latents.few_rows_invariant:
            return False
        first = model.input if isinstance(model.input, Input) else Input()
        if model.width % 8 or model.feed_width % 8 or model.experts or first.smear or model.keeps_states:
            return False
        # all other norms are inside kernels of ours
        norms_after = any(layer.output_norm or layer.down_norm for layer in model.layers)
        return NORMS_ROW_BY_ROW or not (isinstance(first.norm, RmsNorm) or norms_after)

    def record(self, transformer: Transformer) -> None:
        """Nothing is recorded: GraphRunner captures whole steps as graphs."""

    def pause_while(self, lease: AnswerLease, most_s: float) -> None:
        """Nothing pauses: what a GPU computes takes no CPU from others."""

    def pack_adapter(self, matrices: Mapping[str, AdapterMatrix], device: Any) -> dict[str, Any]:
        return self.adapters.pack(matrices, device)

    def make_runner(self, transformer: Transformer, max_batch: int, context_length: int) -> StepRunner:
        if "sample" in self.faults:         # a graph cannot draw on the host
            return EagerRunner(transformer)
        return GraphRunner(transformer, self, max_batch=max_batch, context_length=context_length)

    def pack(self, name: str, *parts: torch.Tensor | PackedMatrix) -> Any:
        """The matrix that `linear`, `embed` and `experts` read.

        Packed weights stay packed, unless the kernels that multiply them cannot take them or were wrong."""
        matrix = parts[0]
        if not isinstance(matrix, PackedMatrix):
            if name.endswith("ve_gate") or len(parts) > 1:
                return padded(torch.cat(parts))  # pyright: ignore[reportArgumentType]  these are floats
            return matrix
        if "expert" in name:
            stays = fits_experts(name, matrix) and "experts" not in self.faults
        else:
            stays = "linear" not in self.faults
        return matrix if stays else unpacked(matrix)

    def make_cache(self, model, layout, num_pages, device):
        """As the reference, but the cache of a layer is (2, P, Hkv, 16, D). All layers have the same
        shape."""
        first = model.attention
        layers = layout.size // max(layout.own, 1)      # 0 in a stage whose layers all keep states
        shape = (2, num_pages, first.kv_heads, PAGE_SIZE, first.head_size)
        dtype = next(filter(None, layout.types), "bfloat16")
        if dtype == "q8_0":
            memory = zeroed((layers, num_pages * PAGE_SIZE * layout.own), torch.uint8,
                                        device)
            parts = [PackedPages.within(own, shape) for own in memory]
        else:
            memory = parts = zeroed((layers, *shape), getattr(torch, dtype), device)
        return memory, [
            attends and parts[offset // layout.own] for attends, offset in zip(model.by_layer, layout.offset)
        ]

    def rope_append(self, qkv, cos, sin, positions, slots, cache, out, **options):
        """As rope_append_reference, but q is scaled, and rows with slot -1 (padding) are left alone."""
        heads = out.unflatten(1, (-1, self.model.attention.head_size))
        pages, scales = halves(cache)
        self.kernels.rope_append(qkv, cos, sin, positions, slots, *pages, heads, stream=self.stream(),
                                 **options, **scales)

    def workspace(self, rows: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """(states, tickets) of decode attention, for this many rows and pages. Tickets are 0 between
        calls."""
        if self.latents:
            floats, integers = self.latents.workspace(rows, width)
        else:
            attn = self.model.attention
            floats, integers = cuda.attention_workspace(rows, attn.heads, attn.kv_heads, attn.head_size,
                                                        width)
        return (torch.empty(floats, dtype=torch.float32, device=device),
                torch.zeros(integers, dtype=torch.int32, device=device))

    def plan_attention(self, batch, positions, windows, dtype) -> CudaPlan:
        device = positions.device
        table = page_table(batch, torch.int32, device)
        lengths = torch.tensor(batch.lengths, dtype=torch.int32, device=device)
        workspace = self.workspace(table.shape[0], table.shape[1], device)
        return self.plan(batch, windows, table, lengths, workspace)

    def plan(self, batch, windows, table, lengths, workspace) -> CudaPlan:
        """The plan of a step whose tables and lengths are on the device already. This waits for nothing."""
        decode = decode_rows(batch)
        size = PAGE_SIZE
        prompts = {window: prompts_of(batch, decode, table, window, size) for window in set(windows)}
        return CudaPlan(decode, table, lengths, prompts, *workspace)

    def paged_attention(self, q, cache, plan, window, out, softcap=0.0, sinks=None):
        """softmax(q k) v of each row over the pages of its sequence: q (T, H * D) float32, scaled -> out (T,
        H * D)."""
        heads = q.unflatten(1, (-1, cache.shape[-1]))                           # (T, H, D)
        first = slice(plan.decode)
        if plan.decode:
            table = plan.table[first]
            lengths = plan.lengths[first]
            if "paged_attention" in self.faults:
                self.references.attend(heads[first], cache, table, lengths, out[first], window, softcap,
                                       sinks)
            else:
                workspace = plan.states, plan.tickets
                self.attend(heads[first], cache, table, lengths, *workspace, out[first], window, softcap,
                            sinks)
        grouped_sinks = None if sinks is None else sinks.view(cache.shape[2], -1)       # (Hkv, H / Hkv)
        for prompt in plan.prompts[window]:
            kv = gathered(cache, prompt.pages)                                  # (2, Hkv, n, PAGE_SIZE, D)
            kv = kv.flatten(2, 3)[:, :, :prompt.end - prompt.first]
            own = out[prompt.rows]
            packed = isinstance(cache, PackedPages)
            made = torch.empty_like(own, dtype=torch.float32) if packed else own
            self.prompts.attend(heads[prompt.rows].to(cache.dtype), kv, prompt, made, window, softcap,
                                grouped_sinks)
            if packed:
                self.turn_back(made, own)

    def attend(self, q, cache, table, lengths, states, tickets, out, window: int, softcap=0.0,
               sinks=None) -> None:
        """Decode rows: q (N, H, D) float32, scaled -> out (N, H * D)."""
        pages, scales = halves(cache)
        packed = isinstance(cache, PackedPages)
        # zeros, because rows of length 0 are left alone and then turned like the others
        made = torch.zeros_like(out, dtype=torch.float32) if packed else out
        self.kernels.paged_attention(q, *pages, table, lengths, states, tickets, made, window=window,
                                     softcap=softcap, sinks=sinks, stream=self.stream(), **scales)
        if packed:
            self.turn_back(made, out)

    def turn_back(self, x, out) -> None:
        """x (T, H * D) float32, computed from turned values -> out (T, H * D)."""
        heads = x.unflatten(1, (-1, self.model.attention.head_size))
        own = out.unflatten(1, (-1, self.model.attention.head_size))
        if "paged_attention" in self.faults:
            own.copy_(turned(heads))
        else:
            self.kernels.turn(heads, own, stream=self.stream())

    def draw(self, logits, records, lists, tokens) -> None:
        """Draw a token for each row of logits (R, V) -> tokens (R,) int32, on the device.

        Rows of logits with penalties are changed.
        records     (R, 9) int64: SampleBatch.records
        lists       the batch's LISTS, or longer ones that begin with them
        """
        records = records.view(-1).view(torch.uint8)
        self.kernels.sample(logits, records, tokens, stream=self.stream(), **dict(zip(LISTS, lists)))

    def sample(self, logits, rows) -> list[int]:
        """Draw a token for each row of logits (R, V) on the device, and wait for them. Logits stay as they
        are."""
        batch = SampleBatch(rows, logits.shape[1])
        changes = len(batch.count_ids) or len(batch.bias_ids)
        return self.drawing(logits.to(torch.float32, copy=bool(changes)), batch)().tolist()

    def drawing(self, logits, batch: SampleBatch) -> Callable[[], Any]:
        """A function that draws the tokens (R,) of a batch from logits (R, V), as often as it is called."""
        arrays = record_words(batch), *(getattr(batch, name) for name in LISTS)
        records, *lists = (torch.tensor(array, device=logits.device) for array in arrays)
        tokens = torch.empty(len(records), dtype=torch.int32, device=logits.device)

        def draw():
            self.draw(logits, records, lists, tokens)
            return tokens
        return draw
