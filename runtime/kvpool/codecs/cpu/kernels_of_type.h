/* Included once for each type of elements. TYPE is its name, BITS its elements as they lie in memory, ORDER an integer
 * that is in their order, INFINITE infinity as such an integer, TOO_FAR the least float32, as bits, that would become
 * infinite when it is narrowed. */

#define OF(name) JOIN(TYPE, name)

INLINE void OF(measure_columns)(
    const BITS *restrict tile, int64_t rows, int64_t n, ORDER *restrict lo, ORDER *restrict hi
) {
    for (int64_t i = 0; i < n; i++) lo[i] = hi[i] = OF(ordered)(tile[i]);
    for (int64_t row = 1; row < rows; row++) {
        const BITS *restrict values = tile + row * n;
        for (int64_t i = 0; i < n; i++) {
            ORDER value = OF(ordered)(values[i]);
            lo[i] = value < lo[i] ? value : lo[i];
            hi[i] = value > hi[i] ? value : hi[i];
        }
    }
}

/* Of `repeats` times the same groups, a row each. */
INLINE void OF(measure_rows)(
    const BITS *restrict tile, int64_t repeats, int64_t groups, int64_t n, ORDER *restrict lo, ORDER *restrict hi
) {
    for (int64_t repeat = 0; repeat < repeats; repeat++)
        for (int64_t group = 0; group < groups; group++) {
            const BITS *restrict values = tile + (repeat * groups + group) * n;
            ORDER least = OF(ordered)(values[0]), most = least;
            for (int64_t i = 0; i < n; i++) {
                ORDER value = OF(ordered)(values[i]);
                least = value < least ? value : least;
                most = value > most ? value : most;
            }
            lo[group] = repeat == 0 || least < lo[group] ? least : lo[group];
            hi[group] = repeat == 0 || most > hi[group] ? most : hi[group];
        }
}

/* Writes zeros and scales of `n` groups by their ends, and what quantizing needs; returns what is wrong. */
INLINE int OF(scale_as)(
    const plane_t *plane, int64_t n, const ORDER *restrict lo, const ORDER *restrict hi, const float *restrict bounds,
    BITS *restrict zeros, uint16_t *restrict scales, float *restrict zero, float *restrict inverse,
    const int symmetric, const int clips
) {
    const float levels = (float)plane->levels, share = (float)(1.0 / (double)plane->levels);
    uint32_t infinite = 0, too_far = 0;
    for (int64_t i = 0; i < n; i++) {
        infinite |= (uint32_t)(hi[i] >= INFINITE) | (uint32_t)(lo[i] <= ~INFINITE);
        float least = OF(widened)((BITS)OF(ordered)((BITS)lo[i])), most = OF(widened)((BITS)OF(ordered)((BITS)hi[i]));
        if (clips) {
            least = clipped(least, -bounds[i], bounds[i]);
            most = clipped(most, -bounds[i], bounds[i]);
        }
        float base = 0.0f, reach = -least > most ? -least : most; /* perhaps a negative zero */
        if (!symmetric) {
            base = least + 0.0f; /* no negative zero */
            zeros[i] = OF(narrowed)(base);
            reach = most - base;
        }
        uint32_t bits = (as_bits(reach * share + 0.0f) + 0xffffu) & 0xffff0000u;
        bits = bits > 0x00800000u ? bits : 0x00800000u;
        const float step = as_float(bits), top = step * levels + base;
        too_far |= (uint32_t)((as_bits(top) & 0x7fffffffu) >= TOO_FAR);
        scales[i] = (uint16_t)(bits >> 16);
        zero[i] = base;
        inverse[i] = 1.0f / step;
    }
    return (infinite ? NOT_FINITE : 0) | (too_far ? OUT_OF_RANGE : 0);
}

INLINE int OF(scale)(
    const plane_t *plane, int64_t n, const ORDER *lo, const ORDER *hi, const float *bounds, BITS *zeros,
    uint16_t *scales, float *zero, float *inverse
) {
    if (plane->symmetric && bounds) return OF(scale_as)(plane, n, lo, hi, bounds, zeros, scales, zero, inverse, 1, 1);
    if (plane->symmetric) return OF(scale_as)(plane, n, lo, hi, bounds, zeros, scales, zero, inverse, 1, 0);
    if (bounds) return OF(scale_as)(plane, n, lo, hi, bounds, zeros, scales, zero, inverse, 0, 1);
    return OF(scale_as)(plane, n, lo, hi, bounds, zeros, scales, zero, inverse, 0, 0);
}

