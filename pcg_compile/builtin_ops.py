"""The split ops that need no registration: attention as PyTorch has it, and pcg's own."""

from __future__ import annotations

from types import MappingProxyType

from .attention.ops import bind_attend, bind_prepare_batch, bind_prepare_full_graph, why_plain, why_uncapturable
from .lora.ops import bind_prepare_lora, bind_prepare_one_lora
from .split_ops import SplitOp, add_split_op

#: Attention in torch-level and aten forms. Aten kernels take tensors of any strides.
_ATTENTION = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_fused_attention_overrideable",
)

for _name in _ATTENTION:
    add_split_op(SplitOp(_name, any_strides=True))

add_split_op(SplitOp("higher_order::flex_attention", any_strides=True, compiled=True))

_VARLEN = MappingProxyType(
    {"qo_indptr": "cu_seq_q", "kv_indptr": "cu_seq_k", "max_qo_len": "max_q", "max_kv_len": "max_k"}
)
for _name in ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_out"):
    add_split_op(SplitOp(_name, _VARLEN, needs_none=("seqused_k", "block_table", "num_splits")))

add_split_op(
    SplitOp(
        "pcg::prepare_batch",
        bind=bind_prepare_batch,
        bind_full_graph=bind_prepare_full_graph,
        bucket_args=(0,),
        own_metadata=True,
    )
)
add_split_op(
    SplitOp(
        "pcg::attend",
        bind=bind_attend,
        own_metadata=True,
        recordable=True,
        fallback=why_plain,
        uncapturable=why_uncapturable,
    )
)
add_split_op(
    SplitOp(
        "pcg::prepare_lora",
        bind=bind_prepare_lora,
        bind_full_graph=bind_prepare_lora,
        bucket_args=(0,),
        own_metadata=True,
        optional_step=True,
    )
)
add_split_op(
    SplitOp(
        "pcg::prepare_one_lora",
        bind=bind_prepare_one_lora,
        bind_full_graph=bind_prepare_one_lora,
        own_metadata=True,
        optional_step=True,
    )
)
