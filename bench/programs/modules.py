#!/usr/bin/env python3
"""Writes a C program of 20 files for the row compile_c: modules.py DIRECTORY.

Nineteen modules of five kinds (a hash table, a sorter, a matrix, a tokenizer, a text formatter) with sizes and constants of their
own, and main.c, which calls all of them and prints the number of those whose result is right. Always the same bytes.
"""

import pathlib
import sys

MODULES = 19
HEAD = """#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "modules.h"

"""
TABLE = """#define SLOTS {slots}

struct entry {{
    struct entry *next;
    uint32_t key;
    long value;
}};

static struct entry *slots[SLOTS];

static uint32_t scatter(uint32_t key)
{{
    key ^= key >> {shift};
    key *= {odd}u;
    return (key ^ (key >> 15)) % SLOTS;
}}

static long *find(uint32_t key, int make)
{{
    struct entry **place = &slots[scatter(key)], *entry;

    for (entry = *place; entry; entry = entry->next)
        if (entry->key == key)
            return &entry->value;
    if (!make || !(entry = calloc(1, sizeof *entry)))
        return NULL;
    entry->key = key;
    entry->next = *place;
    *place = entry;
    return &entry->value;
}}

static void forget(void)
{{
    for (int i = 0; i < SLOTS; i++)
        while (slots[i]) {{
            struct entry *next = slots[i]->next;

            free(slots[i]);
            slots[i] = next;
        }}
}}

int {name}(void)
{{
    long sum = 0;

    for (uint32_t i = 0; i < {count}; i++)
        *find(i * {odd}u % {count}u, 1) += i;
    for (uint32_t i = 0; i < {count}; i++) {{
        long *value = find(i, 0);

        sum += value ? *value : 0;
    }}
    forget();
    return sum == (long){count} * ({count} - 1) / 2;
}}
"""
SORTER = """struct item {{
    uint32_t weight;
    char label[{label}];
}};

static uint32_t state = {seed}u;

static uint32_t draw(void)
{{
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}}

static void swap(struct item *one, struct item *other)
{{
    struct item kept = *one;

    *one = *other;
    *other = kept;
}}

static void sort(struct item *items, long low, long high)
{{
    while (low < high) {{
        long i = low, j = high;
        uint32_t pivot = items[low + (high - low) / 2].weight;

        while (i <= j) {{
            while (items[i].weight < pivot)
                i++;
            while (items[j].weight > pivot)
                j--;
            if (i <= j)
                swap(&items[i++], &items[j--]);
        }}
        if (j - low < high - i) {{
            sort(items, low, j);
            low = i;
        }} else {{
            sort(items, i, high);
            high = j;
        }}
    }}
}}

int {name}(void)
{{
    struct item *items = calloc({count}, sizeof *items);
    int ordered = items != NULL;

    if (!items)
        return 0;
    for (int i = 0; i < {count}; i++) {{
        items[i].weight = draw() % {modulus};
        snprintf(items[i].label, sizeof items[i].label, "%u", (unsigned)items[i].weight);
    }}
    sort(items, 0, {count} - 1);
    for (int i = 1; i < {count}; i++)
        if (items[i - 1].weight > items[i].weight || (uint32_t)atol(items[i].label) != items[i].weight)
            ordered = 0;
    free(items);
    return ordered;
}}
"""
MATRIX = """#define SIDE {side}

static double a[SIDE][SIDE], b[SIDE][SIDE], product[SIDE][SIDE];

static void fill(double matrix[SIDE][SIDE], double step)
{{
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            matrix[i][j] = i == j ? {diagonal}.0 : step * (i - j);
}}

static void multiply(double out[SIDE][SIDE], double left[SIDE][SIDE], double right[SIDE][SIDE])
{{
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {{
            double sum = 0.0;

            for (int k = 0; k < SIDE; k++)
                sum += left[i][k] * right[k][j];
            out[i][j] = sum;
        }}
}}

static double trace(double matrix[SIDE][SIDE])
{{
    double sum = 0.0;

    for (int i = 0; i < SIDE; i++)
        sum += matrix[i][i];
    return sum;
}}

static void transpose(double matrix[SIDE][SIDE])
{{
    for (int i = 0; i < SIDE; i++)
        for (int j = i + 1; j < SIDE; j++) {{
            double kept = matrix[i][j];

            matrix[i][j] = matrix[j][i];
            matrix[j][i] = kept;
        }}
}}

int {name}(void)
{{
    double one, other, difference;

    fill(a, 0.25);
    fill(b, 0.5);
    multiply(product, a, b);
    one = trace(product);
    transpose(a);
    transpose(b);
    multiply(product, b, a);
    other = trace(product);
    difference = one - other;
    return difference < 1e-6 * SIDE && difference > -1e-6 * SIDE;
}}
"""
TOKENIZER = """enum kind {{ END, NUMBER, NAME, SIGN }};

struct scanner {{
    const char *rest;
    enum kind kind;
    long number;
    char name[{label}];
    char sign;
}};

static void advance(struct scanner *s)
{{
    size_t length = 0;

    while (isspace((unsigned char)*s->rest))
        s->rest++;
    if (!*s->rest) {{
        s->kind = END;
    }} else if (isdigit((unsigned char)*s->rest)) {{
        char *end;

        s->kind = NUMBER;
        s->number = strtol(s->rest, &end, 10);
        s->rest = end;
    }} else if (isalpha((unsigned char)*s->rest)) {{
        s->kind = NAME;
        while (isalnum((unsigned char)*s->rest) && length + 1 < sizeof s->name)
            s->name[length++] = *s->rest++;
        s->name[length] = 0;
    }} else {{
        s->kind = SIGN;
        s->sign = *s->rest++;
    }}
}}

static long sum(struct scanner *s);

static long primary(struct scanner *s)
{{
    long value = 0;

    switch (s->kind) {{
    case NUMBER:
        value = s->number;
        break;
    case NAME:
        value = strcmp(s->name, "scale{seed}") == 0 ? {modulus} : (long)strlen(s->name);
        break;
    case SIGN:
        if (s->sign == '(') {{
            advance(s);
            value = sum(s);
        }}
        break;
    case END:
        return 0;
    }}
    advance(s);
    return value;
}}

static long term(struct scanner *s)
{{
    long value = primary(s);

    while (s->kind == SIGN && (s->sign == '*' || s->sign == '/')) {{
        char sign = s->sign;
        long next;

        advance(s);
        next = primary(s);
        value = sign == '*' ? value * next : next ? value / next : 0;
    }}
    return value;
}}

static long sum(struct scanner *s)
{{
    long value = term(s);

    while (s->kind == SIGN && (s->sign == '+' || s->sign == '-')) {{
        char sign = s->sign;

        advance(s);
        value += sign == '+' ? term(s) : -term(s);
    }}
    return value;
}}

int {name}(void)
{{
    char text[128];
    struct scanner s = {{ .rest = text }};

    snprintf(text, sizeof text, "2 * (scale{seed} + %d) - abc * 7 / (1 + 2)", {count});
    advance(&s);
    return sum(&s) == 2L * ({modulus} + {count}) - 7;
}}
"""
FORMATTER = """struct buffer {{
    char *text;
    size_t length, room;
}};

static int append(struct buffer *out, const char *text, size_t length)
{{
    if (out->length + length + 1 > out->room) {{
        size_t room = (out->length + length + 1) * 2;
        char *more = realloc(out->text, room);

        if (!more)
            return 0;
        out->text = more;
        out->room = room;
    }}
    memcpy(out->text + out->length, text, length);
    out->length += length;
    out->text[out->length] = 0;
    return 1;
}}

static int append_number(struct buffer *out, long value, int base)
{{
    char digits[72];
    size_t at = sizeof digits;
    int negative = value < 0;

    if (negative)
        value = -value;
    do
        digits[--at] = "0123456789abcdefghijklmnopqrstuvwxyz"[value % base];
    while (value /= base);
    if (negative)
        digits[--at] = '-';
    return append(out, digits + at, sizeof digits - at);
}}

static void upper(struct buffer *out)
{{
    for (size_t i = 0; i < out->length; i++)
        out->text[i] = (char)toupper((unsigned char)out->text[i]);
}}

static size_t occurrences(const struct buffer *out, char letter)
{{
    size_t found = 0;

    for (size_t i = 0; i < out->length; i++)
        found += out->text[i] == letter;
    return found;
}}

int {name}(void)
{{
    struct buffer out = {{ NULL, 0, 0 }};
    size_t commas;
    char *end;
    long last;

    for (long i = 1; i <= {count}; i++)
        if (!append_number(&out, -i * {modulus}, {base}) || !append(&out, ",", 1))
            return 0;
    upper(&out);
    commas = occurrences(&out, ',');
    out.text[out.length - 1] = 0;
    end = strrchr(out.text, ',');
    last = strtol(end ? end + 1 : out.text, NULL, {base});
    free(out.text);
    return commas == {count} && last == -(long){count} * {modulus};
}}
"""
KINDS = (("table", TABLE), ("sorter", SORTER), ("matrix", MATRIX), ("tokenizer", TOKENIZER), ("formatter", FORMATTER))
PRIMES = (31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109)


def main():
    directory = pathlib.Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(MODULES):
        kind, template = KINDS[number % len(KINDS)]
        name, prime = f"{kind}_{number:02}", PRIMES[number]
        names.append(name)
        text = template.format(
            name=name, slots=prime * 4, shift=9 + number % 5, odd=0x9E3779B1, count=1 << 12, label=16 + number, seed=prime * 1001,
            modulus=prime * 13, side=prime, diagonal=number + 2, base=10 + number,
        )
        (directory / f"{name}.c").write_text(HEAD + text)
    (directory / "modules.h").write_text("".join(f"int {name}(void);\n" for name in names))
    calls = "".join(f"    right += {name}();\n" for name in names)
    (directory / "main.c").write_text(
        f'{HEAD}int main(void)\n{{\n    int right = 0;\n\n{calls}    printf("%d modules right\\n", right);\n    return right != {MODULES};\n}}\n'
    )


main()
