/* What the debugger works on: a variable to watch, a loop to step through. */
#include <stdio.h>

static volatile int watched;
static volatile double scaled;

static int step(int value)
{
    int doubled = value * 2;

    watched = doubled + 1;
    return watched;
}

int main(void)
{
    int sum = 0;

    for (int i = 0; i < 4; i++) {
        sum += step(i);
        scaled = sum * 0.5;
    }
    printf("sum %d scaled %.2f\n", sum, scaled);
    return sum == 16 ? 0 : 1;
}
