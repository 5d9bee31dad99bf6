// What this machine can do at this moment: reading memory, and multiplying in registers. Prints one line of JSON.
//
//   cc -O3 -march=native -fopenmp limits.c -o limits && ./limits THREADS MEBIBYTES...
//
// Reading: all threads together over one buffer, in parts that lie apart, on huge pages and with software prefetch at several
// distances; the best counts, as other work on the machine can only take away. Multiplying: chains of fused products that need
// no memory, for each kind of number that the processor has an instruction for.
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define LINE 64
#define CHAINS 12
#define HUGE_PAGE (2UL << 20)

typedef long long line_t __attribute__((vector_size(LINE)));
typedef float floats_t __attribute__((vector_size(LINE)));

static volatile long long sink;

static double read_once(const char *start, size_t bytes, size_t ahead) {
  double begin = omp_get_wtime();
  long long total = 0;
#pragma omp parallel reduction(+ : total)
  {
    size_t part = bytes / omp_get_num_threads() / 4096 * 4096;
    const char *p = start + part * omp_get_thread_num(), *end = p + part;
    line_t a = {0}, b = {0}, c = {0}, d = {0};
    for (; p < end; p += 4 * LINE) {
      if (ahead)
        for (int i = 0; i < 4; i++) __builtin_prefetch(p + ahead + i * LINE, 0, 3);
      a ^= *(const line_t *)p;
      b ^= *(const line_t *)(p + LINE);
      c ^= *(const line_t *)(p + 2 * LINE);
      d ^= *(const line_t *)(p + 3 * LINE);
    }
    a ^= b ^ c ^ d;
    for (int i = 0; i < LINE / 8; i++) total += a[i];
  }
  sink = total;
  return bytes / (omp_get_wtime() - begin);
}

static double read_rate(size_t bytes, int huge) {
  static const size_t distances[] = {0, 1024, 2048, 4096, 8192, 16384};
  size_t mapped = bytes + 2 * HUGE_PAGE;
  char *raw = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return 0;
  char *start = (char *)(((size_t)raw + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
  madvise(start, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  memset(start, 1, bytes);
  double best = 0;
  for (size_t k = 0; k < sizeof distances / sizeof *distances; k++)
    for (int i = 0; i < 3; i++) {
      double rate = read_once(start, bytes, distances[k]);
      if (rate > best) best = rate;
    }
  munmap(raw, mapped);
  return best;
}

// Operations a second of STEP on every thread, FLOPS each; the empty assembly keeps the operands from being known.
#define CHAIN_RATE(TYPE, ZERO, STEP, FLOPS)                              \
  do {                                                                   \
    const long turns = 20000000;                                          \
    for (int again = 0; again < 3; again++) {                            \
      double begin = omp_get_wtime();                                    \
      _Pragma("omp parallel") {                                          \
        TYPE acc[CHAINS];                                                \
        for (int i = 0; i < CHAINS; i++) acc[i] = ZERO;                  \
        for (long turn = 0; turn < turns; turn++) {                      \
          _Pragma("GCC unroll 12") for (int i = 0; i < CHAINS; i++) {    \
            STEP;                                                        \
          }                                                              \
        }                                                                \
        for (int i = 0; i < CHAINS; i++) __asm__ volatile("" : "+v"(acc[i])); \
      }                                                                  \
      double rate = (double)(FLOPS) * CHAINS * turns * omp_get_max_threads() / (omp_get_wtime() - begin); \
      if (rate > best) best = rate;                                      \
    }                                                                    \
  } while (0)

static double float32_rate(void) {
  double best = 0;
#ifdef __AVX512F__
  __m512 x = _mm512_set1_ps(1.0f);
  __asm__ volatile("" : "+v"(x));
  CHAIN_RATE(__m512, _mm512_setzero_ps(), acc[i] = _mm512_fmadd_ps(x, x, acc[i]), 32);
#elif defined(__FMA__)
  __m256 x = _mm256_set1_ps(1.0f);
  __asm__ volatile("" : "+v"(x));
  CHAIN_RATE(__m256, _mm256_setzero_ps(), acc[i] = _mm256_fmadd_ps(x, x, acc[i]), 16);
#endif
  return best;
}

static double bfloat16_rate(void) {
  double best = 0;
#ifdef __AVX512BF16__
  __m512bh x;
  __m512i bits = _mm512_set1_epi16(0x3f80);
  __asm__ volatile("" : "+v"(bits));
  memcpy(&x, &bits, sizeof x);
  CHAIN_RATE(__m512, _mm512_setzero_ps(), acc[i] = _mm512_dpbf16_ps(acc[i], x, x), 64);
#endif
  return best;
}

static double int8_rate(void) {
  double best = 0;
#ifdef __AVX512VNNI__
  __m512i x = _mm512_set1_epi8(1);
  __asm__ volatile("" : "+v"(x));
  CHAIN_RATE(__m512i, _mm512_setzero_si512(), acc[i] = _mm512_dpbusd_epi32(acc[i], x, x), 128);
#elif defined(__AVX2__)
  // Sums in 16 bits, as far as they go: bytes of the full range take twice the instructions.
  __m256i x = _mm256_set1_epi8(1);
  __asm__ volatile("" : "+v"(x));
  CHAIN_RATE(__m256i, _mm256_setzero_si256(), acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(x, x)), 64);
#endif
  return best;
}

int main(int argc, char **argv) {
  if (argc < 2) return 2;
  omp_set_num_threads(atoi(argv[1]));
  printf("{\"threads\": %d", omp_get_max_threads());
  printf(", \"float32_registers\": %.4g", float32_rate());
  printf(", \"bfloat16_registers\": %.4g", bfloat16_rate());
  printf(", \"int8_registers\": %.4g", int8_rate());
  printf(", \"reads\": [");
  for (int k = 2; k < argc; k++) {
    size_t bytes = (size_t)atol(argv[k]) << 20;
    printf("%s{\"bytes\": %zu, \"huge_pages\": %.4g, \"small_pages\": %.4g}", k > 2 ? ", " : "", bytes, read_rate(bytes, 1),
           read_rate(bytes, 0));
  }
  printf("]}\n");
  return 0;
}
