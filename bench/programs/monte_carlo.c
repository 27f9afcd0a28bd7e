/*
 * Photon transport by Monte Carlo: photons enter a slab at a right angle, fly exponentially distributed ways, lose weight
 * by absorption, scatter with the Henyey-Greenstein phase function, and leave at one of the two faces or die by Russian
 * roulette. Double precision, no memory traffic, many calls of log, sin, cos and sqrt. Unit: histories a second.
 */
#include <math.h>
#include <stdint.h>

#include "rate.h"

static const double THICKNESS = 2.0;   /* mean free paths */
static const double ALBEDO = 0.9;      /* part of the weight that survives a collision */
static const double ANISOTROPY = 0.75; /* mean cosine of the scattering angle */
static const double ROULETTE_WEIGHT = 1e-3;
static const double ROULETTE_CHANCE = 0.1;

static uint64_t state = 0x9e3779b97f4a7c15u;
static double absorbed, reflected, transmitted;
static unsigned long histories;

/* xorshift64*, Vigna 2014: a value in (0, 1]. */
static double uniform(void)
{
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return ((double)((state * 0x2545f4914f6cdd1du) >> 11) + 1.0) * 0x1p-53;
}

static void history(void)
{
    double depth = 0.0, ux = 0.0, uy = 0.0, uz = 1.0, weight = 1.0;

    for (;;) {
        double g = ANISOTROPY, part, cosine, sine, angle, across;

        depth += uz * -log(uniform());
        if (depth < 0.0) {
            reflected += weight;
            return;
        }
        if (depth > THICKNESS) {
            transmitted += weight;
            return;
        }
        absorbed += weight * (1.0 - ALBEDO);
        weight *= ALBEDO;
        if (weight < ROULETTE_WEIGHT) {
            if (uniform() > ROULETTE_CHANCE)
                return;
            weight /= ROULETTE_CHANCE;
        }
        part = (1.0 - g * g) / (1.0 - g + 2.0 * g * uniform());
        cosine = (1.0 + g * g - part * part) / (2.0 * g);
        sine = sqrt(fmax(0.0, 1.0 - cosine * cosine));
        angle = 2.0 * M_PI * uniform();
        across = sqrt(fmax(0.0, 1.0 - uz * uz));
        if (across > 1e-6) {
            double c = cos(angle), s = sin(angle);
            double nx = sine * (ux * uz * c - uy * s) / across + ux * cosine;
            double ny = sine * (uy * uz * c + ux * s) / across + uy * cosine;

            uz = -sine * c * across + uz * cosine;
            ux = nx;
            uy = ny;
        } else {
            ux = sine * cos(angle);
            uy = sine * sin(angle);
            uz = uz > 0.0 ? cosine : -cosine;
        }
    }
}

static void run(unsigned long n)
{
    histories += n;
    while (n--)
        history();
}

int main(void)
{
    double rate = rate_of(run, 1000);

    /* Weight is conserved on average; roulette adds a variance far below one per cent. */
    require(fabs((absorbed + reflected + transmitted) / (double)histories - 1.0) < 0.01, "monte_carlo: weight balance");
    require(transmitted > reflected, "monte_carlo: forward scattering");
    print_row("monte_carlo", rate);
    return 0;
}