/* A row; `zero` and `inverse` are of each column, or (stride 0) the same for all. */
INLINE void OF(quantize)(
    const BITS *restrict values, uint8_t *restrict codes, int64_t n, const float *restrict zero,
    const float *restrict inverse, const int stride, const int symmetric
) {
    for (int64_t i = OF(quantize_run)(values, codes, n, zero, inverse, stride, symmetric); i < n; i++)
        codes[i] = nearest((OF(widened)(values[i]) - zero[i * stride]) * inverse[i * stride]);
}

/* The same where limits have narrowed the range. */
INLINE void OF(clip)(
    const BITS *restrict values, uint8_t *restrict codes, int64_t n, const float *restrict zero,
    const float *restrict inverse, const int stride, const plane_t *plane
) {
    const float most = (float)plane->levels, least = plane->symmetric ? -most : 0.0f;
    for (int64_t i = 0; i < n; i++)
        codes[i] = nearest(
            clipped((OF(widened)(values[i]) - zero[i * stride]) * inverse[i * stride], least, most)
        );
}

INLINE void OF(encode_row)(
    const plane_t *plane, const BITS *values, uint8_t *codes, int64_t n, const float *zero, const float *inverse,
    const int stride, const int clips
) {
    if (clips)
        OF(clip)(values, codes, n, zero, inverse, stride, plane);
    else if (plane->symmetric)
        OF(quantize)(values, codes, n, zero, inverse, stride, 1);
    else
        OF(quantize)(values, codes, n, zero, inverse, stride, 0);
}

/* Groups are columns: (a, b, c) is (outer, rows of a tile, columns). */
int EXPORTED(OF(encode_columns))(
    const plane_t *plane, const BITS *payload, BITS *zeros, uint16_t *scales, uint8_t *codes, const float *bounds
) {
    const int64_t outer = plane->a, rows = plane->b, n = plane->c, count = outer * rows * n;
    const int packed = plane->code_bytes < count;
    float *zero = malloc((size_t)n * (2 * sizeof(float) + 2 * sizeof(ORDER)) + (packed ? (size_t)count : 0));
    if (!zero) return NO_MEMORY;
    float *inverse = zero + n;
    ORDER *lo = (ORDER *)(inverse + n), *hi = lo + n;
    uint8_t *scratch = (uint8_t *)(hi + n);
    int flaws = 0;
    for (int64_t layer = 0; layer < plane->layers && !(flaws & NOT_FINITE); layer++) {
        const BITS *tile = payload + layer * plane->layer_elements + plane->first_element;
        uint8_t *into = packed ? scratch : codes + layer * plane->code_bytes;
        for (int64_t at = 0; at < outer; at++, tile += rows * n, into += rows * n) {
            const int64_t group = (layer * outer + at) * n;
            OF(measure_columns)(tile, rows, n, lo, hi);
            flaws |= OF(scale)(
                plane, n, lo, hi, bounds ? bounds + group : 0, zeros + group, scales + group, zero, inverse
            );
            for (int64_t row = 0; row < rows; row++)
                OF(encode_row)(plane, tile + row * n, into + row * n, n, zero, inverse, 1, bounds != 0);
        }
        if (packed) pack(scratch, codes + layer * plane->code_bytes, count, plane->code_bytes);
    }
    free(zero);
    return flaws & NOT_FINITE ? NOT_FINITE : flaws;
}

/* Groups are rows: (a, b, c) is (repeats, groups, columns). */
int EXPORTED(OF(encode_rows))(
    const plane_t *plane, const BITS *payload, BITS *zeros, uint16_t *scales, uint8_t *codes, const float *bounds
) {
    const int64_t repeats = plane->a, groups = plane->b, n = plane->c, count = repeats * groups * n;
    const int packed = plane->code_bytes < count;
    float *zero = malloc((size_t)groups * (2 * sizeof(float) + 2 * sizeof(ORDER)) + (packed ? (size_t)count : 0));
    if (!zero) return NO_MEMORY;
    float *inverse = zero + groups;
    ORDER *lo = (ORDER *)(inverse + groups), *hi = lo + groups;
    uint8_t *scratch = (uint8_t *)(hi + groups);
    int flaws = 0;
    for (int64_t layer = 0; layer < plane->layers && !(flaws & NOT_FINITE); layer++) {
        const BITS *tile = payload + layer * plane->layer_elements + plane->first_element;
        uint8_t *into = packed ? scratch : codes + layer * plane->code_bytes;
        const int64_t first = layer * groups;
        OF(measure_rows)(tile, repeats, groups, n, lo, hi);
        flaws |= OF(scale)(
            plane, groups, lo, hi, bounds ? bounds + first : 0, zeros + first, scales + first, zero, inverse
        );
        for (int64_t repeat = 0; repeat < repeats; repeat++)
            for (int64_t group = 0; group < groups; group++, tile += n, into += n)
                OF(encode_row)(plane, tile, into, n, zero + group, inverse + group, 0, bounds != 0);
        if (packed) pack(scratch, codes + layer * plane->code_bytes, count, plane->code_bytes);
    }
    free(zero);
    return flaws & NOT_FINITE ? NOT_FINITE : flaws;
}

