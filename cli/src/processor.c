/* Ends the process with an error message if the processor lacks a feature that the program was compiled for.
 *
 * Without this check the process would die of SIGILL at some instruction, or continue with wrong numbers where the
 * instruction has another meaning (lzcnt is bsr). The check is written in C and compiled for any x86-64, since Rust code
 * may contain such an instruction; and it runs before all other code of the program, including the constructors of its
 * libraries and the allocator. build.rs defines NEEDS_x for each feature x that rustc compiles for (-Ctarget-cpu). */

#include <cpuid.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* Returns whether the kernel saves the AVX registers when it switches tasks: AVX cannot be used otherwise. */
static int saves_avx_registers(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6;
}

static void add(char *list, size_t size, const char *name) {
    if (list[0] != '\0') {
        strncat(list, ", ", size - strlen(list) - 1);
    }
    strncat(list, name, size - strlen(list) - 1);
}

static void print(const char *text) {
    /* An error cannot be reported, so it is ignored. */
    ssize_t written = write(STDERR_FILENO, text, strlen(text));
    (void)written;
}

static void check_processor(void) {
    unsigned a, b = 0, c = 0, d = 0, leaf7_b = 0, extended_c = 0, ignored;
    __get_cpuid(1, &a, &ignored, &c, &d);
    __get_cpuid_count(7, 0, &a, &leaf7_b, &ignored, &ignored);
    __get_cpuid(0x80000001, &a, &b, &extended_c, &ignored);
    const int avx_works = (c & bit_OSXSAVE) != 0 && saves_avx_registers();
    char missing[256] = "";
    (void)avx_works;
    (void)leaf7_b;
    (void)extended_c;

#define NEED(name, has)                          \
    if (!(has)) {                                \
        add(missing, sizeof missing, name);      \
    }
#ifdef NEEDS_sse3
    NEED("sse3", c & bit_SSE3)
#endif
#ifdef NEEDS_ssse3
    NEED("ssse3", c & bit_SSSE3)
#endif
#ifdef NEEDS_sse4_1
    NEED("sse4.1", c & bit_SSE4_1)
#endif
#ifdef NEEDS_sse4_2
    NEED("sse4.2", c & bit_SSE4_2)
#endif
#ifdef NEEDS_popcnt
    NEED("popcnt", c & bit_POPCNT)
#endif
#ifdef NEEDS_pclmulqdq
    NEED("pclmulqdq", c & bit_PCLMUL)
#endif
#ifdef NEEDS_cmpxchg16b
    NEED("cmpxchg16b", c & bit_CMPXCHG16B)
#endif
#ifdef NEEDS_movbe
    NEED("movbe", c & bit_MOVBE)
#endif
#ifdef NEEDS_avx
    NEED("avx", (c & bit_AVX) && avx_works)
#endif
#ifdef NEEDS_f16c
    NEED("f16c", (c & bit_F16C) && avx_works)
#endif
#ifdef NEEDS_fma
    NEED("fma", (c & bit_FMA) && avx_works)
#endif
#ifdef NEEDS_avx2
    NEED("avx2", (leaf7_b & bit_AVX2) && avx_works)
#endif
#ifdef NEEDS_bmi1
    NEED("bmi1", leaf7_b & bit_BMI)
#endif
#ifdef NEEDS_bmi2
    NEED("bmi2", leaf7_b & bit_BMI2)
#endif
#ifdef NEEDS_lzcnt
    NEED("lzcnt", extended_c & bit_LZCNT)
#endif
#undef NEED

    if (missing[0] == '\0') {
        return;
    }
    print("error: this processor lacks ");
    print(missing);
    print(", which this build of dkc requires: use a processor of 2013 or later (Haswell, Zen), and expose the host's "
          "processor to virtual machines (QEMU: -cpu host)\n");
    _exit(2);
}

/* The array runs before the constructors of shared libraries, which call the allocator of this program. */
__attribute__((section(".preinit_array"), used)) static void (*const first)(void) = check_processor;
