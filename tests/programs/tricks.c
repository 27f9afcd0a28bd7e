/*
 * A program that tries what programs do not do: wild jumps and pointers, instructions that trap or are none, system calls by every door, segments, single
 * steps, code that changes itself. Each trick prints one line: what came back in registers, or which signal came, where and why.
 *
 * Natively the same program says what a processor does. Lines that begin with "~" depend on the kernel's configuration or the processor's model:
 * they are tried only with the argument "guest", and are alike in any two runs in guests of one kind.
 */
#define _GNU_SOURCE
#include <asm/ldt.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096, REGISTERS = 14, SIGNAL_STACK = 1 << 16, HEAP = 1 << 20 };

/* Code is copied here; the second page is data. What follows is a hole. */
#define CODE ((unsigned char *)0x20000000)
#define DATA ((unsigned char *)0x20001000)
#define TOP 0x7ffffffff000ul

static const char *const names[REGISTERS] = { "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
                                              "r9",  "r10", "r11", "r12", "r13", "r14" };
static const int greg[REGISTERS] = { REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RSI, REG_RDI, REG_RBP, REG_R8,
                                     REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14 };
uint64_t in[REGISTERS], out[REGISTERS], out_flags, kept_rsp, kept_fs, target;
static uint64_t base[REGISTERS];
static sigjmp_buf back;
static siginfo_t seen;
static greg_t at[NGREG];
static int guest;

/* Runs the code at `target` with the registers `in`; R15 is the code's own to return by, RSP its own stack. */
void enter(void);
__asm__(".text\n.globl enter\nenter:\n"
        "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, kept_rsp(%rip); rdfsbase %rax; mov %rax, kept_fs(%rip)\n"
        "mov in+8(%rip), %rbx; mov in+16(%rip), %rcx; mov in+24(%rip), %rdx; mov in+32(%rip), %rsi\n"
        "mov in+40(%rip), %rdi; mov in+48(%rip), %rbp; mov in+56(%rip), %r8; mov in+64(%rip), %r9\n"
        "mov in+72(%rip), %r10; mov in+80(%rip), %r11; mov in+88(%rip), %r12; mov in+96(%rip), %r13\n"
        "mov in+104(%rip), %r14; lea 1f(%rip), %r15\n"
        "mov in(%rip), %rax; xor $0, %eax; mov in(%rip), %rax; jmp *target(%rip)\n"
        "1: mov kept_rsp(%rip), %rsp; pushfq; popq out_flags(%rip); pushq $2; popfq\n"
        "mov %rax, out(%rip); mov kept_fs(%rip), %rax; wrfsbase %rax\n"
        "mov %rbx, out+8(%rip); mov %rcx, out+16(%rip); mov %rdx, out+24(%rip); mov %rsi, out+32(%rip)\n"
        "mov %rdi, out+40(%rip); mov %rbp, out+48(%rip); mov %r8, out+56(%rip); mov %r9, out+64(%rip)\n"
        "mov %r10, out+72(%rip); mov %r11, out+80(%rip); mov %r12, out+88(%rip); mov %r13, out+96(%rip)\n"
        "mov %r14, out+104(%rip)\n"
        "mov $0x2b, %eax; mov %eax, %ss; xor %eax, %eax; mov %eax, %ds; mov %eax, %es; cld\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; ret\n");

__attribute__((optimize("no-stack-protector"))) static void on_signal(int number, siginfo_t *info, void *context)
{
    /* The trick may have changed them, and the library needs them. */
    __asm__ volatile("pushq $2; popfq; wrfsbase %0" ::"r"(kept_fs) : "cc", "memory");
    (void)number;
    seen = *info;
    memcpy(at, ((ucontext_t *)context)->uc_mcontext.gregs, sizeof at);
    siglongjmp(back, 1);
}

static void catch(void (*handler)(int, siginfo_t *, void *))
{
    static const int numbers[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS };
    struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER };

    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
}

/* Computes for some milliseconds, as long-running programs do. */
static void warm(void)
{
    uint64_t rounds = 10000000;

    __asm__ volatile("1: dec %0; jnz 1b" : "+r"(rounds) : : "cc");
}

static uint64_t hash(uint64_t sum, const void *bytes, size_t count)
{
    for (const unsigned char *p = bytes; count--; p++)
        sum = (sum ^ *p) * 0x100000001b3;
    return sum;
}

static void show(const char *name, uint64_t value)
{
    if ((pid_t)value == getpid())
        printf(" %s=pid", name);
    else
        printf(" %s=%lx", name, value);
}

