/*
 * What compilers make of plain C: arithmetic of every width, shifts and rotates, divisions, bit operations, floating point of
 * all kinds, strings, jumps, calls through tables, deep recursion, setjmp, signals and faults. Prints one digest a section, so
 * that a difference names its section. The same source is built for 64 and 32 bits and several optimisation levels; what it
 * prints does not depend on addresses, times or the processor's optional features.
 */
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROUNDS = 3000 };

static uint64_t hash, random_state;

static void begin(void)
{
    hash = 1469598103934665603u;
    random_state = 88172645463325252u;
}

static void feed(uint64_t value)
{
    for (int i = 0; i < 8; i++) {
        hash = (hash ^ (value & 0xff)) * 1099511628211u;
        value >>= 8;
    }
}

static void feed_double(double value)
{
    uint64_t bits;

    memcpy(&bits, &value, sizeof bits);
    feed(bits);
}

static void end(const char *section)
{
    printf("%-12s %016" PRIx64 "\n", section, hash);
}

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

#define INTEGERS(type, utype, bits)                                                     \
    do {                                                                                \
        utype a = (utype)next_random(), b = (utype)next_random();                       \
        unsigned shift = next_random() % (bits);                                        \
        feed((utype)(a + b)), feed((utype)(a - b)), feed((utype)(a * b));               \
        feed((utype)(a & b)), feed((utype)(a | b)), feed((utype)(a ^ b));               \
        feed((utype)~a), feed((utype)-a), feed((utype)(a << shift));                    \
        feed((utype)(a >> shift)), feed((utype)((type)a >> shift));                     \
        feed((utype)((a << shift) | (a >> (((bits) - shift) % (bits)))));               \
        feed(a < b), feed((type)a < (type)b), feed(a == b), feed((type)a <= (type)b);   \
        if (b != 0)                                                                     \
            feed(a / b), feed(a % b);                                                   \
        if ((type)b != 0 && (type)b != -1)                                              \
            feed((utype)((type)a / (type)b)), feed((utype)((type)a % (type)b));         \
        {                                                                               \
            utype out;                                                                  \
                                                                                        \
            feed(__builtin_add_overflow(a, b, &out)), feed(out);                        \
            feed(__builtin_sub_overflow(a, b, &out)), feed(out);                        \
            feed(__builtin_mul_overflow(a, b, &out)), feed(out);                        \
        }                                                                               \
    } while (0)

static void integers(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        INTEGERS(int8_t, uint8_t, 8);
        INTEGERS(int16_t, uint16_t, 16);
        INTEGERS(int32_t, uint32_t, 32);
        INTEGERS(int64_t, uint64_t, 64);
    }
    end("integers");
}

static void bits(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t value = next_random() | 1;
        uint32_t low = (uint32_t)value | 1;

        feed(__builtin_ctzll(value << (i % 40))), feed(__builtin_clzll(value >> (i % 40))), feed(__builtin_popcountll(value));
        feed(__builtin_ctz(low)), feed(__builtin_clz(low)), feed(__builtin_popcount(low)), feed(__builtin_parity(low));
        feed(__builtin_bswap64(value)), feed(__builtin_bswap32(low)), feed(__builtin_bswap16((uint16_t)low));
        feed(value & (value - 1)), feed(value & -value), feed(__builtin_ffsll((long long)value));
    }
    end("bits");
}

#ifdef __SIZEOF_INT128__
static void wide(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        unsigned __int128 a = (unsigned __int128)next_random() << 64 | next_random(), b = next_random() | 1;
        unsigned __int128 sum = a + b, product = a * b, quotient = a / b, rest = a % b, shifted = a >> (i % 128);

        feed((uint64_t)sum), feed((uint64_t)(sum >> 64)), feed((uint64_t)product), feed((uint64_t)(product >> 64));
        feed((uint64_t)quotient), feed((uint64_t)(quotient >> 64)), feed((uint64_t)rest), feed((uint64_t)shifted);
    }
    end("wide");
}
#else
static void wide(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t a = next_random(), b = (next_random() >> (i % 48)) | 1;

        feed(a / b), feed(a % b), feed((uint64_t)((int64_t)a / (int64_t)b)), feed(a * b);
    }
    end("wide");
}
#endif

