/*
 * Dhrystone 2.1, the synthetic integer mix of R. P. Weicker (CACM 27/10, 1984; version 2.1 of 1988).
 *
 * Written for this harness from the published description: 8 procedures and 3 functions over records, arrays, strings
 * and enumerations, in the published proportions. The rules forbid merging procedures, hence NOT_MERGED.
 * Unit of the result: DMIPS, that is Dhrystones a second over 1757 (a VAX 11/780).
 *
 *     dhrystone                 one copy, as a rate
 *     dhrystone NAME COUNT      COUNT copies at once for one box: rows NAME (slowest over fastest) and NAME_total (DMIPS)
 *     dhrystone NAME COUNT over one copy, then COUNT at once: row NAME (all of them over the one)
 */
#include <string.h>

#include "jobs.h"
#include "rate.h"

#define NOT_MERGED __attribute__((noinline, noclone))
#define TEXT_LENGTH 31

enum ident { IDENT_1, IDENT_2, IDENT_3, IDENT_4, IDENT_5 };
typedef char text[TEXT_LENGTH];

struct record {
    struct record *next;
    enum ident discriminant;
    enum ident component;
    int number;
    text string;
};

static struct record first_record, second_record;
static struct record *global, *next_global;
static int global_int, global_bool;
static char global_char_1, global_char_2;
static int vector[50], matrix[50][50];

static NOT_MERGED enum ident function_1(char left, char right)
{
    char copy = left;

    if (copy != right)
        return IDENT_1;
    global_char_1 = copy;
    return IDENT_2;
}

static NOT_MERGED int function_2(text left, text right)
{
    int position = 2;
    char letter = 'A';

    while (position <= 2)
        if (function_1(left[position], right[position + 1]) == IDENT_1) {
            letter = 'A';
            position++;
        }
    if (letter >= 'W' && letter < 'Z')
        position = 7;
    if (letter == 'R')
        return 1;
    if (strcmp(left, right) > 0) {
        global_int = position + 7;
        return 1;
    }
    return 0;
}

static NOT_MERGED int function_3(enum ident value)
{
    return value == IDENT_3;
}

static NOT_MERGED void procedure_7(int a, int b, int *sum)
{
    *sum = b + a + 2;
}

static NOT_MERGED void procedure_3(struct record **out)
{
    if (global)
        *out = global->next;
    procedure_7(10, global_int, &global->number);
}

static NOT_MERGED void procedure_6(enum ident in, enum ident *out)
{
    *out = in;
    if (!function_3(in))
        *out = IDENT_4;
    switch (in) {
    case IDENT_1:
        *out = IDENT_1;
        break;
    case IDENT_2:
        *out = global_int > 100 ? IDENT_1 : IDENT_4;
        break;
    case IDENT_3:
        *out = IDENT_2;
        break;
    case IDENT_4:
        break;
    case IDENT_5:
        *out = IDENT_3;
        break;
    }
}

static NOT_MERGED void procedure_1(struct record *pointer)
{
    struct record *following = pointer->next;

    *pointer->next = *global;
    pointer->number = 5;
    following->number = pointer->number;
    following->next = pointer->next;
    procedure_3(&following->next);
    if (following->discriminant == IDENT_1) {
        following->number = 6;
        procedure_6(pointer->component, &following->component);
        following->next = global->next;
        procedure_7(following->number, 10, &following->number);
    } else {
        *pointer = *pointer->next;
    }
}

static NOT_MERGED void procedure_2(int *value)
{
    int local = *value + 10;
    enum ident state = IDENT_2;

    do {
        if (global_char_1 == 'A') {
            local--;
            *value = local - global_int;
            state = IDENT_1;
        }
    } while (state != IDENT_1);
}

static NOT_MERGED void procedure_4(void)
{
    int is_a = global_char_1 == 'A';

    global_bool = is_a | global_bool;
    global_char_2 = 'B';
}

static NOT_MERGED void procedure_5(void)
{
    global_char_1 = 'A';
    global_bool = 0;
}

static NOT_MERGED void procedure_8(int one[50], int two[50][50], int a, int b)
{
    int position = a + 5;

    one[position] = b;
    one[position + 1] = one[position];
    one[position + 30] = position;
    for (int i = position; i <= position + 1; i++)
        two[position][i] = position;
    two[position][position - 1] += 1;
    two[position + 20][position] = one[position];
    global_int = 5;
}

static int int_1, int_2, int_3;
static enum ident state;
static text text_1, text_2;

static void runs(unsigned long n)
{
    for (unsigned long run = 1; run <= n; run++) {
        procedure_5();
        procedure_4();
        int_1 = 2;
        int_2 = 3;
        strcpy(text_2, "DHRYSTONE PROGRAM, 2'ND STRING");
        state = IDENT_2;
        global_bool = !function_2(text_1, text_2);
        while (int_1 < int_2) {
            int_3 = 5 * int_1 - int_2;
            procedure_7(int_1, int_2, &int_3);
            int_1 += 1;
        }
        procedure_8(vector, matrix, int_1, int_3);
        procedure_1(global);
        for (char letter = 'A'; letter <= global_char_2; letter++)
            if (state == function_1(letter, 'C')) {
                procedure_6(IDENT_1, &state);
                strcpy(text_2, "DHRYSTONE PROGRAM, 3'RD STRING");
                int_2 = (int)run;
                global_int = (int)run;
            }
        int_2 = int_2 * int_1;
        int_1 = int_2 / int_3;
        int_2 = 7 * (int_2 - int_3) - int_1;
        procedure_2(&int_1);
    }
}

static const unsigned long STEP = 1000;
static const double VAX = 1757.0;

static void prepare(void)
{
    next_global = &second_record;
    global = &first_record;
    global->next = next_global;
    global->discriminant = IDENT_1;
    global->component = IDENT_3;
    global->number = 40;
    strcpy(global->string, "DHRYSTONE PROGRAM, SOME STRING");
    strcpy(text_1, "DHRYSTONE PROGRAM, 1'ST STRING");
    matrix[8][7] = 10;
}

static void check(void)
{
    require(global_int == 5 && global_bool == 1, "dhrystone: global values");
    require(global_char_1 == 'A' && global_char_2 == 'B', "dhrystone: global characters");
    require(vector[8] == 7, "dhrystone: vector");
    require(global->number == 17 && global->component == IDENT_3, "dhrystone: first record");
    require(next_global->number == 18 && next_global->component == IDENT_2, "dhrystone: second record");
    require(int_1 == 5 && int_2 == 13 && int_3 == 7 && state == IDENT_2, "dhrystone: local values");
}

static void several(const char *name, int copies, int over_one)
{
    double one = over_one ? jobs_at_once(runs, STEP, check, 1).total : 0.0;
    struct jobs all = jobs_at_once(runs, STEP, check, copies);
    char total[64];

    if (over_one) {
        print_row(name, all.total / one);
        return;
    }
    snprintf(total, sizeof total, "%s_total", name);
    print_row(name, all.slowest / all.fastest);
    print_row(total, all.total / VAX);
}

int main(int count, char **arguments)
{
    double rate;

    prepare();
    if (count >= 3) {
        several(arguments[1], atoi(arguments[2]), count > 3 && strcmp(arguments[3], "over") == 0);
        return 0;
    }
    rate = rate_of(runs, STEP);
    check();
    print_row("dhrystone", rate / VAX);
    return 0;
}
