/* What AVX-512 computes and keeps, as text that is the same on every machine that has it.
 *
 *   avx512          the results; the exit status is 1 where something that must not change has changed
 *   avx512 probe    whether an EVEX instruction is executed or refused
 */
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd"), noinline))
#define PAGE 4096

static int failures;

static void show(const char *name, const void *data, size_t len)
{
    uint64_t sum = 14695981039346656037u;
    for (size_t i = 0; i < len; i++)
        sum = (sum ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %016llx\n", name, (unsigned long long)sum);
}

static void expect(int condition, const char *what)
{
    if (!condition) {
        printf("WRONG %s\n", what);
        failures++;
    }
}

WIDE static void arithmetic(void)
{
    double a[1024], b[1024], c[1024];
    uint32_t words[1024], packed[1024];
    size_t count = 0;
    for (int i = 0; i < 1024; i++) {
        a[i] = i * 0.37 + 1;
        b[i] = 1000.0 / (i + 1);
        words[i] = (uint32_t)i * 2654435761u;
    }
    for (int i = 0; i < 1024; i += 8) {
        __m512d x = _mm512_loadu_pd(a + i), y = _mm512_loadu_pd(b + i);
        __mmask8 k = _mm512_cmp_pd_mask(x, y, _CMP_GT_OQ);
        x = _mm512_mask_fmadd_pd(x, k, y, _mm512_set1_pd(0.5));
        x = _mm512_mask_sqrt_pd(x, (__mmask8)~k, y);
        _mm512_storeu_pd(c + i, _mm512_add_round_pd(x, y, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC));
    }
    show("fma", c, sizeof c);
    for (int i = 0; i < 1024; i += 16) {
        __m512i x = _mm512_loadu_si512(words + i);
        __mmask16 k = _mm512_test_epi32_mask(x, _mm512_set1_epi32(0x10010));
        _mm512_mask_compressstoreu_epi32(packed + count, k, x);
        count += (size_t)__builtin_popcount(k);
    }
    show("compress", packed, count * 4);
    memset(c, 0, sizeof c);
    for (int i = 0; i < 1024; i += 8) {
        __m512i at = _mm512_and_epi64(_mm512_cvtepu32_epi64(_mm256_loadu_si256((void *)(words + i))), _mm512_set1_epi64(1023));
        __m512d x = _mm512_i64gather_pd(at, a, 8);
        _mm512_mask_i64scatter_pd(c, 0xdb, at, x, 8);
    }
    show("gather", c, sizeof c);
}

/* Elements that a mask leaves out lie in a page that is not there. */
WIDE static void masks_at_the_edge(void)
{
    uint8_t *page = mmap(0, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(page + PAGE, PAGE);
    for (int i = 0; i < PAGE; i++)
        page[i] = (uint8_t)(i * 7);
    for (int inside = 0; inside < 64; inside += 5) {
        __mmask64 k = (1ull << inside) - 1;
        uint8_t *at = page + PAGE - inside;
        __m512i x = _mm512_maskz_loadu_epi8(k, at);
        _mm512_mask_storeu_epi8(at, k, _mm512_add_epi8(x, _mm512_set1_epi8(3)));
    }
    _mm512_mask_storeu_epi32(page + PAGE, 0, _mm512_setzero_si512());
    show("edge", page, PAGE);
}

WIDE static void clobber(int signal)
{
    (void)signal;
    asm volatile("vpternlogd $255, %%zmm3, %%zmm3, %%zmm3\n\tvpternlogd $255, %%zmm17, %%zmm17, %%zmm17\n\t"
                 "vpternlogd $255, %%zmm31, %%zmm31, %%zmm31\n\tkxnorq %%k5, %%k5, %%k5" ::: "xmm3", "xmm17", "xmm31", "k5");
}

/* Registers live across a system call that delivers a signal, or that gives the processor to others. */
WIDE static void keeps(uint64_t seed, long number, long first, long second)
{
    uint64_t want[32], got[32], mask = seed * 3;
    for (int i = 0; i < 32; i++)
        want[i] = seed * 0x9e3779b97f4a7c15u + (uint64_t)i;
    memset(got, 0, sizeof got);
    register long result asm("rax") = number;
    register long rdi asm("rdi") = first;
    register long rsi asm("rsi") = second;
    asm volatile("vmovdqu64 (%3), %%zmm3\n\tvmovdqu64 64(%3), %%zmm17\n\tvmovdqu64 128(%3), %%zmm31\n\tkmovq %5, %%k5\n\t"
                 "syscall\n\t"
                 "vmovdqu64 %%zmm3, (%4)\n\tvmovdqu64 %%zmm17, 64(%4)\n\tvmovdqu64 %%zmm31, 128(%4)\n\tkmovq %%k5, 192(%4)"
                 : "+r"(result)
                 : "r"(rdi), "r"(rsi), "r"(want), "r"(got), "r"(mask)
                 : "rcx", "r11", "memory", "xmm3", "xmm17", "xmm31", "k5");
    expect(!memcmp(want, got, 192) && got[24] == mask, "a register has changed");
}

static void state(void)
{
    signal(SIGUSR1, clobber);
    for (uint64_t i = 1; i < 200; i++)
        keeps(i, SYS_kill, getpid(), SIGUSR1);
    for (int child = 0; child < 4; child++)
        if (fork() == 0) {
            for (uint64_t i = 1; i < 3000; i++)
                keeps(i * 8 + (uint64_t)child, SYS_sched_yield, 0, 0);
            _exit(failures != 0);
        }
    for (int status; wait(&status) > 0;)
        expect(status == 0, "another process has changed a register");
}

static sigjmp_buf refused;

static void illegal(int signal)
{
    siglongjmp(refused, signal);
}

WIDE static void one(void)
{
    asm volatile("vpxorq %%zmm16, %%zmm16, %%zmm16" ::: "xmm16");
}

int main(int argc, char **argv)
{
    setvbuf(stdout, 0, _IOLBF, 0);
    if (argc > 1 && !strcmp(argv[1], "probe")) {
        signal(SIGILL, illegal);
        if (sigsetjmp(refused, 1)) {
            puts("EVEX is refused");
        } else {
            one();
            puts("EVEX is executed");
        }
        return 0;
    }
    arithmetic();
    masks_at_the_edge();
    state();
    printf("%d wrong\n", failures);
    return failures != 0;
}