static void floats(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        volatile double a = (double)(int64_t)next_random() / 65536.0, b = (double)(int32_t)next_random() / 3.0;
        volatile float c = (float)a, d = (float)b;

        feed_double(a + b), feed_double(a - b), feed_double(a * b), feed_double(b != 0 ? a / b : 0);
        feed_double(sqrt(fabs(a))), feed_double(floor(b)), feed_double(ceil(b)), feed_double(trunc(b));
        feed_double(c + d), feed_double(c * d), feed_double((float)(c - d));
        feed((uint64_t)(int64_t)b), feed((uint32_t)(int32_t)(b / 1e3)), feed_double((double)(uint32_t)next_random());
        feed_double((double)next_random()), feed(a < b), feed(c >= d), feed(lrint(b / 1e6) & 0xffffffff);
        feed_double(ldexp(a, i % 60 - 30)), feed_double(fmin(a, b)), feed_double(copysign(a, b)), feed_double(nearbyint(b));
    }
    feed(isnan(NAN) != 0), feed(isinf(1.0 / (double)(hash == 0)) != 0), feed(signbit(-0.0) != 0);
    end("floats");
}

static void long_doubles(void)
{
    begin();
    for (int i = 0; i < ROUNDS; i++) {
        volatile long double a = (long double)(int64_t)next_random() / 7.0L, b = (long double)(int32_t)next_random() + 0.5L;
        unsigned char bytes[sizeof(long double)] = { 0 };
        long double results[] = { a + b, a * b, a / b, sqrtl(fabsl(a)), floorl(b), fmodl(a, b), a - b };

        for (size_t k = 0; k < sizeof results / sizeof results[0]; k++) {
            uint64_t mantissa;
            uint16_t exponent;

            memcpy(bytes, &results[k], 10);
            memcpy(&mantissa, bytes, 8), memcpy(&exponent, bytes + 8, 2);
            feed(mantissa), feed(exponent);
        }
        feed((uint64_t)(int64_t)(b * 3)), feed(a > b);
    }
    end("longdouble");
}

static void mathematics(void)
{
    char text[64];

    begin();
    for (int i = 1; i < 400; i++) {
        double x = i / 37.0;
        double values[] = { sin(x), cos(x), tan(x), atan(x), exp(-x), log(x), pow(x, 1.7), sinh(x / 9), cbrt(x), hypot(x, 3) };

        /* Ten digits: the library picks its variants by the processor's features, and they differ in the last ones. */
        for (size_t k = 0; k < sizeof values / sizeof values[0]; k++) {
            snprintf(text, sizeof text, "%.10e", values[k]);
            for (const char *c = text; *c; c++)
                feed((unsigned char)*c);
        }
    }
    end("mathematics");
}

static void strings(void)
{
    static char one[5000], two[5000];

    begin();
    for (int i = 0; i < 600; i++) {
        size_t length = next_random() % 2000, from = next_random() % 64, to = next_random() % 64;
        size_t at = next_random() % (length + 1);

        for (size_t k = 0; k < length; k++)
            one[from + k] = (char)('a' + next_random() % 26);
        one[from + length] = 0;
        memset(two, i, sizeof two);
        memcpy(two + to, one + from, length + 1);
        feed(strlen(two + to)), feed(memcmp(one + from, two + to, length) == 0), feed(strcmp(one + from, two + to) == 0);
        memmove(two + to + at / 3, two + to, length - at / 3);
        for (size_t k = 0; k < length + 60; k++)
            feed((unsigned char)two[k]);
        two[to + length] = 0;
        feed((uint64_t)(strchr(two + to, 'q') ? strchr(two + to, 'q') - two : -1));
        feed((uint64_t)(strrchr(two + to, 'x') ? strrchr(two + to, 'x') - two : -1));
        feed(strspn(two + to, "abcdefghijklm")), feed(strcspn(two + to, "xyz")), feed((uint64_t)(memchr(two, 'k', 900) != NULL));
        feed(strncmp(one + from, two + to, at) > 0), feed((uint64_t)(strstr(two + to, "abc") != NULL));
    }
    end("strings");
}