INLINE void OF(restore)(
    const uint8_t *restrict codes, BITS *restrict values, int64_t n, const float *restrict zero,
    const float *restrict step, const int stride, const int symmetric
) {
    const uint8_t flip = symmetric ? 128 : 0;
    for (int64_t i = OF(restore_run)(codes, values, n, zero, step, stride, symmetric); i < n; i++)
        values[i] = OF(narrowed)(code_value(codes[i], flip, flip) * step[i * stride] + zero[i * stride]);
}

INLINE void OF(decode_row)(
    const plane_t *plane, const uint8_t *codes, BITS *values, int64_t n, const float *zero, const float *step,
    const int stride
) {
    if (plane->symmetric)
        OF(restore)(codes, values, n, zero, step, stride, 1);
    else
        OF(restore)(codes, values, n, zero, step, stride, 0);
}

int EXPORTED(OF(decode_columns))(
    const plane_t *plane, BITS *payload, const BITS *zeros, const uint16_t *scales, const uint8_t *codes
) {
    const int64_t outer = plane->a, rows = plane->b, n = plane->c, count = outer * rows * n;
    const int packed = plane->code_bytes < count;
    float *zero = malloc((size_t)n * 2 * sizeof(float) + (packed ? (size_t)count : 0));
    if (!zero) return NO_MEMORY;
    float *step = zero + n;
    uint8_t *scratch = (uint8_t *)(step + n);
    for (int64_t layer = 0; layer < plane->layers; layer++) {
        BITS *values = payload + layer * plane->layer_elements + plane->first_element;
        const uint8_t *from = codes + layer * plane->code_bytes;
        if (packed) {
            unpack(from, scratch, count, plane->code_bytes);
            from = scratch;
        }
        for (int64_t at = 0; at < outer; at++) {
            const int64_t group = (layer * outer + at) * n;
            for (int64_t i = 0; i < n; i++) {
                zero[i] = plane->symmetric ? 0.0f : OF(widened)(zeros[group + i]);
                step[i] = as_float((uint32_t)scales[group + i] << 16);
            }
            for (int64_t row = 0; row < rows; row++, from += n, values += n)
                OF(decode_row)(plane, from, values, n, zero, step, 1);
        }
    }
    free(zero);
    return 0;
}

int EXPORTED(OF(decode_rows))(
    const plane_t *plane, BITS *payload, const BITS *zeros, const uint16_t *scales, const uint8_t *codes
) {
    const int64_t repeats = plane->a, groups = plane->b, n = plane->c, count = repeats * groups * n;
    const int packed = plane->code_bytes < count;
    uint8_t *scratch = packed ? malloc((size_t)count) : 0;
    if (packed && !scratch) return NO_MEMORY;
    for (int64_t layer = 0; layer < plane->layers; layer++) {
        BITS *values = payload + layer * plane->layer_elements + plane->first_element;
        const uint8_t *from = codes + layer * plane->code_bytes;
        if (packed) {
            unpack(from, scratch, count, plane->code_bytes);
            from = scratch;
        }
        for (int64_t repeat = 0; repeat < repeats; repeat++)
            for (int64_t own = layer * groups; own < (layer + 1) * groups; own++, from += n, values += n) {
                const float zero = plane->symmetric ? 0.0f : OF(widened)(zeros[own]);
                const float step = as_float((uint32_t)scales[own] << 16);
                OF(decode_row)(plane, from, values, n, &zero, &step, 0);
            }
    }
    free(scratch);
    return 0;
}

#undef OF
#undef TYPE
#undef BITS
#undef ORDER
#undef INFINITE
#undef TOO_FAR