/* Runs what is at `where` and prints what came of it. */
static void run(const char *name, uint64_t where)
{
    if (*name == '~' && !guest)
        return;
    warm();
    printf("%s:", name);
    target = where;
    memcpy(in, base, sizeof in);
    if (sigsetjmp(back, 1) == 0) {
        enter();
        for (int i = 0; i < REGISTERS; i++)
            if (out[i] != in[i])
                show(names[i], out[i]);
        printf(" flags=%lx\n", out_flags);
        return;
    }
    __asm__ volatile("xor %%eax, %%eax; mov %%eax, %%ds; mov %%eax, %%es; pushq $2; popfq; cld" ::: "eax", "cc", "memory");
    printf(" signal %d code %d at %lx, trap %llx error %llx, rip %llx flags %llx", seen.si_signo, seen.si_code,
           (uint64_t)seen.si_addr, at[REG_TRAPNO], at[REG_ERR], at[REG_RIP], at[REG_EFL]);
    for (int i = 0; i < REGISTERS; i++)
        if ((uint64_t)at[greg[i]] != in[i])
            show(names[i], (uint64_t)at[greg[i]]);
    printf("\n");
}

static void put(size_t offset, const void *code, size_t count)
{
    memset(CODE, 0xcc, PAGE);
    memcpy(CODE + offset, code, count);
}

/* ---- one instruction, or a few ---------------------------------------------------------------------------------- */

struct trick {
    const char *name;
    const unsigned char *start, *end;
};