typedef uint32_t (*operation)(uint32_t, uint32_t);
static uint32_t add(uint32_t a, uint32_t b) { return a + b; }
static uint32_t multiply(uint32_t a, uint32_t b) { return a * b; }
static uint32_t mix(uint32_t a, uint32_t b) { return (a << 7 | a >> 25) ^ b; }
static uint32_t minimum(uint32_t a, uint32_t b) { return a < b ? a : b; }
static operation volatile table[] = { add, multiply, mix, minimum };

static uint32_t sum_of(int count, ...)
{
    va_list list;
    uint32_t sum = 0;

    va_start(list, count);
    while (count--)
        sum = sum * 33 + (uint32_t)va_arg(list, int) + (uint32_t)va_arg(list, double);
    va_end(list);
    return sum;
}

static __attribute__((noinline)) uint32_t ackermann(uint32_t m, uint32_t n)
{
    if (m == 0)
        return n + 1;
    return ackermann(m - 1, n == 0 ? 1 : ackermann(m, n - 1));
}

static void calls(void)
{
    uint32_t value = 1;

    begin();
    for (int i = 0; i < 40000; i++) {
        uint32_t random = (uint32_t)next_random();

        value = table[random % 4](value, random);
        switch (random >> 28) {
        case 0: value += 17; break;
        case 1: value ^= 0x55aa; break;
        case 2: value = ~value; break;
        case 3: value -= random; break;
        case 5: value *= 3; break;
        case 7: value >>= 1; break;
        case 11: value = value << 16 | value >> 16; break;
        default: value++; break;
        }
        feed(value);
    }
    feed(sum_of(4, 1, 2.5, 3, 4.5, 5, 6.5, 7, 8.5)), feed(ackermann(2, 300)), feed(ackermann(3, 6));
    end("calls");
}

static int compare(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

    return (a > b) - (a < b);
}

static void sorting(void)
{
    static uint32_t numbers[20000];

    begin();
    for (size_t i = 0; i < 20000; i++)
        numbers[i] = (uint32_t)next_random();
    qsort(numbers, 20000, sizeof numbers[0], compare);
    for (size_t i = 0; i < 20000; i += 7)
        feed(numbers[i]);
    end("sorting");
}

static sigjmp_buf place;
static volatile sig_atomic_t last_signal, last_code;

static void on_fault(int number, siginfo_t *information, void *context)
{
    (void)context;
    last_signal = number;
    last_code = information->si_code;
    siglongjmp(place, 1);
}

/* Faults on purpose; the digest takes the signal's number and code. */
static void faults(void)
{
    struct sigaction action;
    static volatile int zero, *volatile nowhere = (volatile int *)8;
    char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int kinds = 6;

    begin();
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, NULL), sigaction(SIGFPE, &action, NULL), sigaction(SIGILL, &action, NULL);
    sigaction(SIGBUS, &action, NULL), sigaction(SIGTRAP, &action, NULL);
    for (int i = 0; i < 60; i++) {
        last_signal = last_code = 0;
        if (sigsetjmp(place, 1) == 0)
            switch (i % kinds) {
            case 0: *nowhere = 1; break;
            case 1: zero = 1 / zero; break;
            case 2: __asm__ volatile("ud2"); break;
            case 3: page[i] = 1; break;
            case 4: __asm__ volatile("int3"); break;
            case 5: __asm__ volatile("hlt"); break;
            }
        feed((uint64_t)last_signal), feed((uint64_t)last_code);
    }
    munmap(page, 4096);
    end("faults");
}

/* Code that is written, run, and written again. */
static void changing_code(void)
{
    unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    begin();
    if (code == MAP_FAILED)
        exit(1);
    for (uint32_t i = 0; i < 2000; i++) {
        size_t at = i % 3 == 0 ? 0 : (i * 64) % 4032;

        code[at] = 0xb8; /* mov $i, %eax; ret */
        memcpy(code + at + 1, &i, 4);
        code[at + 5] = 0xc3;
        feed(((uint32_t(*)(void))(uintptr_t)(code + at))());
    }
    munmap(code, 4096);
    end("code");
}

int main(void)
{
    integers();
    bits();
    wide();
    floats();
    long_doubles();
    mathematics();
    strings();
    calls();
    sorting();
    faults();
    changing_code();
    return 0;
}
