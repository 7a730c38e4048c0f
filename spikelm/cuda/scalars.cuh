// What the kernels for a GPU share: the scalars that steps.cuh asks for, steps.cuh itself, and storage in 16 bits.
//
// No header of CUDA or C is included. A build for the host defines the CUDA words and what float_of_half ...
// bits_of_float do (tests/cuda/shim.hpp).

#define INLINE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

#ifdef __CUDACC__
INLINE float float_of_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
INLINE unsigned short half_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
INLINE float float_of_bits(unsigned bits) { return __uint_as_float(bits); }
INLINE unsigned bits_of_float(float value) { return __float_as_uint(value); }
#endif

// ---- what steps.cuh asks for

template <class R> INLINE R constant(double value) { return (R)value; }
INLINE float absolute(float x) { return fabsf(x); }
INLINE double absolute(double x) { return fabs(x); }
INLINE float with_sign_of(float magnitude, float sign) { return copysignf(magnitude, sign); }
INLINE double with_sign_of(double magnitude, double sign) { return copysign(magnitude, sign); }
INLINE float truncate(float x) { return truncf(x); }
INLINE double truncate(double x) { return trunc(x); }
INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }

#include "steps.cuh"

// ---- storage

INLINE float widen(float value) { return value; }
INLINE double widen(double value) { return value; }
INLINE float widen(half_t value) { return float_of_half(value.bits); }
INLINE float widen(bf16_t value) { return float_of_bits((unsigned)value.bits << 16); }

INLINE void narrow(float value, float& stored) { stored = value; }
INLINE void narrow(double value, double& stored) { stored = value; }
INLINE void narrow(STATE_T value, signed char& stored) { stored = (signed char)value; }
INLINE void narrow(float value, half_t& stored) { stored.bits = half_of_float(value); }
INLINE void narrow(float value, bf16_t& stored) {  // to the nearest, ties to even; a NaN stays one
    const unsigned bits = bits_of_float(value), nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    stored.bits = (unsigned short)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}
