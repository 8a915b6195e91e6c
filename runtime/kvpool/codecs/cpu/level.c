/* Which sources these kernels were made of, and which of them this processor can run. */

const char *kvpool_sources(void) { return SOURCES; }

int kvpool_is_fast(void) {
#if HAS_FAST
    __builtin_cpu_init();
    /* Every processor with these has F16C and LZCNT too, for which not all compilers can ask. */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#else
    return 0;
#endif
}
