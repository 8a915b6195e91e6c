/* The codecs on a CPU: one pass over memory for each of measuring, quantizing and restoring.
 *
 * The bytes are those of `kvpool.codecs.tensors`, which says what they mean; `kvpool.codecs.format` says where they lie.
 * Every float operation is one that IEEE 754 defines, in the same order, and the compiler must not fuse any
 * (-ffp-contract=off). Rounding is to nearest, halves to even, everywhere. Ranges are found on integers that are in the
 * floats' order, so that an infinity or NaN is the least or the largest of all.
 *
 * Callers check lengths and alignment. Nothing is kept between calls: any thread may call, and many at once.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_FINITE = 1, OUT_OF_RANGE = 2, NO_MEMORY = 4 };

#define INLINE static inline __attribute__((always_inline))
#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)
/* What is exported has the name of the kind of processor that it was compiled for at its end. */
#define EXPORTED(name) JOIN(name, LEVEL)

/* A plane of all layers. Its elements in a layer of the payload are an array of axes a, b, c. */
typedef struct {
    int64_t layers, layer_elements, first_element;
    int64_t a, b, c;
    int64_t code_bytes; /* of a layer */
    int64_t levels, symmetric;
} plane_t;

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Elements: widened to float32, narrowed from it (not for what overflows), put in order as signed integers. */

INLINE float f32_widened(uint32_t bits) { return as_float(bits); }
INLINE uint32_t f32_narrowed(float value) { return as_bits(value); }
INLINE int32_t f32_ordered(uint32_t bits) { return (int32_t)(bits ^ ((uint32_t)((int32_t)bits >> 31) & 0x7fffffffu)); }

INLINE float bf16_widened(uint16_t bits) { return as_float((uint32_t)bits << 16); }
INLINE uint16_t bf16_narrowed(float value) {
    uint32_t bits = as_bits(value);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
INLINE int16_t bf16_ordered(uint16_t bits) { return (int16_t)(bits ^ ((uint16_t)((int16_t)bits >> 15) & 0x7fffu)); }

INLINE float f16_widened(uint16_t bits) {
    uint32_t size = ((uint32_t)bits & 0x7fffu) << 13;
    return as_float(as_bits(as_float(size) * 0x1p112f) | ((uint32_t)bits & 0x8000u) << 16);
}
INLINE uint16_t f16_narrowed(float value) {
    uint32_t bits = as_bits(value), size = bits & 0x7fffffffu;
    uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    uint32_t subnormal = as_bits(as_float(size) + 0.5f) - 0x3f000000u;
    return (uint16_t)((size >= 0x38800000u ? normal : subnormal) | ((bits >> 16) & 0x8000u));
}
INLINE int16_t f16_ordered(uint16_t bits) { return bf16_ordered(bits); }

#if defined(__AVX2__) && defined(__F16C__)
#include "avx2.h"
#else
#define to_half_run(source, into, n) 0
#define from_half_run(source, into, n) 0
#define f32_quantize_run(values, codes, n, zero, inverse, stride, symmetric) 0
#define f16_quantize_run f32_quantize_run
#define bf16_quantize_run f32_quantize_run
#define f32_restore_run(codes, values, n, zero, step, stride, symmetric) 0
#define f16_restore_run f32_restore_run
#define bf16_restore_run f32_restore_run
#endif

/* fp16 */

int EXPORTED(to_half)(const uint32_t *restrict source, uint16_t *restrict into, int64_t count) {
    enum { CHUNK = 4096 };
    int flaws = 0;
    for (int64_t first = 0; first < count; first += CHUNK) {
        const int64_t end = first + CHUNK < count ? first + CHUNK : count;
        int32_t far = 0;
        for (int64_t i = first; i < end; i++) {
            int32_t size = (int32_t)(source[i] & 0x7fffffffu);
            far = size > far ? size : far;
        }
        if (far >= 0x7f800000) return NOT_FINITE;
        if (far > 0x477fe000) flaws = OUT_OF_RANGE;
        for (int64_t i = first + to_half_run(source + first, into + first, end - first); i < end; i++)
            into[i] = f16_narrowed(as_float(source[i]));
    }
    return flaws;
}

int EXPORTED(from_half)(const uint16_t *restrict encoded, uint32_t *restrict into, int64_t count) {
    for (int64_t i = from_half_run(encoded, into, count); i < count; i++) into[i] = as_bits(f16_widened(encoded[i]));
    return 0;
}

/* int4: an element of the first half of a plane in the low bits, of the second half in the high bits */

INLINE void pack(const uint8_t *restrict plane, uint8_t *restrict codes, int64_t count, int64_t half) {
    for (int64_t i = 0; i < count - half; i++) codes[i] = (uint8_t)(plane[i] | plane[half + i] << 4);
    if (count < 2 * half) codes[half - 1] = plane[half - 1];
}

INLINE void unpack(const uint8_t *restrict codes, uint8_t *restrict plane, int64_t count, int64_t half) {
    for (int64_t i = 0; i < half; i++) plane[i] = codes[i] & 15;
    for (int64_t i = 0; i < count - half; i++) plane[half + i] = codes[i] >> 4;
}

/* The nearest integer's lowest byte: with 1.5 * 2^23 added, it is the lowest byte of the float. */
INLINE uint8_t nearest(float value) { return (uint8_t)as_bits(value + 0x1.8p23f); }

INLINE float clipped(float value, float least, float most) {
    const float below = value < most ? value : most;
    return below > least ? below : least;
}

/* Signed codes become unsigned by a flip of their first bit; `middle` is then 128. */
INLINE float code_value(uint8_t code, uint8_t flip, float middle) {
    return (float)(int32_t)(uint8_t)(code ^ flip) - middle;
}

#define TYPE f32
#define BITS uint32_t
#define ORDER int32_t
#define INFINITE 0x7f800000
#define TOO_FAR 0x7f800000u
#include "kernels_of_type.h"

#define TYPE f16
#define BITS uint16_t
#define ORDER int16_t
#define INFINITE 0x7c00
#define TOO_FAR 0x477ff000u
#include "kernels_of_type.h"

#define TYPE bf16
#define BITS uint16_t
#define ORDER int16_t
#define INFINITE 0x7f80
#define TOO_FAR 0x7f7f8000u
#include "kernels_of_type.h"
