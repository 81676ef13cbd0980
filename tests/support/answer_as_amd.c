/* Answers CPUID as an AMD processor would, in the process into which it is loaded (LD_PRELOAD), on an Intel one.
 *
 * MKL asks for the maker, and takes kernels for AMD that sum in another order; no environment variable asks for those.
 * Linux can have a process interrupted at the instruction (arch_prctl, where /proc/cpuinfo has `cpuid_fault`). All other
 * answers are the processor's own, without AMX and AVX512-FP16, which no AMD processor has. */
#define _GNU_SOURCE /* for the names of the registers */
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define ZEN_4 0x00a10f11     /* leaf 1, EAX: family, model, stepping */
#define INTEL_ONLY 0x03c00000 /* leaf 7, EDX: AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *instruction = (const uint8_t *)registers[REG_RIP];
    uint32_t leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    if (info->si_code != SI_KERNEL || instruction[0] != 0x0f || instruction[1] != 0xa2) {
        signal(number, SIG_DFL); /* a fault like any other: it comes again and ends the process */
        return;
    }
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, part, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 0 || leaf == 0x80000000) {
        memcpy(&b, "Auth", 4);
        memcpy(&d, "enti", 4);
        memcpy(&c, "cAMD", 4);
    } else if (leaf == 1) {
        a = ZEN_4;
    } else if (leaf == 7 && part == 0) {
        d &= ~INTEL_ONLY;
    }
    registers[REG_RAX] = a;
    registers[REG_RBX] = b;
    registers[REG_RCX] = c;
    registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, 0);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
}
