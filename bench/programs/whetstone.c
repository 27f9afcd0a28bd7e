/*
 * Whetstone, the synthetic floating-point mix of H. J. Curnow and B. A. Wichmann (Computer Journal 19/1, 1976), double
 * precision. Written for this harness from the published modules and weights: one pass of all modules stands for 100,000
 * Whetstone instructions. Unit of the result: MWIPS, million Whetstone instructions a second.
 */
#include <math.h>

#include "rate.h"

#define NOT_MERGED __attribute__((noinline, noclone))

/* Iterations of each module in one pass. Modules 1, 5 and 10 have weight zero in the published mix. */
enum { W2 = 12, W3 = 14, W4 = 345, W6 = 210, W7 = 32, W8 = 899, W9 = 616, W11 = 93 };

static double e1[4];
static volatile int one = 1, two = 2, three = 3;
static volatile double sink;
static const double T = 0.499975, T1 = 0.50025, T2 = 2.0;

static NOT_MERGED void array_parameter(double e[4])
{
    for (int j = 0; j < 6; j++) {
        e[0] = (e[0] + e[1] + e[2] - e[3]) * T;
        e[1] = (e[0] + e[1] - e[2] + e[3]) * T;
        e[2] = (e[0] - e[1] + e[2] + e[3]) * T;
        e[3] = (-e[0] + e[1] + e[2] + e[3]) / T2;
    }
}

static NOT_MERGED void call_with_scalars(double x, double y, double *z)
{
    double x1 = T * (x + y), y1 = T * (x1 + y);

    *z = (x1 + y1) / T2;
}

static int indices[3];

static NOT_MERGED void references(void)
{
    e1[indices[0]] = e1[indices[1]];
    e1[indices[1]] = e1[indices[2]];
    e1[indices[2]] = e1[indices[0]];
}

static void passes(unsigned long n)
{
    while (n--) {
        double x, y, z;
        int j, k, l;

        /* 2: array elements */
        e1[0] = 1.0, e1[1] = e1[2] = e1[3] = -1.0;
        for (int i = 0; i < W2; i++) {
            e1[0] = (e1[0] + e1[1] + e1[2] - e1[3]) * T;
            e1[1] = (e1[0] + e1[1] - e1[2] + e1[3]) * T;
            e1[2] = (e1[0] - e1[1] + e1[2] + e1[3]) * T;
            e1[3] = (-e1[0] + e1[1] + e1[2] + e1[3]) * T;
        }
        /* 3: array as parameter */
        for (int i = 0; i < W3; i++)
            array_parameter(e1);
        /* 4: conditional jumps */
        j = one;
        for (int i = 0; i < W4; i++) {
            j = j == 1 ? two : three;
            j = j > 2 ? 0 : one;
            j = j < 1 ? one : 0;
        }
        /* 6: integer arithmetic */
        j = one, k = two, l = three;
        for (int i = 0; i < W6; i++) {
            j = j * (k - j) * (l - k);
            k = l * k - (l - j) * k;
            l = (l - k) * (k + j);
            e1[l - 2] = j + k + l;
            e1[k - 2] = j * k * l;
        }
        /* 7: trigonometric functions */
        x = y = 0.5;
        for (int i = 0; i < W7; i++) {
            x = T * atan(T2 * sin(x) * cos(x) / (cos(x + y) + cos(x - y) - 1.0));
            y = T * atan(T2 * sin(y) * cos(y) / (cos(x + y) + cos(x - y) - 1.0));
        }
        sink = x + y;
        /* 8: procedure calls */
        x = y = z = 1.0;
        for (int i = 0; i < W8; i++)
            call_with_scalars(x, y, &z);
        sink = z;
        /* 9: array references */
        e1[0] = 1.0, e1[1] = 2.0, e1[2] = 3.0;
        indices[0] = one - 1, indices[1] = two - 1, indices[2] = three - 1;
        for (int i = 0; i < W9; i++)
            references();
        /* 11: standard functions */
        x = 0.75;
        for (int i = 0; i < W11; i++)
            x = sqrt(exp(log(x) / T1));
        sink = x;
    }
}

int main(void)
{
    double rate = rate_of(passes, 10);

    /* 93 times x^(1 / 2 T1) from 0.75; an even number of rounds of the references. */
    require(fabs(sink - 0.759865) < 1e-5, "whetstone: standard functions");
    require(e1[0] == 3.0 && e1[1] == 2.0 && e1[2] == 3.0, "whetstone: array references");
    print_row("whetstone", rate * 0.1);
    return 0;
}
