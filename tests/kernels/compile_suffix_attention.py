"""The attention kernel in all default configurations, compiled for sm_80 and sm_90 without a GPU.

`python -m pytest -s tests/kernels/compile_*.py`, with triton installed and without TRITON_INTERPRET; -s shows the
table. Compiling says nothing about races or time; it does say whether registers spill, whether a block fits into shared
memory, and whether products in half precision are done by the warp-group instructions of Hopper.
"""

from functools import cache

import pytest
import torch
from fasttrace_kernels import suffix_attention as module
from fasttrace_kernels.layout import AttentionLayout

from tests.kernels import aot
from tests.kernels.packs import Heads, random_sinks

PLAIN = {}
ALL = {"window": 512, "softcap": 50.0, "sinks": True}
MODELS = {
    "gpt2-xl": (Heads(25, 25, 64), PLAIN),
    "smollm2-135m": (Heads(9, 3, 64), PLAIN),
    "qwen2.5-0.5b": (Heads(14, 2, 64), PLAIN),
    "phi-2": (Heads(32, 32, 80), PLAIN),
    "phi-3-mini": (Heads(32, 32, 96), {"window": 2047}),
    "gemma-2-2b": (Heads(8, 4, 256), {"window": 4096, "softcap": 50.0}),
    "gpt-oss-20b": (Heads(64, 8, 64), {"window": 128, "sinks": True}),
    "deepseek-v3": (Heads(128, 128, 192, 128), PLAIN),
    "falcon-7b": (Heads(71, 1, 64), PLAIN),
}
CASES = {
    **{
        f"{'half' if half else 'float32'} d_head {d_head} {'long' if long else 'short'} {name}": (
            Heads(8, 4, d_head),
            torch.bfloat16 if half else torch.float32,
            long,
            options,
        )
        for half, d_head, long in module.CONFIGS
        for name, options in (("plain", PLAIN), ("all", ALL))
        if d_head >= 64 or options
    },
    **{f"{name} short": (heads, torch.bfloat16, False, options) for name, (heads, options) in MODELS.items()},
    "float16 d_head 64 long all": (Heads(8, 4, 64), torch.float16, True, ALL),
    "float16 d_head 128 short all": (Heads(8, 4, 128), torch.float16, False, ALL),
}
PAIRS = [(case, capability) for case in CASES for capability in aot.ARCHITECTURES]
PAIRS = [(case, capability) for case, capability in PAIRS if capability == 90 or "plain" in case]


@cache
def machine_code(case: str, capability: int) -> aot.MachineCode:
    from fasttrace_kernels.suffix_attention_kernel import suffix_attention_kernel

    heads, dtype, long, options = CASES[case]
    longest = module.LONG if long else 20
    layout = AttentionLayout.build([0], [longest], [0], [0]).to("meta")
    d_value = heads.d_value or heads.d_head
    sizes = ((heads.query, heads.d_head), (heads.kv, heads.d_head), (heads.kv, d_value), (heads.query, d_value))
    q, k, v, out = (torch.empty(longest, *size, dtype=dtype, device="meta") for size in sizes)
    sinks = random_sinks(heads).to("meta") if options.get("sinks") else None
    arguments, _ = module.launch_arguments(
        q, k, v, layout, 0.125, options.get("window"), options.get("softcap", 0.0), sinks, out
    )
    return aot.compile_kernel(suffix_attention_kernel, arguments, capability)


@pytest.mark.parametrize(("case", "capability"), PAIRS)
def test_compiles_to_code_that_fits_the_machine(case, capability):
    code = machine_code(case, capability)
    print(aot.row(f"attention {case}", capability, code))
    assert code.shared <= aot.ARCHITECTURES[capability]
    assert code.spills <= (0 if capability == 90 else 16)
    assert not code.serialized
    if CASES[case][1] != torch.float32:
        assert code.counts.get("HGMMA" if capability == 90 else "HMMA", 0) > 0


def test_queries_keys_and_values_are_loaded_128_bits_at_a_time():
    code = machine_code("gpt2-xl short", 90)
    assert code.counts.get("LDGSTS", 0) + code.counts.get("LDG", 0) <= 40, code.counts
