/* Which sources these kernels were made of, and which of them this processor can run. */

const char *kvpool_sources(void) { return SOURCES; }

int kvpool_is_fast(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
#else
    return 0;
#endif
}
