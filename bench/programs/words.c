/*
 * words BYTES: writes that many bytes of text that compresses about as prose does: words of Zipf-like frequency from a
 * vocabulary of 4,096, always the same ones.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint32_t state = 2463534242u;

static uint32_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
}

int main(int count, char **arguments)
{
    static char vocabulary[4096][12];
    long left = count > 1 ? atol(arguments[1]) : 0, column = 0;

    for (int word = 0; word < 4096; word++) {
        int letters = 2 + (int)(next_random() % 9);

        for (int i = 0; i < letters; i++)
            vocabulary[word][i] = "etaoinshrdlucmfwypvbgkjqxz"[(next_random() % 26) * (next_random() % 26) / 26];
    }
    while (left > 0) {
        /* The product of two evenly distributed numbers prefers small ones. */
        const char *word = vocabulary[(next_random() % 4096) * (uint64_t)(next_random() % 4096) / 4096];

        for (; *word && left > 0; word++, left--, column++)
            putchar(*word);
        if (left-- > 0)
            putchar(column > 100 ? '\n' : ' ');
        if (column > 100)
            column = 0;
    }
    return 0;
}
