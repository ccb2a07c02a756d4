"""Triton kernels of the ZZZ head; the large matrix products of the backward pass are left to cuBLAS.

Notation as in :mod:`timm_zzz.functional`: x (B, d) unit embeddings, mu_c unit class means, U_c (r, d) orthonormal rows,
a = 1 / sigma2, t = U_c (x - mu_c), rho = a v / (1 + a v). Zeros pad r to R, a power of two, d to dp, a multiple of 8,
and C to cp, a multiple of 16, so that every matrix product is aligned.

Products that need float32 precision are 'ieee' if SPLIT, which stands for float32 precision throughout; otherwise they
are sums of TF32 products of parts of their factors. The matrix units truncate the digits for which a sum has no room,
so a long sum is made of short ones, each with its small terms first. (TF32 products in factor_kernel at R = 4 give a
wrong M for every second class with Triton 3.6 on an H200, so they are 'ieee' there, too.)

Unit vectors are stored in float16, which rounds numbers up to 1 eight times finer than bfloat16. They are multiplied by
16 (SCALE) to avoid subnormals. For float32 precision they are sums hi + lo of two float16 numbers; of the four products
of two such sums, lo lo is left out (2^-22 of the whole).

COEF is a float32 buffer with the coefficients of the classes, in these sections:

- (C, R) offset U_c mu_c
- (C, R) rho
- (C,) |mu_c|^2
- (C,) bias_c - 1/2 sum log(1 + a v)
- (C,) flag of an ill-conditioned A_c
- (C,) and (C,) two factors of |weight_c|
- (C, R, R) M, with U_c = M A_c^T

PARTIAL is a float32 buffer of the backward pass, with the gradients g of the logits:

- (C, R) h = sum_b g rho t
- (C, R) M^T h
- (C, R, R) M^T sym, see logits_grad_kernel
- (C,) sum_b g
- (C,) mu dL/dmu
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

SCALE = 16.0
_S = tl.constexpr(SCALE)
AMAX_PROGRAMS = 128
_AMAX_PROGRAMS = tl.constexpr(AMAX_PROGRAMS)


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Wait for the previous kernel: with OVERLAP, this one is launched while that one runs, to hide the launch time.

    A kernel waits before it reads or writes, so it also runs after all that the previous kernel waited for. The one
    exception is in rows_kernel.
    """
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def _log1p(y):
    # Kahan's formula, which is accurate for small y, unlike log(1 + y)
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _softplus(raw):
    return tl.maximum(raw, 0.0) + _log1p(tl.exp(-tl.abs(raw)))


@triton.jit
def _sigmoid(raw):
    return 1.0 / (1.0 + tl.exp(-raw))


@triton.jit
def _tf32(x):
    """Round to the nearest TF32 number; the matrix units would truncate."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, SPLIT: tl.constexpr):
    """Compute acc + a b in float32 precision; without SPLIT, b has to be exact in TF32."""
    if SPLIT:
        return tl.dot(a, b, acc, input_precision='ieee')
    hi = _tf32(a)
    acc = tl.dot(a - hi, b, acc, input_precision='tf32')
    return tl.dot(hi, b, acc, input_precision='tf32')


@triton.jit
def _dot3(a, b, SPLIT: tl.constexpr):
    """Compute a b in float32 precision."""
    if SPLIT:
        return tl.dot(a, b, input_precision='ieee')
    a_hi, b_hi = _tf32(a), _tf32(b)
    acc = tl.dot(a - a_hi, b_hi, input_precision='tf32')
    acc = tl.dot(a_hi, b - b_hi, acc, input_precision='tf32')
    return tl.dot(a_hi, b_hi, acc, input_precision='tf32')


@triton.jit
def _gram(rows, G, half, SPLIT: tl.constexpr):
    """Add rows rows^T to G + half + half^T in float32 precision; return (G, half)."""
    if SPLIT:
        return G + tl.dot(rows, tl.trans(rows), input_precision='ieee'), half
    hi = _tf32(rows)
    half = tl.dot(hi, tl.trans(rows - hi), half, input_precision='tf32')
    return tl.dot(hi, tl.trans(hi), G, input_precision='tf32'), half


@triton.jit
def _precision(S2RAW, s2_min):
    """Compute a = 1 / sigma2."""
    return 1.0 / (_softplus(tl.load(S2RAW).to(tl.float32)) + s2_min)


@triton.jit
def _unit(x):
    """Divide a vector by its norm, unless it is zero; return it and two factors of the norm."""
    largest = tl.max(tl.abs(x), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    x = x / largest
    norm = tl.sqrt(tl.sum(x * x, 0))
    norm = tl.where(norm == 0, 1.0, norm)
    return x / norm, largest, norm


@triton.jit
def _scale_to_8(x):
    """Compute the power of two that scales a number > 0 to between 8 and 16."""
    exponent = x.to(tl.int32, bitcast=True) >> 23
    return ((257 - tl.maximum(exponent, 3)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _embed(F, XH, XL, XF, b, d, dp, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise one embedding, and store SCALE x as hi + lo.

    With EXACT, for 16-bit features, store in XH the features times a power of two, which float16 represents to 2^-28 of
    their norm, and in XF the factor that makes them SCALE x.
    """
    i = tl.arange(0, BLOCK)
    x = tl.load(F + b * d + i, mask=i < d, other=0.0).to(tl.float32)
    if EXACT:
        x = x * _scale_to_8(tl.max(tl.abs(x), 0))  # so that no square leaves float32's range
        x = x * _scale_to_8(tl.sqrt(tl.sum(x * x, 0)))
        norm = tl.sqrt(tl.sum(x * x, 0))
        tl.store(XF + b, 1.0 / tl.where(norm == 0, 1.0, norm) * _S)
        tl.store(XH + b * dp + i, x.to(tl.float16), mask=i < dp)
    else:
        x, _, _ = _unit(x)
        x = x * _S
        hi = x.to(tl.float16)
        tl.store(XH + b * dp + i, hi, mask=i < dp)
        tl.store(XL + b * dp + i, (x - hi.to(tl.float32)).to(tl.float16), mask=i < dp)