#define TRICK(id, text)                                                                          \
    __asm__(".section .rodata\nstart_" #id ": " text "\njmp *%r15\nend_" #id ":\n.text");        \
    extern const unsigned char start_##id[], end_##id[];
#define LISTED(id, name) { name, start_##id, end_##id }

TRICK(nothing, "nop")
TRICK(ud2, "ud2")
TRICK(ud1, "ud1 %eax, %eax")
TRICK(hlt, "hlt")
TRICK(cli, "cli")
TRICK(sti, "sti")
TRICK(in8, "in %dx, %al")
TRICK(out8, "out %al, %dx")
TRICK(outs, "rep outsb")
TRICK(rdmsr, "rdmsr")
TRICK(wrmsr, "wrmsr")
TRICK(clts, "clts")
TRICK(invd, "invd")
TRICK(wbinvd, "wbinvd")
TRICK(invlpg, "invlpg (%rax)")
TRICK(lgdt, "lgdt 0x20001000")
TRICK(lidt, "lidt 0x20001000")
TRICK(lldt, "lldt %ax")
TRICK(ltr, "ltr %ax")
TRICK(lmsw, "lmsw %ax")
TRICK(cr0, "mov %rax, %cr0")
TRICK(cr3, "mov %cr3, %rax")
TRICK(dr7, "mov %rax, %dr7")
TRICK(swapgs, "swapgs")
TRICK(sysret, "sysretq")
TRICK(sysexit, "sysexitl")
TRICK(monitor, "monitor")
TRICK(mwait, "mwait")
TRICK(rsm, "rsm")
TRICK(xsetbv, "xsetbv")
TRICK(int1, ".byte 0xf1")
TRICK(int3, "int3")
TRICK(int3_long, ".byte 0xcd, 3")
TRICK(div0, "xor %ecx, %ecx; div %ecx")
TRICK(div_overflow, "mov $-1, %edx; mov $1, %ecx; div %ecx")
TRICK(lock_nop, ".byte 0xf0, 0x90")
TRICK(lock_mov, ".byte 0xf0, 0x89, 0x00")
TRICK(long15, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90")
TRICK(long16, ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90")
TRICK(syscall_none, "mov $1000, %eax; syscall")
TRICK(syscall_pid, "mov $39, %eax; syscall")
TRICK(syscall_prefixed, "mov $39, %eax; .byte 0x66, 0x66, 0x48, 0x0f, 0x05")
TRICK(syscall_minus, "mov $-1, %rax; syscall")
TRICK(syscall_high, "movabs $0x100000027, %rax; syscall")
TRICK(syscall_low_bit, "movabs $0x8000000000000027, %rax; syscall")
TRICK(syscall_stackless, "mov %rsp, %rbx; movabs $0x8000000000000000, %rsp; mov $39, %eax; syscall; mov %rbx, %rsp; xor %ebx, %ebx")
TRICK(syscall_flags, "pushq $0x244cd7; popfq; mov $1000, %eax; syscall")
TRICK(syscall_x32, "mov $0x40000027, %eax; syscall")
TRICK(int80, "mov $20, %eax; int $0x80")
TRICK(int80_high, "movabs $0xffffffff00000014, %rax; int $0x80")
TRICK(int80_none, "movabs $0x1234567800001000, %rax; int $0x80")
TRICK(sysenter, "mov $20, %eax; sysenter")
TRICK(vsyscall, "push %r15; mov $0xffffffffff600400, %rax; xor %edi, %edi; call *%rax; xor %eax, %eax; pop %r15")
TRICK(vsyscall_odd, "mov $0xffffffffff600001, %rax; call *%rax")
TRICK(vsyscall_end, "mov $0xffffffffff600ffe, %rax; call *%rax")
TRICK(vsyscall_read, "mov 0xffffffffff600000, %rax")
TRICK(popf_all, "pushq $0x3ffed7; popfq; pushfq; pop %rax; pushq $2; popfq")
TRICK(popf_high, "movabs $0xffffffff00000002, %rax; push %rax; popfq; pushfq; pop %rax")
TRICK(popf16, "pushw $0xfed7; popfw; pushfq; pop %rax; pushq $2; popfq")
TRICK(align, "pushq $0x40002; popfq; mov 0x20001001, %eax")
TRICK(align_sse, "movaps 0x20001001, %xmm0")
TRICK(direction, "std; mov $0x20001010, %edi; mov $0x20001090, %esi; mov $8, %ecx; rep movsb; cld")
TRICK(string_off, "mov $0x20001f80, %edi; mov $0x200, %ecx; rep stosb")
TRICK(string_over, "mov $0x20001f80, %esi; mov $0x20001000, %edi; mov $0x200, %ecx; rep movsb")
TRICK(sse_div, "movl $0x1d80, 0x20001000; ldmxcsr 0x20001000; pxor %xmm0, %xmm0; divss %xmm0, %xmm0")
TRICK(sse_mask, "movl $0x1f80, 0x20001000; ldmxcsr 0x20001000; stmxcsr 0x20001004; mov 0x20001004, %eax")
TRICK(mxcsr_bad, "movl $0xffff0000, 0x20001000; ldmxcsr 0x20001000")
TRICK(x87_div, "fninit; movw $0x37b, 0x20001000; fldcw 0x20001000; fldz; fld1; fdivp; fwait")
TRICK(x87_done, "fnclex; fninit; fnstcw 0x20001000; movzwl 0x20001000, %eax")
TRICK(fxsave, "fxsave 0x20001000; mov 0x20001018, %eax")
TRICK(rdpkru, "xor %ecx, %ecx; rdpkru")
TRICK(stack_none, "xor %esp, %esp; push %rax")
TRICK(stack_wild, "movabs $0x8000000000000000, %rsp; push %rax")
TRICK(ret_wild, "movabs $0x8000000000000000, %rax; push %rax; ret")
TRICK(ret_kernel, "mov $0xffffffff81000000, %rax; push %rax; ret")
TRICK(iret, "mov %rsp, %rbx; mov %ss, %eax; push %rax; push %rbx; pushq $0x246; mov %cs, %eax; push %rax; lea 1f(%rip), %rax; push %rax; "
            "iretq; 1: xor %eax, %eax; xor %ebx, %ebx")
TRICK(iret_kernel, "mov %rsp, %rbx; pushq $0x18; push %rbx; pushq $0x246; pushq $0x10; push %r15; xor %ebx, %ebx; iretq")
TRICK(iret_flags, "mov %rsp, %rbx; pushq $0x2b; push %rbx; pushq $0x257ed7; pushq $0x33; lea 1f(%rip), %rax; push %rax; iretq; "
                  "1: pushfq; pop %rax; xor %ebx, %ebx; pushq $2; popfq")
TRICK(lret_kernel, "pushq $0x10; push %r15; lretq")
TRICK(lret_null, "pushq $0; push %r15; lretq")
TRICK(lret_own, "pushq $0x33; lea 1f(%rip), %rax; push %rax; lretq; 1: xor %eax, %eax")
TRICK(compat, "pushq $0x23; lea 1f(%rip), %rax; push %rax; lretq; 1: .byte 0x31, 0xc0, 0x40, 0x40; "
              ".byte 0xea; .long 0x20000400; .word 0x33")
TRICK(compat_syscall, "pushq $0x23; lea 1f(%rip), %rax; push %rax; lretq; 1: .byte 0xb8, 20, 0, 0, 0, 0xcd, 0x80; "
                      ".byte 0xea; .long 0x20000400; .word 0x33")
TRICK(ds, "mov %ds, %eax; mov $0x2b, %ecx; mov %ecx, %ds; mov %ds, %ecx; xor %edx, %edx; mov %edx, %ds")
TRICK(ds_kernel, "mov $0x18, %eax; mov %eax, %ds")
TRICK(ds_code, "mov $0x33, %eax; mov %eax, %ds; mov 0x20001000, %ecx; mov %ds, %ecx; mov %ds, %edx")
TRICK(es_null, "mov $3, %eax; mov %eax, %es; mov %es, %ecx; xor %edx, %edx; mov %edx, %es")
TRICK(es_beyond, "mov $0xfffb, %eax; mov %eax, %es")
TRICK(ss_null, "xor %eax, %eax; mov %eax, %ss")
TRICK(ss_code, "mov $0x33, %eax; mov %eax, %ss")
TRICK(ss_own, "mov $0x2b, %eax; mov %eax, %ss; nop")
TRICK(fs_selector, "mov $0x2b, %eax; mov %eax, %fs; rdfsbase %rcx; mov %fs, %edx; xor %eax, %eax; mov %eax, %fs")
TRICK(gs_selector, "mov $0x2b, %eax; mov %eax, %gs; rdgsbase %rcx; mov %gs, %edx; xor %eax, %eax; mov %eax, %gs")
TRICK(gs_base, "mov $0x20001000, %eax; wrgsbase %rax; movl $77, %gs:8; mov 0x20001008, %ecx; rdgsbase %rdx; xor %eax, %eax; wrgsbase %rax")
TRICK(gs_wild, "movabs $0x8000000000000000, %rax; wrgsbase %rax")
TRICK(gs_kernel, "mov $0xffff888000000000, %rax; wrgsbase %rax; rdgsbase %rcx; mov %gs:0, %edx")
TRICK(gs_edge, "movabs $0x7ffffffff000, %rax; wrgsbase %rax; rdgsbase %rcx; mov %gs:-4096, %edx")
TRICK(gs_again, "rdgsbase %rcx; xor %eax, %eax; wrgsbase %rax; rdgsbase %rdx")
TRICK(fs_kernel, "mov $0xffff888000000000, %rax; wrfsbase %rax; rdfsbase %rcx; mov %fs:0, %edx")
TRICK(lar, "mov $0x2b, %ecx; lar %ecx, %eax; mov $0x33, %ecx; lar %ecx, %edx; mov $0x10, %ecx; lar %ecx, %esi")
TRICK(lsl, "mov $0x2b, %ecx; lsl %ecx, %eax; mov $0x33, %ecx; lsl %ecx, %edx; mov $0x10, %ecx; lsl %ecx, %esi")
TRICK(verr, "mov $0x2b, %ecx; verr %cx; setz %al; verw %cx; setz %dl; mov $0x33, %ecx; verw %cx; setz %bl")
TRICK(lsl_cpu, "mov $0x7b, %ecx; lsl %ecx, %eax")
TRICK(smsw, "smsw %rax")
TRICK(sgdt, "sgdt 0x20001000")
TRICK(sidt, "sidt 0x20001000")
TRICK(xgetbv, "xor %ecx, %ecx; xgetbv")
TRICK(cpuid0, "xor %eax, %eax; cpuid")
TRICK(cpuid1, "mov $1, %eax; cpuid")
TRICK(cpuid7, "mov $7, %eax; xor %ecx, %ecx; cpuid")
TRICK(cpuid_d, "mov $13, %eax; xor %ecx, %ecx; cpuid")
TRICK(cpuid_d1, "mov $13, %eax; mov $1, %ecx; cpuid")
TRICK(cpuid_xen, "mov $0x40000000, %eax; cpuid")
TRICK(cpuid_ext, "mov $0x80000001, %eax; cpuid")
TRICK(cpuid_hidden, "jmp 1f+1; 1: mov $0x9090a20f, %eax; nop")
TRICK(rdtscp, "rdtscp; xor %eax, %eax; xor %edx, %edx")
TRICK(rdpid, "rdpid %rax")
TRICK(rdpmc, "xor %ecx, %ecx; rdpmc")
TRICK(vmcall, "mov $1000, %eax; vmcall")
TRICK(vmmcall, "mov $1000, %eax; vmmcall")
TRICK(xsave_all, "mov $-1, %eax; mov %eax, %edx; xsave 0x20001000; mov 0x20001200, %eax; mov 0x20001580, %edx")
TRICK(int4, "int $4")
TRICK(int_fault, "int $13")
TRICK(jrcxz_self, "mov $3, %ecx; 1: dec %ecx; jrcxz 2f; jmp 1b; 2: nop")

static const struct trick tricks[] = {
    LISTED(nothing, "nothing"), LISTED(ud2, "ud2"), LISTED(ud1, "ud1"), LISTED(hlt, "hlt"), LISTED(cli, "cli"), LISTED(sti, "sti"),
    LISTED(in8, "in"), LISTED(out8, "out"), LISTED(outs, "outs"), LISTED(rdmsr, "rdmsr"), LISTED(wrmsr, "wrmsr"), LISTED(clts, "clts"),
    LISTED(invd, "invd"), LISTED(wbinvd, "wbinvd"), LISTED(invlpg, "invlpg"), LISTED(lgdt, "lgdt"), LISTED(lidt, "lidt"),
    LISTED(lldt, "lldt"), LISTED(ltr, "ltr"), LISTED(lmsw, "lmsw"), LISTED(cr0, "cr0"), LISTED(cr3, "cr3"), LISTED(dr7, "dr7"),
    LISTED(swapgs, "swapgs"), LISTED(sysret, "sysret"), LISTED(sysexit, "sysexitl"), LISTED(monitor, "monitor"), LISTED(mwait, "mwait"),
    LISTED(rsm, "rsm"), LISTED(xsetbv, "xsetbv"), LISTED(int1, "~int1"), LISTED(int3, "int3"), LISTED(int3_long, "int3_long"),
    LISTED(div0, "div0"), LISTED(div_overflow, "div_overflow"), LISTED(lock_nop, "lock_nop"), LISTED(lock_mov, "lock_mov"),
    LISTED(long15, "long15"), LISTED(long16, "long16"), LISTED(syscall_none, "syscall_none"), LISTED(syscall_pid, "syscall_pid"),
    LISTED(syscall_prefixed, "syscall_prefixed"), LISTED(syscall_minus, "syscall_minus"), LISTED(syscall_high, "syscall_high"),
    LISTED(syscall_low_bit, "syscall_low_bit"), LISTED(syscall_stackless, "syscall_stackless"), LISTED(syscall_flags, "syscall_flags"),
    LISTED(syscall_x32, "~syscall_x32"), LISTED(int80, "~int80"), LISTED(int80_high, "~int80_high"), LISTED(int80_none, "~int80_none"),
    LISTED(sysenter, "~sysenter"), LISTED(popf_all, "popf_all"),
    LISTED(popf_high, "popf_high"), LISTED(popf16, "popf16"), LISTED(align, "align"), LISTED(align_sse, "align_sse"),
    LISTED(direction, "direction"), LISTED(string_off, "string_off"), LISTED(string_over, "string_over"), LISTED(sse_div, "sse_div"),
    LISTED(sse_mask, "sse_mask"), LISTED(mxcsr_bad, "mxcsr_bad"), LISTED(x87_div, "x87_div"), LISTED(x87_done, "x87_done"),
    LISTED(fxsave, "fxsave"), LISTED(rdpkru, "~rdpkru"), LISTED(stack_none, "stack_none"), LISTED(stack_wild, "stack_wild"),
    LISTED(ret_wild, "ret_wild"), LISTED(ret_kernel, "ret_kernel"), LISTED(iret, "iret"), LISTED(iret_kernel, "iret_kernel"),
    LISTED(iret_flags, "iret_flags"), LISTED(lret_kernel, "lret_kernel"), LISTED(lret_null, "lret_null"), LISTED(lret_own, "lret_own"),
    LISTED(compat, "compat"), LISTED(compat_syscall, "~compat_syscall"), LISTED(ds, "ds"), LISTED(ds_kernel, "ds_kernel"),
    LISTED(ds_code, "ds_code"), LISTED(es_null, "es_null"), LISTED(es_beyond, "es_beyond"), LISTED(ss_null, "ss_null"),
    LISTED(ss_code, "ss_code"), LISTED(ss_own, "ss_own"), LISTED(fs_selector, "fs_selector"), LISTED(gs_selector, "gs_selector"),
    LISTED(gs_base, "gs_base"), LISTED(gs_wild, "gs_wild"), LISTED(gs_kernel, "gs_kernel"), LISTED(gs_edge, "gs_edge"),
    LISTED(gs_again, "gs_again"), LISTED(fs_kernel, "fs_kernel"), LISTED(lar, "lar"), LISTED(lsl, "lsl"), LISTED(verr, "verr"),
    LISTED(lsl_cpu, "~lsl_cpu"), LISTED(smsw, "~smsw"), LISTED(sgdt, "~sgdt"), LISTED(sidt, "~sidt"), LISTED(xgetbv, "~xgetbv"),
    LISTED(cpuid0, "~cpuid0"), LISTED(cpuid1, "~cpuid1"), LISTED(cpuid7, "~cpuid7"), LISTED(cpuid_d, "~cpuid_d"),
    LISTED(cpuid_d1, "~cpuid_d1"), LISTED(cpuid_xen, "~cpuid_xen"), LISTED(cpuid_ext, "~cpuid_ext"), LISTED(cpuid_hidden, "~cpuid_hidden"),
    LISTED(rdtscp, "~rdtscp"), LISTED(rdpid, "~rdpid"), LISTED(rdpmc, "~rdpmc"), LISTED(vmcall, "~vmcall"), LISTED(vmmcall, "~vmmcall"),
    LISTED(xsave_all, "~xsave_all"), LISTED(int4, "int4"), LISTED(int_fault, "int_fault"), LISTED(jrcxz_self, "jrcxz_self"),
};

/* A process in which one of these was executed does not go on natively. */
static const struct trick last_tricks[] = {
    LISTED(vsyscall_read, "~vsyscall_read"), LISTED(vsyscall_odd, "~vsyscall_odd"), LISTED(vsyscall_end, "~vsyscall_end"),
    LISTED(vsyscall, "~vsyscall"),
};

static void single_tricks(const struct trick *tricks, size_t count)
{
    static const unsigned char leave[] = { 0x41, 0xff, 0xe7 };

    for (size_t i = 0; i < count; i++) {
        memset(DATA, 0, PAGE);
        put(0x100, tricks[i].start, (size_t)(tricks[i].end - tricks[i].start));
        memcpy(CODE + 0x400, leave, sizeof leave);
        run(tricks[i].name, (uint64_t)CODE + 0x100);
    }
}

/* All vectors, and opcodes that are none in 64-bit code. */
static void many_opcodes(void)
{
    static const unsigned char none[] = { 0x06, 0x07, 0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x60, 0x61,
                                          0x82, 0x9a, 0xce, 0xd4, 0xd5, 0xd6, 0xea };
    static const unsigned char none_0f[] = { 0x04, 0x0a, 0x0c, 0x24, 0x26, 0x36, 0x39, 0x3b, 0x3f, 0x7a, 0x7b, 0xa6, 0xa7, 0xff };
    char name[32];

    for (int vector = 0; vector < 256; vector++)
        if (vector != 0x80) {
            unsigned char code[] = { 0xcd, (unsigned char)vector, 0x41, 0xff, 0xe7 };

            put(0x200, code, sizeof code);
            snprintf(name, sizeof name, "int_%x", vector);
            run(name, (uint64_t)CODE + 0x200);
        }
    for (size_t i = 0; i < sizeof none; i++) {
        put(0, &none[i], 1);
        snprintf(name, sizeof name, "opcode_%x", none[i]);
        run(name, (uint64_t)CODE);
    }
    for (size_t i = 0; i < sizeof none_0f; i++) {
        unsigned char code[] = { 0x0f, none_0f[i] };

        put(0, code, sizeof code);
        snprintf(name, sizeof name, "opcode_0f%x", none_0f[i]);
        run(name, (uint64_t)CODE);
    }
}

/* ---- addresses -------------------------------------------------------------------------------------------------- */

static void wild_addresses(void)
{
    static const uint64_t wild[] = { 0, 8, 0xdead0000, 0x20002000, TOP, TOP + 0xfff, 0x7fffffffffff, 0x800000000000, 0x8000000000000000,
                                     0xffff7fffffffffff, 0xffff800000000000, 0xffffffff81000000, 0xffffffff82000000,
                                     0xffffffffff5fffff, 0xfffffffffffffff8, 0xffffffffffffffff };
    /* mov (%rdx), %rax; mov %rax, (%rdx); jmp *%rdx; lock incl (%rdx); movups (%rdx), %xmm0 */
    static const struct {
        const char *name;
        unsigned char code[8], count;
    } how[] = { { "read", { 0x48, 0x8b, 0x02 }, 3 }, { "write", { 0x48, 0x89, 0x02 }, 3 }, { "jump", { 0xff, 0xe2 }, 2 },
                { "add", { 0xf0, 0xff, 0x02 }, 3 }, { "vector", { 0x0f, 0x10, 0x02 }, 3 } };
    char name[64];

    for (size_t w = 0; w < sizeof wild / sizeof *wild; w++)
        for (size_t h = 0; h < sizeof how / sizeof *how; h++) {
            put(0x300, how[h].code, how[h].count);
            base[3] = wild[w];
            snprintf(name, sizeof name, "%s_%lx", how[h].name, wild[w]);
            run(name, (uint64_t)CODE + 0x300);
        }
    base[3] = 0x1003;
}

/* Code and data at the ends of what can be mapped, and at the end of a mapping. */
static void edges(void)
{
    static const uint64_t places[] = { 0x10000, 0x30000000, TOP - PAGE };
    static const unsigned char leave[] = { 0x41, 0xff, 0xe7 }, call[] = { 0x0f, 0x05 }, half[] = { 0x48, 0x8b }, load[] = { 0x48, 0x8b, 0x02 };
    char name[64];

    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        unsigned char *page = mmap((void *)places[i], PAGE, PROT_READ | PROT_WRITE | PROT_EXEC,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

        if (page != (void *)places[i]) {
            printf("edge_%lx: not mapped\n", places[i]);
            continue;
        }
#define EDGE(what, where) (snprintf(name, sizeof name, what "_%lx", places[i]), run(name, (uint64_t)(where)))
        memcpy(page, leave, 3);
        EDGE("edge_first", page);
        memset(page, 0x90, PAGE);
        memcpy(page + PAGE - 3, leave, 3);
        EDGE("edge_last", page + PAGE - 3);
        memset(page, 0x90, PAGE);
        EDGE("edge_over", page + PAGE - 8);
        base[0] = 1000;
        memcpy(page + PAGE - 2, call, 2);
        EDGE("edge_syscall", page + PAGE - 2);
        base[0] = 0x1000;
        memcpy(page + PAGE - 2, half, 2);
        EDGE("edge_half", page + PAGE - 2);
        page[PAGE - 1] = 0xcc;
        EDGE("edge_int3", page + PAGE - 1);
        put(0, load, 3);
        base[3] = places[i] + PAGE - 4;
        EDGE("edge_load", CODE);
        base[3] = 0x1003;
        mprotect(page, PAGE, PROT_READ | PROT_WRITE);
        EDGE("edge_data", page);
        mprotect(page, PAGE, PROT_NONE);
        EDGE("edge_none", page);
        munmap(page, PAGE);
        EDGE("edge_gone", page);
    }
}

/* More mappings than a mirror of them may have, every second one read-only. */
static void many_mappings(void)
{
    enum { PAGES = 28000 };
    unsigned char *area = mmap((void *)0x40000000, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    volatile uint64_t sum = 0;
    volatile int refused = 0;

    if (area == MAP_FAILED) {
        printf("mappings: none\n");
        return;
    }
    for (int i = 0; i < PAGES; i++)
        memset(area + (size_t)i * PAGE, i, 64);
    for (int i = 1; i < PAGES; i += 2)
        if (mprotect(area + (size_t)i * PAGE, PAGE, PROT_READ) != 0)
            sum++;
    for (int round = 0; round < 3; round++) {
        warm();
        for (int i = 0; i < PAGES; i++)
            sum = hash(sum, area + (size_t)i * PAGE, 4);
        for (int i = 0; i < PAGES; i += 2)
            area[(size_t)i * PAGE + (size_t)round] = (unsigned char)(round * 7);
    }
    for (volatile int i = 1; i < PAGES; i += 2000)
        if (sigsetjmp(back, 1) == 0) {
            kept_fs = __builtin_ia32_rdfsbase64();
            area[(size_t)i * PAGE] = 1;
        } else {
            refused++;
        }
    printf("mappings: sum %lx refused %d\n", sum, refused);
    munmap(area, (size_t)PAGES * PAGE);
}

/* ---- code that changes ------------------------------------------------------------------------------------------ */

static void changing_code(void)
{
    /* movb $7, 1f+1(%rip); 1: mov $3, %al; jmp *%r15 */
    static const unsigned char own[] = { 0xc6, 0x05, 0x01, 0, 0, 0, 7, 0xb0, 3, 0x41, 0xff, 0xe7 };
    unsigned char code[] = { 0xb8, 0, 0, 0, 0, 0x41, 0xff, 0xe7 };
    int file = (int)syscall(SYS_memfd_create, "alias", 0);
    unsigned char *one, *other;
    uint64_t sum = 0;

    put(0x500, own, sizeof own);
    run("own_code", (uint64_t)CODE + 0x500);
    memcpy(in, base, sizeof in);
    warm();
    for (uint32_t i = 0; i < 400; i++) {
        memcpy(code + 1, &i, 4);
        put(i * 8 % 4000, code, sizeof code);
        target = (uint64_t)CODE + i * 8 % 4000;
        enter();
        sum += out[0] == i;
    }
    printf("written_code: %lu\n", sum);
    if (file < 0 || ftruncate(file, PAGE) != 0)
        return;
    one = mmap((void *)0x31000000, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    other = mmap((void *)0x32000000, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, file, 0);
    sum = 0;
    for (uint32_t i = 0; i < 400; i++) {
        memcpy(code + 1, &i, 4);
        memcpy(one + 16, code, sizeof code);
        target = (uint64_t)other + 16;
        enter();
        sum += out[0] == i;
        if (i == 200)
            warm();
    }
    printf("alias_code: %lu\n", sum);
    sum = 0;
    for (uint32_t i = 0; i < 100; i++) {
        mprotect(other, PAGE, PROT_READ | PROT_WRITE);
        memcpy(code + 1, &i, 4);
        memcpy(other + 32, code, sizeof code);
        mprotect(other, PAGE, PROT_READ | PROT_EXEC);
        target = (uint64_t)other + 32;
        enter();
        sum += out[0] == i;
        if (i == 50)
            warm();
    }
    printf("protected_code: %lu\n", sum);
    munmap(one, PAGE), munmap(other, PAGE), close(file);
}

/* ---- signals ---------------------------------------------------------------------------------------------------- */

static volatile uint64_t steps, where;

static void on_step(int number, siginfo_t *info, void *context)
{
    greg_t *g = ((ucontext_t *)context)->uc_mcontext.gregs;
    uint64_t rip = (uint64_t)g[REG_RIP] - (uint64_t)CODE;

    (void)number;
    steps++;
    where = hash(hash(where, &rip, 8), &info->si_code, 4);
    if (rip >= PAGE || steps > 200)
        g[REG_EFL] &= ~0x100;
}

TRICK(stepped, "pushq $0x102; popfq; nop; nop; mov $0x2b, %eax; mov %eax, %ss; nop; pushfq; pop %rbx; xor %eax, %eax; cpuid; xor %eax, %eax; "
               "mov $0x20001000, %edi; mov $0x20001100, %esi; mov $5, %ecx; rep movsb; mov $1000, %eax; syscall; rdtscp; int3; "
               "mov $39, %eax; mov $0, %edx; xgetbv; xor %eax, %eax; pushq $2; popfq; nop; xor %ebx, %ebx; xor %ecx, %ecx; xor %edx, %edx")

static void single_steps(void)
{
    struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };

    sigaction(SIGTRAP, &action, NULL);
    for (int i = 0; i < 3; i++) {
        steps = where = 0;
        put(0x600, start_stepped, (size_t)(end_stepped - start_stepped));
        memcpy(in, base, sizeof in);
        warm();
        target = (uint64_t)CODE + 0x600;
        enter();
        printf("stepped: %lu steps %lx rax %lx flags %lx\n", steps, where, out[0], out_flags);
    }
    catch (on_signal);
}

/* Asks for the hypervisor's version: only the kernel may, whether the trap comes or not. */
TRICK(stepped_hypercall, "pushq $0x102; popfq; mov $17, %eax; xor %edi, %edi; vmmcall; nop; pushq $2; popfq")

static void stepped_hypercall(void)
{
    struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };

    if (!guest)
        return;
    sigaction(SIGTRAP, &action, NULL);
    steps = 0;
    put(0x600, start_stepped_hypercall, (size_t)(end_stepped_hypercall - start_stepped_hypercall));
    memcpy(in, base, sizeof in);
    target = (uint64_t)CODE + 0x600;
    enter();
    printf("~stepped_hypercall: %ld\n", (long)out[0]);
    catch (on_signal);
}

static volatile sig_atomic_t alarms;

/* Uses what a signal handler must not leave behind. */
static void on_alarm(int number)
{
    static const uint32_t round_up = 0x5f80;

    (void)number;
    alarms = alarms + 1;
    __asm__ volatile("ldmxcsr %0; vpcmpeqd %%ymm0, %%ymm0, %%ymm0; vmovdqa %%ymm0, %%ymm15; fninit; fldpi" ::"m"(round_up)
                     : "xmm0", "xmm15");
}

static void storm(void)
{
    struct itimerval often = { { 0, 700 }, { 0, 700 } }, never = { { 0, 0 }, { 0, 0 } };
    struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_NODEFER };
    double sum = 0, third = 3;
    uint64_t word = 1, right = 0;

    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    setitimer(ITIMER_REAL, &often, NULL);
    for (int i = 0; i < 30000000; i++) {
        sum += 1 / third;
        third += 1e-7;
        word = word * 6364136223846793005u + 1442695040888963407u;
    }
    for (int i = 0; i < 300; i++) {
        memset(DATA, i, PAGE);
        memmove(DATA + 1, DATA, PAGE - 1);
        right += DATA[PAGE - 1] == (unsigned char)i;
    }
    setitimer(ITIMER_REAL, &never, NULL);
    printf("storm: %.17g %lx %lu %s\n", sum, word, right, alarms > 20 ? "many" : "few");
    alarms = 0;
    for (int i = 0; i < 5000; i++) {
        kill(getpid(), SIGUSR1);
        sum += 1 / third;
    }
    printf("kills: %d %.17g\n", (int)alarms, sum);
}

/* A descriptor of our own. */
static void local_descriptors(void)
{
    struct user_desc data = { .entry_number = 0, .base_addr = 0x20001000, .limit = 0xff, .seg_32bit = 1, .useable = 1 };
    /* mov $7, %eax; mov %eax, %gs; mov %gs:16, %ecx; rdgsbase %rdx; mov %eax, %ds; mov %ds, %ebx; xor %eax, %eax; mov %eax, %gs; jmp *%r15 */
    static const unsigned char code[] = { 0xb8, 7, 0, 0, 0, 0x8e, 0xe8, 0x65, 0x8b, 0x0c, 0x25, 16, 0, 0, 0, 0xf3, 0x48, 0x0f, 0xae, 0xca,
                                          0x8e, 0xd8, 0x8c, 0xdb, 0x31, 0xc0, 0x8e, 0xe8, 0x41, 0xff, 0xe7 };

    if (!guest)
        return;
    memset(DATA, 0x5a, PAGE);
    put(0x700, code, sizeof code);
    run("~no_descriptor", (uint64_t)CODE + 0x700);
    printf("~modify_ldt: %ld\n", syscall(SYS_modify_ldt, 1, &data, sizeof data));
    run("~descriptor", (uint64_t)CODE + 0x700);
}

/* Address 0 is a root's to map. */
static void lowest_page(void)
{
    static const unsigned char code[] = { 0xb8, 42, 0, 0, 0, 0x41, 0xff, 0xe7 };
    unsigned char *volatile page;

    if (!guest)
        return;
    page = mmap((void *)0, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (page == MAP_FAILED) {
        printf("~lowest: not mapped\n");
        return;
    }
    memcpy(page + 16, code, sizeof code);
    run("~lowest", 16);
    munmap(page, PAGE);
}

int main(int count, char **arguments)
{
    static unsigned char stack[SIGNAL_STACK];
    stack_t other = { .ss_sp = stack, .ss_size = SIGNAL_STACK };
    cpu_set_t first;

    /* The heap begins somewhere in the first gigabyte, perhaps where pages are put below: then once more, with another beginning. */
    if ((uintptr_t)sbrk(0) > (uintptr_t)CODE - HEAP) {
        execv("/proc/self/exe", arguments);
        return 1;
    }
    guest = count > 1 && strcmp(arguments[1], "guest") == 0;
    CPU_ZERO(&first);
    CPU_SET(0, &first);
    sched_setaffinity(0, sizeof first, &first);
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigaltstack(&other, NULL);
    catch (on_signal);
    if (mmap(CODE, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != CODE)
        return 1;
    for (int i = 0; i < REGISTERS; i++)
        base[i] = 0x1000 + (uint64_t)i;
    lowest_page();
    if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0)
        return 1;
    single_tricks(tricks, sizeof tricks / sizeof *tricks);
    many_opcodes();
    wild_addresses();
    edges();
    changing_code();
    single_steps();
    stepped_hypercall();
    storm();
    local_descriptors();
    many_mappings();
    single_tricks(last_tricks, sizeof last_tricks / sizeof *last_tricks);
    puts("tricks: end");
    return 0;
}
