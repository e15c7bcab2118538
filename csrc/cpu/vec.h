// Vectors of one instruction set: types, exp2, loads that widen and stores that narrow.
//
// Included once per instruction set, inside that set's namespace and target region (see kernels_*.cpp), with
// KDOPS_LANES = floats per register. Everything uses the compiler's vector extension, so the same source compiles to
// AVX-512, AVX2 or the baseline.

constexpr int kLanes = KDOPS_LANES;

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(4 * kLanes)));
  typedef int32_t mask __attribute__((vector_size(4 * kLanes)));
  typedef double wide __attribute__((vector_size(8 * kLanes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(4 * kLanes)));
  typedef int64_t mask __attribute__((vector_size(4 * kLanes)));
  typedef double wide __attribute__((vector_size(4 * kLanes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
// The same number of lanes, in double.
template <class A>
using WideVec = typename VecOf<A>::wide;
template <class A>
using MaskVec = typename VecOf<A>::mask;

typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

template <class A>
constexpr int lanes_of = static_cast<int>(sizeof(Vec<A>) / sizeof(A));

template <class V, class T>
inline V load_bits(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

// ---- loads -------------------------------------------------------------------------------------------------------
inline Vec<float> widen(const float* p) { return load_bits<Vec<float>>(p); }
inline Vec<double> widen(const double* p) { return load_bits<Vec<double>>(p); }
inline Vec<float> widen(const BFloat16* p) {
  return (Vec<float>)(__builtin_convertvector(load_bits<U16>(p), U32) << 16);
}
inline Vec<float> widen(const Float16* p) {
#if KDOPS_LANES == 16
  return (Vec<float>)_mm512_cvtph_ps(load_bits<__m256i>(p));
#elif KDOPS_LANES == 8
  return (Vec<float>)_mm256_cvtph_ps(load_bits<__m128i>(p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes; ++i) v[i] = float_from_half(p[i].bits);
  return v;
#endif
}

// Two neighbouring registers. bf16 is deinterleaved into even and odd elements, one instruction each.
template <class T>
constexpr bool comes_apart = false;
template <>
constexpr bool comes_apart<BFloat16> = true;

template <class T, class V>
inline void widen_two(const T* p, V& first, V& second) {
  first = widen(p), second = widen(p + sizeof(V) / sizeof(first[0]));
}
inline void widen_two(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  const U32 pairs = load_bits<U32>(p);
  even = (Vec<float>)(pairs << 16), odd = (Vec<float>)(pairs & 0xffff0000u);
}

// The first `count` lanes; the rest is 0.
template <class A, class T>
inline Vec<A> widen_part(const T* p, int count) {
  T part[lanes_of<A>] = {};
  __builtin_memcpy(part, p, sizeof(T) * count);
  return widen(part);
}

// ---- stores ------------------------------------------------------------------------------------------------------
inline void narrow(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline void narrow(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof(v)); }
// The nearest bf16, ties to even, in the upper halves; the lower halves are to be dropped. Nothing is added to a NaN,
// as that could carry into its sign; a NaN from arithmetic is quiet, so its upper half is a NaN as well.
inline U32 rounded_to_bf16(Vec<float> v) {
  const U32 bits = (U32)v, up = ((bits >> 16) & 1) + 0x7fff;
  const MaskVec<float> is_number = v == v;
  return bits + (is_number ? up : U32{});
}
inline void narrow(BFloat16* p, Vec<float> v) {
  const U16 out = __builtin_convertvector(rounded_to_bf16(v) >> 16, U16);
  __builtin_memcpy(p, &out, sizeof(out));
}
inline void narrow(Float16* p, Vec<float> v) {
#if KDOPS_LANES == 16
  const __m256i out = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &out, sizeof(out));
#elif KDOPS_LANES == 8
  const __m128i out = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &out, sizeof(out));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = half_from_float(v[i]);
#endif
}

template <class T, class V>
inline void narrow_two(T* p, V first, V second) {
  narrow(p, first), narrow(p + sizeof(V) / sizeof(first[0]), second);
}
inline void narrow_two(BFloat16* p, Vec<float> even, Vec<float> odd) {
  const U32 pairs = rounded_to_bf16(even) >> 16 | (rounded_to_bf16(odd) & 0xffff0000u);
  __builtin_memcpy(p, &pairs, sizeof(pairs));
}

template <class A, class T>
inline void narrow_part(T* p, Vec<A> v, int count) {
  T part[lanes_of<A>];
  narrow(part, v);
  __builtin_memcpy(p, part, sizeof(T) * count);
}

// ---- arithmetic --------------------------------------------------------------------------------------------------
template <class A>
inline Vec<A> broadcast(A x) {
  return Vec<A>{} + x;
}

template <class A>
inline Vec<A> max(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <class A>
inline Vec<A> min(Vec<A> a, Vec<A> b) {
  return a < b ? a : b;
}
#if KDOPS_LANES == 16  // one instruction, where GCC compiles the comparison to two
template <>
inline Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
#elif KDOPS_LANES == 8
template <>
inline Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
#endif

// Keeps the compiler from fusing a product into a sum: a e - b e is 0 where the products are equal, but fma(a, e, -(b
// e)) is the rounding error of one of them.
template <class V>
inline V rounded(V v) {
#if KDOPS_LANES == 16
  asm("" : "+v"(v));
#elif KDOPS_LANES == 8
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif  // the baseline of x86 has no fma
  return v;
}

template <class A>
inline double sum_of_lanes(WideVec<A> v) {
  double total = 0;
  for (int i = 0; i < lanes_of<A>; ++i) total += v[i];
  return total;
}

template <class A>
inline A max_of_lanes(Vec<A> v) {
  A m = v[0];
  for (int i = 1; i < lanes_of<A>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// 2^y for y <= 0, relative error below 2e-7 down to 2^-126, and 0 below. NaN stays NaN.
// y = n + f with n its nearest integer and |f| <= 1/2; 2^f is the minimax polynomial of degree 5.
inline Vec<float> exp2_of_fraction(Vec<float> f) {
  Vec<float> p = broadcast<float>(1.327647196e-3f);
  p = p * f + 9.675541503e-3f;
  p = p * f + 5.550713275e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  return p * f + 1.000000072f;
}
#if KDOPS_LANES == 16
inline Vec<float> exp2_nonpositive(Vec<float> y) {
  const __m512 n = _mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (Vec<float>)_mm512_scalef_ps((__m512)exp2_of_fraction(y - (Vec<float>)n), n);
}
#else
// The addition of 1.5 * 2^23 leaves n in the low bits; 2^n is an addition to the exponent.
inline Vec<float> exp2_nonpositive(Vec<float> y) {
  const Vec<float> magic = broadcast<float>(12582912.0f), lowest = broadcast<float>(-126.0f);
  const MaskVec<float> vanishes = y < lowest;
  y = vanishes ? lowest : y;
  const Vec<float> shifted = y + magic;
  const Vec<float> scaled = (Vec<float>)((U32)exp2_of_fraction(y - (shifted - magic)) + ((U32)shifted << 23));
  return vanishes ? Vec<float>{} : scaled;
}
#endif
inline Vec<double> exp2_nonpositive(Vec<double> y) {
  for (int i = 0; i < lanes_of<double>; ++i) y[i] = exp2(y[i]);
  return y;
}
