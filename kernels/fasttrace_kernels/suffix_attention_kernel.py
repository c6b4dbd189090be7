"""The Triton kernel of `suffix_attention`; imported when it is first launched, since Triton is not there everywhere.

A program computes up to BLOCK_M (token, head) pairs of one tile and one key-value head: TOKENS tokens times FOLD of the
query heads that share the key-value head, so that rows of a few tokens still fill a matrix product. It passes over
the tile's keys twice, with the online softmax of FlashAttention: interval A, the base row's positions, which all
rows of the tile read together, and interval B, the tile's own rows, block-diagonal. In both, a query sees the pack's
tokens low <= key < high, and a sliding window only raises `low`.

Scores, maxima, sums and accumulators are float32. The first maximum is finite, so that a block in which a query sees
nothing gives no NaN; what it adds is wiped out exactly by the first key seen, at the latest the query itself. A value
that is inf or NaN does reach the other rows of its tile (0 * inf), as in every attention with a mask.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tanh(x):
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def suffix_attention_kernel(
    q,
    k,
    v,
    sinks,
    out,
    tiles,
    tokens,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    n_kv_heads,
    factor,  # scores are multiplied by this: scale * log2(e), or scale / SOFTCAP
    GROUP: tl.constexpr,  # query heads of a key-value head
    FOLD: tl.constexpr,  # of them in one program
    PARTS: tl.constexpr,  # programs that share the tokens of a tile
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    HAS_SINKS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    D_KEY: tl.constexpr,
    D_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program of a 1-D grid [tile, part of the tile, key-value head, block of FOLD query heads].

    Tensors are [token, head, d_head] with the strides given, `sinks` [head]; `tiles` and `tokens` are the tables of
    `AttentionLayout`.
    """
    TOKENS: tl.constexpr = BLOCK_M // FOLD
    HEAD_BLOCKS: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    program = tl.program_id(0)
    head_block = program % HEAD_BLOCKS
    kv_head = program // HEAD_BLOCKS % n_kv_heads
    rest = program // HEAD_BLOCKS // n_kv_heads
    tile = tiles + rest // PARTS * TILE_FIELDS
    skipped = rest % PARTS * TOKENS
    n_tokens = tl.load(tile + 1) - skipped
    if n_tokens <= 0:
        return
    begin = tl.load(tile) + skipped
    base = tl.load(tile + 2)
    prefix = tl.load(tile + 3)
    lowest = tl.load(tile + 4)

    slot = tl.arange(0, BLOCK_M)
    nth = slot // FOLD
    n_tokens = tl.minimum(n_tokens, TOKENS)
    head = head_block * FOLD + slot % FOLD
    used = (nth < n_tokens) & (head < GROUP)
    token = begin + nth
    own = tl.load(tokens + token.to(tl.int64) * 2, mask=used, other=0)
    held = tl.load(tokens + token.to(tl.int64) * 2 + 1, mask=used, other=0)
    low_prefix = tl.zeros_like(own) + base
    low_own = own
    begin_prefix = base
    begin_own = tl.load(tokens + begin.to(tl.int64) * 2)
    if WINDOW > 0:
        low_prefix = base + held + token - own - (WINDOW - 1)
        low_own = tl.maximum(own, token - (WINDOW - 1))
        begin_prefix = base + tl.maximum(0, tl.minimum(lowest - (WINDOW - 1), prefix))
        begin_own = tl.maximum(begin_own, begin - (WINDOW - 1))

    q_head_of_slot = kv_head * GROUP + head
    in_key = tl.arange(0, BLOCK_K)
    q_row = q + token.to(tl.int64) * q_token + q_head_of_slot.to(tl.int64) * q_head
    queries = tl.load(q_row[:, None] + in_key[None, :], mask=used[:, None] & (in_key < D_KEY)[None, :], other=0.0)
    if HAS_SINKS:
        peak = tl.load(sinks + q_head_of_slot, mask=used, other=0.0).to(tl.float32) * LOG2E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        peak = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    column = tl.arange(0, BLOCK_N)
    in_value = tl.arange(0, BLOCK_V)
    key_rows = k + kv_head.to(tl.int64) * k_head
    value_rows = v + kv_head.to(tl.int64) * v_head
    key_offsets = column[None, :] * k_token + in_key[:, None]  # 32 bits are enough inside a block
    value_offsets = column[:, None] * v_token + in_value[None, :]
    n_prefix_blocks = tl.cdiv(base + prefix - begin_prefix, BLOCK_N)
    n_blocks = n_prefix_blocks + tl.cdiv(begin + n_tokens - begin_own, BLOCK_N)
    for block in range(0, n_blocks):
        in_prefix = block < n_prefix_blocks
        first = tl.where(in_prefix, begin_prefix, begin_own - n_prefix_blocks * BLOCK_N) + block * BLOCK_N
        end = tl.where(in_prefix, base + prefix, begin + n_tokens)
        low = tl.where(in_prefix, low_prefix, low_own)
        high = tl.where(in_prefix, base + held, token + 1)
        key = first + column
        there = key < end
        key_block = key_rows + first.to(tl.int64) * k_token
        value_block = value_rows + first.to(tl.int64) * v_token
        keys = tl.load(key_block + key_offsets, mask=there[None, :] & (in_key < D_KEY)[:, None], other=0.0)
        values = tl.load(value_block + value_offsets, mask=there[:, None] & (in_value < D_VALUE)[None, :], other=0.0)
        scores = tl.dot(queries, keys, input_precision="ieee") * factor
        if SOFTCAP > 0:
            scores = _tanh(scores) * (SOFTCAP * LOG2E)
        seen = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
        scores = tl.where(seen, scores, LOWEST)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_peak[:, None])
        shrink = tl.math.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        attended = tl.dot(weights.to(values.dtype), values, attended * shrink[:, None], input_precision="ieee")
        peak = new_peak
    out_row = out + token.to(tl.int64) * out_token + q_head_of_slot.to(tl.int64) * out_head
    result = (attended / total[:, None]).to(out.dtype.element_ty)
    tl.store(out_row[:, None] + in_value[None, :], result, mask=used[:, None] & (in_value < D_VALUE)[None, :])