@triton.jit
def _embedding_grad(
    F, XF, DX, S2RAW, AMAX, DPREC, DF, DS2, s2_min, grad_top, b, B, C, d, dp, EXACT: tl.constexpr,
    BLOCK: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Compute the gradient of embedding b from that of its normalised form, DX = SCALE s / a dL/dx.

    With EXACT, DX also has the factor XF of the embedding. At b = B, compute the gradient of sigma2_raw from the sum of
    the classes' parts of dL/da.
    """
    a = _precision(S2RAW, s2_min)
    if b < B:
        i = tl.arange(0, BLOCK)
        x, largest, norm = _unit(tl.load(F + b * d + i, mask=i < d, other=0.0).to(tl.float32))
        unscale = a / (_S * _grad_scale(AMAX, grad_top))
        if EXACT:
            unscale = unscale / tl.load(XF + b)
        dx = tl.load(DX + b * dp + i, mask=i < d, other=0.0) * unscale
        df = (dx - x * tl.sum(x * dx, 0)) / norm / largest
        tl.store(DF + b * d + i, df, mask=i < d)
    else:
        acc = tl.zeros([BC], tl.float32)
        for start in range(0, C, BC):
            c = start + tl.arange(0, BC)
            acc += tl.load(DPREC + c, mask=c < C, other=0.0)
        tl.store(DS2, -a * a * _sigmoid(tl.load(S2RAW).to(tl.float32)) * tl.sum(acc, 0))


@triton.jit
def _grad_scale(AMAX, grad_top):
    """Compute the factor s that scales the largest gradient of a logit to grad_top, within float16's range."""
    amax = tl.max(tl.load(AMAX + tl.arange(0, _AMAX_PROGRAMS)), 0)
    return tl.where(amax > 0, tl.minimum(grad_top / amax, 1e30), 1.0)


@triton.jit
def _rows(pid, NC: tl.constexpr, R: tl.constexpr, r: tl.constexpr, C):
    """Return the rows of a program's tile, the class and basis vector of each, and whether it is no padding."""
    row = tl.arange(0, NC * R)
    c = pid * NC + row // R
    j = row % R
    return row, c.to(tl.int64), j, (j < r) & (c < C)


@triton.jit
def _load_tile(BASE, at_row, row_ok, i, d, stride: tl.constexpr):
    """Load a float32 tile at 32-bit offsets from BASE, the program's own part of a tensor; zero outside."""
    at = at_row[:, None] + (i * stride)[None, :]
    return tl.load(BASE + at, mask=row_ok[:, None] & (i < d)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _inverse_factor(G, row, R: tl.constexpr, NC: tl.constexpr, r: tl.constexpr):
    """Invert the Cholesky factor of every R x R block on G's diagonal; return it and each block's smallest pivot.

    By Gauss-Jordan elimination on [G | I], all blocks at once; a row beyond r has pivot 1.
    """
    N: tl.constexpr = NC * R
    col = tl.arange(0, N)
    same = (row // R)[:, None] == (col // R)[None, :]
    eye = row[:, None] == col[None, :]
    G = tl.where(same, G, 0.0)
    M = tl.where(eye, 1.0, 0.0)
    scale = tl.full([N], 1.0, tl.float32)
    smallest = tl.full([N], 1.0, tl.float32)
    for j in range(r):
        pick_col = (col % R == j)[None, :] & same
        pick_row = (row % R == j)[:, None]
        row_G = tl.sum(tl.where(pick_row, G, 0.0), 0)[None, :]
        row_M = tl.sum(tl.where(pick_row, M, 0.0), 0)[None, :]
        column = tl.sum(tl.where(pick_col, G, 0.0), 1)
        pivot = tl.sum(tl.where(pick_col, row_G, 0.0), 1)
        # NaN counts as too small
        smallest = tl.where(pivot >= smallest, smallest, tl.where(pivot == pivot, pivot, -1.0))
        safe = tl.where(pivot > 0, pivot, 1.0)
        scale = tl.where(row % R == j, tl.rsqrt(safe), scale)
        factor = tl.where(same & (row % R > j)[:, None], (column / safe)[:, None], 0.0)
        G = G - factor * row_G
        M = M - factor * row_M
    return M * scale[:, None], smallest


@triton.jit
def _store_split(HI, LO, at, value, mask, SPLIT: tl.constexpr):
    """Store SCALE times the value as float16, with SPLIT as the sum of two of them."""
    value = value * _S
    hi = value.to(tl.float16)
    tl.store(HI + at, hi, mask=mask)
    if SPLIT:
        tl.store(LO + at, (value - hi.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def factor_kernel(
    A, W, VRAW, BIAS, S2RAW, COEF, v_min, s2_min, C, cp, d, r: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
    BASIS_ONLY: tl.constexpr, NC: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute the coefficients of NC classes, see COEF above; M by Cholesky-QR of the Gram matrix.

    A class whose A_c is too ill-conditioned for that is flagged, for rows_kernel.
    """
    _wait(OVERLAP)
    pid = tl.program_id(0).to(tl.int64)
    N: tl.constexpr = NC * R
    row, c, j, ok = _rows(pid, NC, R, r, C)
    col = tl.arange(0, N)
    same = (row // R)[:, None] == (col // R)[None, :]
    eye = row[:, None] == col[None, :]
    A += pid * (NC * d * r)
    W += pid * (NC * d)
    at_a, at_w, c_ok = (row // R) * (d * r) + j, (row // R) * d, c < C

    if not BASIS_ONLY:
        a = _precision(S2RAW, s2_min)
        raw = tl.load(VRAW + c * r + j, mask=ok, other=0.0).to(tl.float32)
        bias = tl.load(BIAS + c, mask=c_ok, other=0.0).to(tl.float32)
    G = tl.zeros([N, N], tl.float32)
    half = tl.zeros([N, N], tl.float32)
    w2 = tl.zeros([N, BLOCK], tl.float32)
    aw = tl.zeros([N, BLOCK], tl.float32)
    i = tl.arange(0, BLOCK)
    # Tiles are loaded two rounds before they are used
    rows_1, rows_2 = _load_tile(A, at_a, ok, i, d, r), _load_tile(A, at_a, ok, i + BLOCK, d, r)
    w_1 = _load_tile(W, at_w, c_ok & (not BASIS_ONLY), i, d, 1)
    w_2 = _load_tile(W, at_w, c_ok & (not BASIS_ONLY), i + BLOCK, d, 1)
    for start in range(0, d, BLOCK):
        rows, rows_1, w, w_1 = rows_1, rows_2, w_1, w_2
        i = start + 2 * BLOCK + tl.arange(0, BLOCK)
        rows_2 = _load_tile(A, at_a, ok, i, d, r)
        if not BASIS_ONLY:
            w_2 = _load_tile(W, at_w, c_ok, i, d, 1)
            w2 += w * w
            aw += w * rows
        G, half = _gram(rows, G, half, SPLIT)
    w2, aw = tl.sum(w2, 1), tl.sum(aw, 1)
    G += half + tl.trans(half)

    # Scale the columns of A_c to unit length, then do one round of Cholesky-QR, or two where one is not accurate.
    norm2 = tl.sum(tl.where(eye, G, 0.0), 1)
    # float32's range with room for the products of the elimination; NaN compares false
    in_range = ((norm2 > 1e-30) & (norm2 < 1e30)) | (ok == 0)
    rnorm = tl.where(in_range & ok, tl.rsqrt(tl.where(in_range & ok, norm2, 1.0)), 1.0)
    rnorm_col = tl.sum(tl.where(eye, rnorm[:, None], 0.0), 0)
    G = tl.where((ok & in_range)[:, None] & same, G * rnorm[:, None] * rnorm_col[None, :], tl.where(eye, 1.0, 0.0))
    M, smallest = _inverse_factor(tl.where(G == G, G, 0.0), row, R, NC, r)
    M = M * rnorm_col[None, :]
    good = _whole_class(in_range & (smallest > 1e-2), same, eye)
    M = tl.where(good[:, None], M, 0.0)
    if tl.min(tl.where(good, smallest, 1.0), 0) < 0.25:
        G = tl.zeros([N, N], tl.float32)
        half = tl.zeros([N, N], tl.float32)
        for start in range(0, d, BLOCK):
            i = start + tl.arange(0, BLOCK)
            rows = tl.where(good[:, None], _load_tile(A, at_a, ok, i, d, r), 0.0)
            G, half = _gram(_dot3(M, rows, SPLIT), G, half, SPLIT)
        G += half + tl.trans(half)
        G = tl.where((ok & good)[:, None] & same, G, tl.where(eye, 1.0, 0.0))
        M2, smallest = _inverse_factor(G, row, R, NC, r)
        M = tl.dot(M2, M, input_precision='ieee')

    MM = COEF + 2 * cp * R
    first, inside = (j == 0) & (c < cp), c < cp
    FACTOR = MM + 5 * cp
    # M of class c is (R, R), and lies in the columns of that class
    tl.store(FACTOR + (c * (R * R) + j * R)[:, None] + (col % R)[None, :], M, mask=same & inside[:, None])
    tl.store(MM + 2 * cp + c, tl.where(good, 0.0, 1.0), mask=first)
    if not BASIS_ONLY:
        largest = tl.full([N], 1.0, tl.float32)
        in_range = (w2 > 1e-30) & (w2 < 1e30)
        if tl.min(in_range.to(tl.int32), 0) == 0:
            largest = tl.zeros([N], tl.float32)
            for start in range(0, d, BLOCK):
                w = _load_tile(W, at_w, c_ok, start + tl.arange(0, BLOCK), d, 1)
                largest = tl.maximum(largest, tl.max(tl.abs(w), 1))
            largest = tl.where(largest > 0, largest, 1.0)
            w2 = tl.zeros([N], tl.float32)
            aw = tl.zeros([N], tl.float32)
            for start in range(0, d, BLOCK):
                i = start + tl.arange(0, BLOCK)
                w = _load_tile(W, at_w, c_ok, i, d, 1) / largest[:, None]
                w2 += tl.sum(w * w, 1)
                aw += tl.sum(w * tl.where(good[:, None], _load_tile(A, at_a, ok, i, d, r), 0.0), 1)
        wnorm = tl.sqrt(w2)
        wnorm = tl.where(wnorm == 0, 1.0, wnorm)
        aw = tl.sum(tl.where(eye, tl.where(good, aw, 0.0)[:, None], 0.0), 0)
        # Masked, since a product with 0 would pass one class's NaN on to others
        offset = tl.sum(tl.where(same, M * aw[None, :], 0.0), 1) / wnorm
        av = tl.where(ok, a * (_softplus(raw) + v_min), 0.0)
        logdet = _class_sum(_log1p(av), same, eye)
        tl.store(COEF + c * R + j, tl.where(ok, offset, 0.0), mask=inside)
        tl.store(COEF + cp * R + c * R + j, av / (1.0 + av), mask=inside)
        tl.store(MM + c, w2 / (wnorm * wnorm), mask=first)
        tl.store(MM + cp + c, bias - 0.5 * logdet, mask=first)
        tl.store(MM + 3 * cp + c, largest, mask=first)
        tl.store(MM + 4 * cp + c, wnorm, mask=first)


@triton.jit
def _whole_class(good, same, eye):
    """Tell, for each row, whether all rows of its class are good."""
    return _class_sum(tl.where(good, 0.0, 1.0), same, eye) == 0


@triton.jit
def basis_kernel(
    A, W, COEF, OUT, C, cp, d, dp, r: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, BASIS_ONLY: tl.constexpr,
    NC: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute a tile of bases U_c = M A_c^T and normalised means. With BASIS_ONLY, OUT is float32 (C, R, dp)."""
    _wait(OVERLAP)
    pid = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    N: tl.constexpr = NC * R
    row, c, j, ok = _rows(pid, NC, R, r, C)
    col = tl.arange(0, N)
    same = (row // R)[:, None] == (col // R)[None, :]
    inside, i_ok = (c < cp)[:, None], (i < dp)[None, :]
    MM = COEF + 2 * cp * R
    FACTOR = MM + 5 * cp + (c * (R * R) + j * R)[:, None] + (col % R)[None, :]
    M = tl.load(FACTOR, mask=same & inside, other=0.0)
    good = tl.load(MM + 2 * cp + c, mask=c < cp, other=1.0) == 0
    rows = _load_tile(A + pid * (NC * d * r), (row // R) * (d * r) + j, ok & good, i, d, r)
    if not BASIS_ONLY:
        NM: tl.constexpr = 16
        # The means of the NC classes, padded to 16 rows
        m = tl.arange(0, NM)
        cm = pid * NC + m
        mine_ok = (m < NC) & (cm < cp)
        w = _load_tile(W + pid * (NC * d), m * d, mine_ok & (cm < C), i, d, 1)
        largest = tl.load(MM + 3 * cp + cm, mask=mine_ok, other=1.0)
        wnorm = tl.load(MM + 4 * cp + cm, mask=mine_ok, other=1.0)
    q = _dot3(M, rows, SPLIT)
    mine = pid * (N * dp)
    at = (row * dp)[:, None] + i[None, :]
    if BASIS_ONLY:
        tl.store(OUT + mine + at, q, mask=inside & i_ok)
    else:
        LO = OUT + cp.to(tl.int64) * R * dp + mine
        _store_split(OUT + mine, LO, at, q, inside & i_ok, SPLIT)
        w = w / largest[:, None] / wnorm[:, None]
        MEANS = OUT + (2 if SPLIT else 1) * cp.to(tl.int64) * R * dp + pid * (NC * dp)
        at = (m * dp)[:, None] + i[None, :]
        mask = mine_ok[:, None] & i_ok
        _store_split(MEANS, MEANS + cp.to(tl.int64) * dp, at, w, mask, True)
        if not SPLIT:
            _store_split(MEANS + 2 * cp.to(tl.int64) * dp, MEANS, at, w, mask, False)


@triton.jit
def _repair(
    A, W, OUT, COEF, SCRATCH, pid, C, cp, d, dp, r, R: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    BASIS_ONLY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the bases of flagged classes by Gram-Schmidt, as in timm_zzz.ops.reference."""
    OFFSET = COEF
    FLAG = COEF + 2 * cp * R + 2 * cp
    FACTOR = FLAG + 3 * cp
    LO = OUT + cp.to(tl.int64) * R * dp
    block = pid * CLASSES + tl.arange(0, CLASSES)
    if tl.max(tl.load(FLAG + block, mask=block < C, other=0.0), 0) > 0:
        i = tl.arange(0, BLOCK)
        k = tl.arange(0, R)
        inside = i < d
        Q = SCRATCH + pid * r * BLOCK
        for c in range(pid * CLASSES, tl.minimum((pid + 1) * CLASSES, C)):
            if tl.load(FLAG + c) > 0:
                mu = tl.zeros([BLOCK], tl.float32)
                if not BASIS_ONLY:
                    mu, _, _ = _unit(tl.load(W + c * d + i, mask=inside, other=0.0).to(tl.float32))
                leverage = tl.where(inside, 0.0, float('inf'))
                for j in range(0, r):
                    x = tl.load(A + (c * d + i) * r + j, mask=inside, other=0.0).to(tl.float32)
                    largest = tl.max(tl.abs(x), 0)
                    largest = tl.where(largest > 0, largest, 1.0)
                    x = x / largest
                    size = tl.sqrt(tl.sum(x * x, 0))
                    factor = tl.where(k == j, 1.0 / largest, 0.0)
                    for n in range(0, j):
                        q = tl.load(Q + n * BLOCK + i)
                        coef = tl.sum(q * x, 0)
                        x -= coef * q
                        factor -= coef * tl.load(FACTOR + (c * R + n) * R + k)
                    dependent = tl.sqrt(tl.sum(x * x, 0)) <= 4 * 1.2e-7 * size
                    # The axis with the least leverage is far from the span of the rows so far.
                    x = tl.where(
                        dependent,
                        tl.where(i == tl.argmin(tl.where(leverage == leverage, leverage, float('inf')), 0), 1.0, 0.0),
                        x,
                    )
                    for n in range(0, j):
                        q = tl.load(Q + n * BLOCK + i)
                        coef = tl.sum(q * x, 0)
                        x -= coef * q
                        factor -= coef * tl.load(FACTOR + (c * R + n) * R + k)
                    norm = tl.sqrt(tl.sum(x * x, 0))
                    x = x / norm
                    factor = tl.where(dependent, 0.0, factor / norm)
                    leverage += x * x
                    tl.store(Q + j * BLOCK + i, x)
                    tl.store(FACTOR + (c * R + j) * R + k, factor)
                    at = (c * R + j) * dp + i
                    if BASIS_ONLY:
                        tl.store(OUT + at, x, mask=i < dp)
                    else:
                        tl.store(OFFSET + c * R + j, tl.sum(x * mu, 0))
                        _store_split(OUT, LO, at, x, i < dp, SPLIT)
                    tl.debug_barrier()  # the next rows read what other threads wrote


@triton.jit
def rows_kernel(
    A, W, OUT, COEF, SCRATCH, F, XH, XL, XF, programs, C, cp, d, dp, r, R: tl.constexpr, CLASSES: tl.constexpr,
    SPLIT: tl.constexpr, BASIS_ONLY: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Process whole rows: the bases of flagged classes in the first programs, one embedding in each of the others.

    Embeddings need not wait for basis_kernel: they share no data with it, and it has waited for all kernels before.
    """
    pid = tl.program_id(0).to(tl.int64)
    if pid < programs or programs == 0:
        _wait(OVERLAP)
    if pid >= programs:
        _embed(F, XH, XL, XF, pid - programs, d, dp, EXACT, BLOCK)
    else:
        _repair(A, W, OUT, COEF, SCRATCH, pid, C, cp, d, dp, r, R, CLASSES, SPLIT, BASIS_ONLY, BLOCK)


@triton.jit
def logits_kernel(
    XH, XL, XF, CLS, COEF, S2RAW, LOGITS, T, XM, s2_min, B, C, cp, dp, ldl, R: tl.constexpr, SPLIT: tl.constexpr,
    SAVE: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute a tile of logits: t and x mu by matrix products, then squares, weights and sums over r in registers."""
    _wait(OVERLAP)
    BN: tl.constexpr = BC * R
    b = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    k = tl.arange(0, BK)
    MEANS = CLS + (2 if SPLIT else 1) * cp.to(tl.int64) * R * dp
    x_at = (b.to(tl.int64) * dp)[:, None] + k[None, :]
    u_at = (n.to(tl.int64) * dp)[None, :] + k[:, None]
    m_at = (c.to(tl.int64) * dp)[None, :] + k[:, None]
    b_ok, n_ok, c_ok = (b < B)[:, None], (n < cp * R)[None, :], (c < cp)[None, :]
    n_ok1, c_ok1 = n < cp * R, c < C
    offset = tl.load(COEF + n, mask=n_ok1, other=0.0)
    rho = tl.load(COEF + cp * R + n, mask=n_ok1, other=0.0)
    mm = tl.load(COEF + 2 * cp * R + c, mask=c_ok1, other=0.0)
    const = tl.load(COEF + 2 * cp * R + cp + c, mask=c_ok1, other=0.0)
    a = _precision(S2RAW, s2_min)
    t = tl.zeros([BM, BN], tl.float32)
    # hi and lo halves of the means side by side: [BM, 2 BC]
    half = tl.arange(0, 2 * BC)
    c2 = tl.program_id(0) * BC + half % BC
    m2_at = (c2.to(tl.int64) * dp + (half // BC) * (cp * dp))[None, :] + k[:, None]
    m2_ok = (c2 < cp)[None, :]
    m2 = tl.zeros([BM, 2 * BC], tl.float32)
    m = tl.zeros([BM, BC], tl.float32)
    for start in range(0, dp, BK):
        k_ok = start + k < dp
        xh = tl.load(XH + start + x_at, mask=b_ok & k_ok[None, :], other=0.0)
        uh = tl.load(CLS + start + u_at, mask=n_ok & k_ok[:, None], other=0.0)
        if not EXACT:
            xl = tl.load(XL + start + x_at, mask=b_ok & k_ok[None, :], other=0.0)
            mh = tl.load(MEANS + start + m_at, mask=c_ok & k_ok[:, None], other=0.0)
        if SPLIT:
            ul = tl.load(CLS + cp.to(tl.int64) * R * dp + start + u_at, mask=n_ok & k_ok[:, None], other=0.0)
            t += tl.dot(xh, uh, tl.dot(xl, uh, tl.dot(xh, ul)))
            ml = tl.load(MEANS + start + cp.to(tl.int64) * dp + m_at, mask=c_ok & k_ok[:, None], other=0.0)
            x, mu = xh.to(tl.float32) + xl.to(tl.float32), mh.to(tl.float32) + ml.to(tl.float32)
            # Similar classes differ by small amounts only
            m += tl.dot(x, mu, input_precision='ieee')
        else:
            mhl = tl.load(MEANS + start + m2_at, mask=m2_ok & k_ok[:, None], other=0.0)
            t = tl.dot(xh, uh, t)
            m2 = tl.dot(xh, mhl, m2)
            if not EXACT:
                m = tl.dot(xl, mh, m)
    if not SPLIT:
        m += tl.sum(tl.reshape(m2, [BM, 2, BC]), 1)
    unscale = tl.full([BM], 1.0 / (_S * _S), tl.float32)
    if EXACT:
        unscale = tl.load(XF + b, mask=b < B, other=0.0) * (1.0 / (_S * _S))
    t = t * unscale[:, None] - offset[None, :]
    if SAVE:
        at = (b.to(tl.int64) * (cp * R))[:, None] + n[None, :]
        tl.store(T + at, t * _S, mask=b_ok & n_ok)
    explained = tl.sum(tl.reshape(t * t * rho[None, :], [BM, BC, R]), 2)
    m = m * unscale[:, None]
    if SAVE:
        tl.store(XM + (b.to(tl.int64) * cp)[:, None] + c[None, :], m, mask=b_ok & c_ok)
    logits = 0.5 * a * (explained - mm[None, :] + 2.0 * m) + const[None, :]
    tl.store(LOGITS + (b.to(tl.int64) * ldl)[:, None] + c[None, :], logits, mask=b_ok & c_ok1[None, :])


@triton.jit
def amax_kernel(G, AMAX, n, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Compute the largest magnitude of n numbers, for each program's part of them."""
    if OVERLAP:  # without launching dependents: while they wait they slow this small kernel by more than a launch
        cuda.gdc_wait()
    pid = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    part = tl.cdiv(n, _AMAX_PROGRAMS)
    for start in range(0, part, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = pid * part + i
        g = tl.load(G + at, mask=(i < part) & (at < n), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(g))
    tl.store(AMAX + pid, tl.max(largest, 0))


@triton.jit
def logits_grad_kernel(
    G, T, XM, XF, VRAW, S2RAW, COEF, AMAX, GRADS, PARTIAL, DV, DBIAS, DPREC, v_min, s2_min, grad_top, B, C, cp,
    ldg, ldk, r: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, BB: tl.constexpr,
    BC: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute the operands s g rho t and s g of the matrix products, and all sums over b that do not depend on d.

    g are the gradients of the logits. The gradient of the basis is dq = a (sum_b g rho t x - h mu); that of A_c^T is
    M^T (dq + sym q), where sym mirrors the lower triangle of -dq q^T (Walter et al., arXiv:1009.6112), and
    dq q^T = a rho sum_b g t t^T, since U (x - mu) = t. DPREC is each class's part of dL/da. With EXACT, the operands
    include the embedding's factor, see _embed.
    """
    _wait(OVERLAP)
    BN: tl.constexpr = BC * R
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = _grad_scale(AMAX, grad_top)
    rho = tl.load(COEF + cp * R + n)
    row, col = tl.arange(0, BN), tl.arange(0, BN)
    same = (row // R)[:, None] == (col // R)[None, :]
    eye = row[:, None] == col[None, :]
    a = _precision(S2RAW, s2_min)
    MM = COEF + 2 * cp * R
    at_m = ((n // R) * (R * R) + n % R)[:, None] + ((col % R) * R)[None, :]
    Mt = tl.load(MM + 5 * cp + at_m, mask=same, other=0.0)
    mm = tl.load(MM + c)
    offset = tl.load(COEF + n)
    ok = (n % R < r) & (n // R < C)
    at_v = (n // R) * r + n % R
    raw = tl.load(VRAW + at_v, mask=ok, other=0.0).to(tl.float32)
    h = tl.zeros([BN], tl.float32)
    outer = tl.zeros([BN, BN], tl.float32)
    total = tl.zeros([BC], tl.float32)
    total_xm = tl.zeros([BC], tl.float32)
    MEANS = GRADS + (2 if SPLIT else 1) * cp * R
    for start in range(0, B, BB):
        b = (start + tl.arange(0, BB)).to(tl.int64)
        b_ok = (b < B)[:, None]
        t = tl.load(T + (b * (cp * R))[:, None] + n[None, :], mask=b_ok, other=0.0).to(tl.float32) * (1.0 / _S)
        g = tl.load(G + (b * ldg)[:, None] + c[None, :], mask=b_ok & (c < C)[None, :], other=0.0).to(tl.float32)
        row_s = tl.full([BB], 1.0, tl.float32) * s
        if EXACT:
            row_s = tl.load(XF + b, mask=b < B, other=0.0) * s
        xm = tl.load(XM + (b * cp)[:, None] + c[None, :], mask=b_ok, other=0.0)
        total += tl.sum(g, 0)
        total_xm += tl.sum(g * xm, 0)
        at = (b * ldk)[:, None] + c[None, :]
        gs = g * row_s[:, None]
        hi = gs.to(tl.float16)
        tl.store(MEANS + at, (gs - hi.to(tl.float32)).to(tl.float16), mask=b_ok)
        tl.store(MEANS + cp + at, hi, mask=b_ok)
        if not SPLIT:
            tl.store(MEANS + 2 * cp + at, hi, mask=b_ok)
        gt = t * tl.reshape(tl.broadcast_to(g[:, :, None], [BB, BC, R]), [BB, BN])
        # Unless SPLIT, t was stored as float16, which is exact in TF32
        outer = _dot(tl.trans(gt), t, outer, SPLIT)
        grt = gt * rho[None, :]
        h += tl.sum(grt, 0)
        at = (b * ldk)[:, None] + n[None, :]
        hi = (grt * row_s[:, None]).to(tl.float16)
        tl.store(GRADS + at, hi, mask=b_ok)
        if SPLIT:
            tl.store(GRADS + cp * R + at, (grt * s - hi.to(tl.float32)).to(tl.float16), mask=b_ok)
            # Stored without rho, which may be too small for float16; class_grad_kernel multiplies by it
            hi = (gt * s).to(tl.float16)
            tl.store(MEANS + 2 * cp + at, hi, mask=b_ok)
            tl.store(MEANS + 2 * cp + cp * R + at, (gt * s - hi.to(tl.float32)).to(tl.float16), mask=b_ok)

    outer = tl.where(same, outer, 0.0)
    rho_col = tl.sum(tl.where(eye, rho[:, None], 0.0), 0)
    sym = -a * outer * tl.where(row[:, None] >= col[None, :], rho[:, None], rho_col[None, :])
    h_col = tl.sum(tl.where(eye, h[:, None], 0.0), 0)
    tl.store(PARTIAL + n, h)
    tl.store(PARTIAL + cp * R + n, tl.sum(Mt * h_col[None, :], 1))
    at_m = (n * R)[:, None] + (col % R)[None, :]
    tl.store(PARTIAL + 2 * cp * R + at_m, tl.dot(Mt, sym, input_precision='ieee'), mask=same)
    along = tl.sum(tl.reshape(h * offset, [BC, R]), 1)
    PARTIAL += cp * (2 * R + R * R)
    tl.store(PARTIAL + c, total)
    tl.store(PARTIAL + cp + c, a * (total_xm - total * mm - along))

    q2 = tl.sum(tl.where(eye, outer, 0.0), 1)
    v = _softplus(raw) + v_min
    shrink = 1.0 / (1.0 + a * v)
    total_n = tl.reshape(tl.broadcast_to(total[:, None], [BC, R]), [BN])
    tl.store(DV + at_v, 0.5 * a * shrink * (a * shrink * q2 - total_n) * _sigmoid(raw), mask=ok)
    tl.store(DBIAS + c, total, mask=c < C)
    explained = tl.where(ok, q2 * (rho + rho * shrink) - total_n * v * shrink, 0.0)
    explained = tl.sum(tl.reshape(explained, [BC, R]), 1)
    tl.store(DPREC + c, 0.5 * (explained - total * mm + 2.0 * total_xm), mask=c < C)


@triton.jit
def product_kernel(
    GH, GL, XH, XL, OUT, B, N, dp, ldk, EXACT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BB: tl.constexpr,
    OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute OUT = (GH + GL)^T (XH + XL) in float32 precision: (N, dp) from (B, N) with row stride ldk and (B, dp).

    With EXACT, there is no XL.
    """
    _wait(OVERLAP)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i = tl.program_id(1) * BD + tl.arange(0, BD)
    acc = tl.zeros([BN, BD], tl.float32)
    n_ok, i_ok = (n < N)[None, :], (i < dp)[None, :]
    for start in range(0, B, BB):
        b = (start + tl.arange(0, BB)).to(tl.int64)
        b_ok = (b < B)[:, None]
        g_at = (b * ldk)[:, None] + n[None, :]
        x_at = (b * dp)[:, None] + i[None, :]
        gh = tl.trans(tl.load(GH + g_at, mask=b_ok & n_ok, other=0.0))
        gl = tl.trans(tl.load(GL + g_at, mask=b_ok & n_ok, other=0.0))
        xh = tl.load(XH + x_at, mask=b_ok & i_ok, other=0.0)
        if EXACT:
            acc += tl.dot(gh, xh, tl.dot(gl, xh))
        else:
            xl = tl.load(XL + x_at, mask=b_ok & i_ok, other=0.0)
            acc += tl.dot(gh, xh, tl.dot(gl, xh, tl.dot(gh, xl)))
    tl.store(OUT + (n.to(tl.int64) * dp)[:, None] + i[None, :], acc, mask=(n < N)[:, None] & i_ok)


@triton.jit
def _class_grad(
    S2RAW, AMAX, CLS, COEF, PARTIAL, DU, P, DA, DW, s2_min, grad_top, pid, tile, C, cp, d, dp, r: tl.constexpr,
    R: tl.constexpr, NC: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute a tile of the gradients of A and weight for NC classes; see logits_grad_kernel.

    DU = SCALE s sum_b g rho t x, without rho if SPLIT, and P = SCALE s sum_b g x.
    """
    i = tile * BLOCK + tl.arange(0, BLOCK)
    N: tl.constexpr = NC * R
    NM: tl.constexpr = 16
    row, c, j, ok = _rows(pid, NC, R, r, C)
    # The means of the NC classes, padded to 16 rows
    m = tl.arange(0, NM)
    cm = pid * NC + m
    m_ok = (m < NC) & (cm < C)
    mine, mine_m = pid * (N * dp), pid * (NC * dp)
    q = _load_tile(CLS + mine, row * dp, ok, i, d, 1)
    if SPLIT:
        q += _load_tile(CLS + cp.to(tl.int64) * R * dp + mine, row * dp, ok, i, d, 1)
    dU = _load_tile(DU + mine, row * dp, ok, i, d, 1)
    if SPLIT:
        dU = dU * tl.load(COEF + cp * R + c * R + j, mask=ok, other=0.0)[:, None]
    MEANS = CLS + (2 if SPLIT else 1) * cp.to(tl.int64) * R * dp + mine_m
    mu = _load_tile(MEANS, m * dp, m_ok, i, d, 1) + _load_tile(MEANS + cp.to(tl.int64) * dp, m * dp, m_ok, i, d, 1)
    p = _load_tile(P + mine_m, m * dp, m_ok, i, d, 1)

    col = tl.arange(0, N)
    same = (row // R)[:, None] == (col // R)[None, :]
    at = (c * (R * R))[:, None]
    mask = same & (c < C)[:, None]
    Mt = tl.load(COEF + cp * (2 * R + 5) + at + j[:, None] + ((col % R) * R)[None, :], mask=mask, other=0.0)
    Ms = tl.load(PARTIAL + 2 * cp * R + at + (j * R)[:, None] + (col % R)[None, :], mask=mask, other=0.0)
    Mh = tl.load(PARTIAL + cp * R + c * R + j, mask=ok, other=0.0)
    h = tl.load(PARTIAL + pid * N + col, mask=(pid * NC + col // R) < C, other=0.0)
    total = tl.load(PARTIAL + cp * (2 * R + R * R) + cm, mask=m_ok, other=0.0)
    mu_dmu = tl.load(PARTIAL + cp * (2 * R + R * R + 1) + cm, mask=m_ok, other=0.0)
    largest = tl.load(COEF + cp * (2 * R + 3) + cm, mask=m_ok, other=1.0)
    wnorm = tl.load(COEF + cp * (2 * R + 4) + cm, mask=m_ok, other=1.0)
    a = _precision(S2RAW, s2_min)
    unscale = a / (_S * _grad_scale(AMAX, grad_top))

    # Unless SPLIT, dU and q were stored as float16, which is exact in TF32
    Mh = tl.where((row // R)[:, None] == m[None, :], (Mh * (-a / _S))[:, None], 0.0)
    dA = _dot(Mh, mu if SPLIT else _tf32(mu), tl.zeros([N, BLOCK], tl.float32), SPLIT)
    dA = _dot(Mt * unscale, dU, dA, SPLIT)
    dA = _dot(Ms * (1.0 / _S), q, dA, SPLIT)
    at = ((row // R) * (d * r) + j)[:, None] + (i * r)[None, :]
    tl.store(DA + pid * (NC * d * r) + at, dA, mask=ok[:, None] & (i < d)[None, :])

    h = tl.where(m[:, None] == (col // R)[None, :], (h * (-a / _S))[None, :], 0.0)
    dw = _dot(h, q, p * unscale - mu * ((a * total + mu_dmu) * (1.0 / _S))[:, None], SPLIT)
    dw = dw / wnorm[:, None] / largest[:, None]
    tl.store(DW + pid * (NC * d) + (m * d)[:, None] + i[None, :], dw, mask=m_ok[:, None] & (i < d)[None, :])


@triton.jit
def class_grad_kernel(
    S2RAW, AMAX, CLS, COEF, PARTIAL, DU, P, DA, DW, F, XF, DX, DPREC, DF, DS2, s2_min, grad_top, tiles, B, C,
    all_classes, cp, d, dp, r: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, NC: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Compute gradients of the classes in the first programs, of one embedding in each other, last of sigma2_raw."""
    _wait(OVERLAP)
    pid = tl.program_id(0).to(tl.int64)
    per_row = tl.cdiv(d, BLOCK)
    if pid < tiles:
        _class_grad(
            S2RAW, AMAX, CLS, COEF, PARTIAL, DU, P, DA, DW, s2_min, grad_top, pid // per_row, pid % per_row, C, cp, d,
            dp, r, R, NC, SPLIT, BLOCK
        )  # fmt: skip
    else:
        _embedding_grad(
            F, XF, DX, S2RAW, AMAX, DPREC, DF, DS2, s2_min, grad_top, pid - tiles, B, all_classes, d, dp, EXACT,
            WIDTH, 1024
        )  # fmt: skip


@triton.jit
def _class_sum(x, same, eye):
    """Sum over the rows of each class; return the sum in each of its rows."""
    x = tl.sum(tl.where(same, x[:, None], 0.0), 0)
    return tl.sum(tl.where(eye, x[None, :], 0.0), 1)
